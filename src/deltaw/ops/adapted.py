"""The one product of the project: a frozen product for all rows, and each segment's low-rank part on its own.

    y = c∘(x·Wᵀ + s·(x∘m)·Aᵀ·Bᵀ) + bias

(``projection.py`` has the arithmetic, forward and backward.) Training is one segment, a mixed batch many; rows of two
segments may overlap (two active adapters): their low-rank parts add up, and then neither may have a column scale c
(DoRA's: magnitude over norm, Liu et al. 2024, eq. 5, with the norm detached as in their §4.3). No gradient of W is
ever formed (LoRA, Hu et al. 2021, §4.1).

The dropout mask m belongs to the low-rank branch only, as in LoRA. PEFT's DoRA draws the base term from dropped inputs
too, at the price of a second frozen product; here the base term sees x itself.

x is saved once, whatever the number of segments and of projections that read it, or not at all where it is cheaper to
compute again (``source.py``).

Shapes: T rows, K inputs, N outputs, R rank. ``adapted_reference`` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .frozen import FrozenWeight
from .projection import Projection, Segment, backward, forward, joint
from .source import Itself, Source

__all__ = ["Projection", "Segment", "adapted", "adapted_group", "adapted_group_reference", "adapted_reference"]


def adapted(x_TK: Tensor, weight: FrozenWeight, segments: Sequence[Segment], bias_N: Tensor | None = None) -> Tensor:
    """y [T, N] in x's dtype; differentiable in x, bias and every segment's A, B and column scale.

    Raises ``ValueError`` for factors that do not fit the weight (nothing is broadcast by accident), and for rows that
    a segment with a column scale shares with another.
    """
    return adapted_group([x_TK], Itself(), [Projection(weight, tuple(segments), bias_N)])[0]


def adapted_group(inputs: Sequence[Tensor], source: Source, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """y [T, N] of each projection of one x, which ``source`` makes of ``inputs``; differentiable in these as well.

    Raises ``ValueError`` as ``adapted`` does.
    """
    kind = inputs[0].device.type
    for p in projections:
        for segment in p.segments:
            _check(segment, inputs[0].shape[0], p.weight)
        _check_overlaps(p.segments)
    tensors = [t for p in projections for t in p.tensors]
    if torch.is_autocast_enabled(kind) and inputs[0].dtype != torch.float64:
        # Autocast knows nothing of the products inside: they are in x's dtype, so x is cast and autocast left.
        inputs = [x.to(torch.get_autocast_dtype(kind)) for x in inputs]
    with torch.autocast(kind, enabled=False):
        ys: tuple[Tensor, ...] = _Adapted.apply(  # type: ignore[no-untyped-call]
            source, tuple(projections), len(inputs), *inputs, *tensors
        )
    return ys


def adapted_reference(
    x_TK: Tensor, weight: FrozenWeight, segments: Sequence[Segment], bias_N: Tensor | None = None
) -> Tensor:
    """The plain twin of ``adapted``: the same sum with autograd's own derivatives, for tests and reading."""
    y_TN = x_TK @ weight.dequantize().to(x_TK.dtype).T
    for s in segments:
        x, y = x_TK[s.rows], y_TN[s.rows]
        if s.mask is not None:
            x = x * s.mask.scale_for(x)
        y = y + s.scaling * (x @ s.a_RK.to(x.dtype).T) @ s.b_NR.to(x.dtype).T
        if s.start is not None:
            a0_RK, b0_NR = s.start
            y = y - s.scaling * (x_TK[s.rows] @ a0_RK.to(x.dtype).T) @ b0_NR.to(x.dtype).T
        if s.column_scale_N is not None:
            y = y * s.column_scale_N.to(y.dtype)
        y_TN = torch.cat([y_TN[: s.rows.start], y, y_TN[s.rows.stop :]])
    return y_TN if bias_N is None else y_TN + bias_N


def adapted_group_reference(
    inputs: Sequence[Tensor], source: Source, projections: Sequence[Projection]
) -> tuple[Tensor, ...]:
    """The plain twin of ``adapted_group``."""
    x_TK = source.reference(inputs)
    return tuple(adapted_reference(x_TK, p.weight, p.segments, p.bias_N) for p in projections)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: Source, projections: tuple[Projection, ...], num_inputs: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inputs: list[Tensor] = list(tensors[:num_inputs])  # type: ignore[arg-type]
        x_TK, again = source.forward(inputs)
        a_JK = joint(projections, x_TK)
        zs = [None] * len(projections) if a_JK is None else (x_TK @ a_JK.T).split(_ranks(projections), 1)
        ys, saved = zip(*(forward(x_TK, p, z) for p, z in zip(projections, zs, strict=True)), strict=True)
        ctx.source, ctx.projections, ctx.num_inputs, ctx.is_joint = source, projections, num_inputs, a_JK is not None
        # Factors are saved, not read off the segments: autograd then notices when one was changed in between.
        ctx.save_for_backward(*tensors, *again, *(t for part in saved for t in part))
        ctx.num_kept = len(again)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projections: tuple[Projection, ...] = ctx.projections
        saved = list(ctx.saved_tensors)
        needs = list(ctx.needs_input_grad[3:])
        inputs, saved = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        needs_x, needs = any(needs[: ctx.num_inputs]), needs[ctx.num_inputs :]
        counts = [len(p.tensors) for p in projections]
        tensors, saved = _parts(saved, counts), saved[sum(counts) :]
        kept, saved = saved[: ctx.num_kept], saved[ctx.num_kept :]
        saved_parts = _parts(saved, [1 + 3 * len(p.segments) for p in projections])
        x_TK = ctx.source.again(inputs, kept)
        dx_TK, results = None, []
        parts = zip(grads, projections, tensors, saved_parts, _parts(needs, counts), strict=True)
        for dy_TN, p, own, own_saved, own_needs in parts:
            result = backward(
                dy_TN, x_TK, p, own, own_saved, own_needs, onto=dx_TK, needs_x=needs_x, is_joint=ctx.is_joint
            )
            dx_TK = result.dx_TK
            results.append(result)
        if ctx.is_joint:
            u_TJ = torch.cat([r.u_TR for r in results if r.u_TR is not None], 1)
            for result, part, grad_a in zip(results, tensors, (u_TJ.T @ x_TK).split(_ranks(projections)), strict=True):
                result.tensors[1] = grad_a.to(part[1].dtype)
            if dx_TK is not None:
                dx_TK.addmm_(u_TJ, torch.cat([part[1].to(u_TJ.dtype) for part in tensors]))
        grad_inputs = (None,) * ctx.num_inputs if dx_TK is None else ctx.source.backward(dx_TK, inputs, kept)
        return None, None, None, *grad_inputs, *(t for r in results for t in r.tensors)


def _ranks(projections: Sequence[Projection]) -> list[int]:
    return [s.a_RK.shape[0] for p in projections for s in p.segments]


def _parts(items: list[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The first of ``items``, so many to each."""
    parts, start = [], 0
    for count in counts:
        parts.append(items[start : start + count])
        start += count
    return parts


def _check(s: Segment, num_rows: int, weight: FrozenWeight) -> None:
    rank, width = s.a_RK.shape
    if width != weight.in_features or s.b_NR.shape != (weight.out_features, rank):
        raise ValueError(
            f"A {tuple(s.a_RK.shape)} and B {tuple(s.b_NR.shape)} do not fit a weight of "
            f"{weight.out_features} × {weight.in_features}: expected A [r, {weight.in_features}] and "
            f"B [{weight.out_features}, r]"
        )
    if not 0 <= s.rows.start <= s.rows.stop <= num_rows:
        raise ValueError(f"segment rows {s.rows.start}:{s.rows.stop} lie outside the batch's {num_rows} rows")


def _check_overlaps(segments: Sequence[Segment]) -> None:
    """A column scale applies to a whole sum, so its rows can't belong to a second adapter as well."""
    if all(s.column_scale_N is None for s in segments):
        return
    in_order = sorted((s for s in segments if s.rows.start < s.rows.stop), key=lambda s: s.rows.start)
    reached, scaled_until = 0, 0
    for s in in_order:
        is_scaled = s.column_scale_N is not None
        if s.rows.start < scaled_until or (is_scaled and s.rows.start < reached):
            raise ValueError("two adapters are active on the same rows and one is DoRA; activate one at a time")
        reached = max(reached, s.rows.stop)
        scaled_until = max(scaled_until, s.rows.stop if is_scaled else 0)
