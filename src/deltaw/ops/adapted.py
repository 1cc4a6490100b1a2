"""The one product of the project: a frozen product for all rows, and each segment's low-rank part on its own.

    z = (x∘m)·Aᵀ          y = c∘(x·Wᵀ + s·z·Bᵀ) + bias

for the rows of a segment; rows in no segment get x·Wᵀ + bias, exactly. m is a dropout mask (kept entries scaled by
1/(1-p)) or absent; c [N] is DoRA's column scale, magnitude over norm (Liu et al. 2024, eq. 5, with the norm detached
as in their §4.3), or absent. Training is one segment, a mixed batch many; rows of two segments may overlap (two
active adapters): their low-rank parts add up, and then neither may have a column scale.

Backward, with g = c∘dy (LoRA, Hu et al. 2021, §4.1; no gradient of W is ever formed):

    u = s·g·B     dB = s·gᵀ·z     dA = uᵀ·(x∘m)     dx = g·W + (u·A)∘m     dc = Σ_t dy∘(y - bias)/c

The dropout mask belongs to the low-rank branch only, as in LoRA. PEFT's DoRA draws the base term from dropped inputs
too, at the price of a second frozen product; here the base term sees x itself.

x is saved once whatever the number of segments, as the view that came in: projections that share an input share the
memory. Masks are not saved but drawn again from their key. Factors may be float32 masters over a bfloat16 x: they are
cast to x's dtype for the products, and their gradients come back in their own.

Shapes: T rows, K inputs, N outputs, R rank. ``adapted_reference`` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import DropoutMask
from .frozen import FrozenWeight


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One adapter's part in a batch."""

    rows: slice
    """Rows of x that it covers, with start and stop given."""
    a_RK: Tensor
    """A of ΔW = s·B·A."""
    b_NR: Tensor
    """B of ΔW = s·B·A."""
    scaling: float
    """s."""
    column_scale_N: Tensor | None = None
    """DoRA's c, one factor per output; differentiable."""
    mask: DropoutMask | None = None
    """Dropout of A's input for the rows of this segment."""


def adapted(x_TK: Tensor, weight: FrozenWeight, segments: Sequence[Segment], bias_N: Tensor | None = None) -> Tensor:
    """y [T, N] in x's dtype; differentiable in x, bias and every segment's A, B and column scale.

    Raises ``ValueError`` for factors that do not fit the weight (nothing is broadcast by accident), and for rows that
    a segment with a column scale shares with another.
    """
    for segment in segments:
        _check(segment, x_TK, weight)
    _check_overlaps(segments)
    factors = [t for s in segments for t in (s.a_RK, s.b_NR, s.column_scale_N)]
    y_TN: Tensor = _Adapted.apply(x_TK, bias_N, weight, tuple(segments), *factors)  # type: ignore[no-untyped-call]
    return y_TN


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
        if s.column_scale_N is not None:
            y = y * s.column_scale_N.to(y.dtype)
        y_TN = torch.cat([y_TN[: s.rows.start], y, y_TN[s.rows.stop :]])
    return y_TN if bias_N is None else y_TN + bias_N


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        bias_N: Tensor | None,
        weight: FrozenWeight,
        segments: tuple[Segment, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        is_scaled = any(s.column_scale_N is not None for s in segments)
        y_TN = weight.multiply(x_TK, None if is_scaled else bias_N)
        saved: list[Tensor | None] = []
        for s in segments:
            x, y = x_TK[s.rows], y_TN[s.rows]
            z_TR = (x if s.mask is None else s.mask.apply(x)) @ s.a_RK.to(x.dtype).T
            y.addmm_(z_TR, s.b_NR.to(x.dtype).T, alpha=s.scaling)
            unscaled = None
            if s.column_scale_N is not None:
                unscaled = y.clone() if s.column_scale_N.requires_grad else None
                y.mul_(s.column_scale_N.to(y.dtype))
            saved += [z_TR, unscaled]
        if is_scaled and bias_N is not None:
            y_TN.add_(bias_N)  # the bias stands outside DoRA's scale
        ctx.weight, ctx.segments = weight, segments
        # Factors are saved, not read off the segments: autograd then notices when one was changed in between.
        ctx.save_for_backward(x_TK, *factors, *saved)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = grads
        segments: tuple[Segment, ...] = ctx.segments
        x_TK, *tensors = ctx.saved_tensors
        factors, saved = tensors[: 3 * len(segments)], tensors[3 * len(segments) :]
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dy_TN = dy_TN.contiguous()
        g_TN = _scaled_gradient(dy_TN, segments, factors)
        dx_TK = ctx.weight.multiply_transposed(g_TN) if needs_x else None
        factor_grads: list[Tensor | None] = []
        for i, s in enumerate(segments):
            a_RK, b_NR, c_N = factors[3 * i : 3 * i + 3]
            z_TR, unscaled = saved[2 * i : 2 * i + 2]
            needs_a, needs_b, needs_c = ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i]
            g = g_TN[s.rows]
            u_TR = (g @ b_NR.to(g.dtype)).mul_(s.scaling)
            dx = None if dx_TK is None else dx_TK[s.rows]
            factor_grads += [
                _grad_a(u_TR, x_TK[s.rows], s.mask).to(a_RK.dtype) if needs_a else None,
                (g.T @ z_TR).mul_(s.scaling).to(b_NR.dtype) if needs_b else None,
                _column_sum(dy_TN[s.rows] * unscaled, c_N.dtype) if needs_c else None,
            ]
            if dx is not None:
                a = a_RK.to(g.dtype)
                dx.addmm_(u_TR, a) if s.mask is None else dx.add_(s.mask.apply(u_TR @ a))
        return dx_TK, dy_TN.sum(0) if needs_bias else None, None, None, *factor_grads


def _scaled_gradient(dy_TN: Tensor, segments: tuple[Segment, ...], factors: list[Tensor | None]) -> Tensor:
    """g = c∘dy on the rows of scaled segments; dy itself, not a copy, where nothing is scaled."""
    scales = factors[2::3]
    if all(c_N is None for c_N in scales):
        return dy_TN
    g_TN = dy_TN.clone()
    for s, c_N in zip(segments, scales, strict=True):
        if c_N is not None:
            g_TN[s.rows].mul_(c_N.to(g_TN.dtype))
    return g_TN


def _grad_a(u_TR: Tensor, x_TK: Tensor, mask: DropoutMask | None) -> Tensor:
    return u_TR.T @ (x_TK if mask is None else mask.apply(x_TK))


def _column_sum(x_TN: Tensor, dtype: torch.dtype) -> Tensor:
    return x_TN.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def _check(s: Segment, x_TK: Tensor, weight: FrozenWeight) -> None:
    rank, width = s.a_RK.shape
    if width != weight.in_features or s.b_NR.shape != (weight.out_features, rank):
        raise ValueError(
            f"A {tuple(s.a_RK.shape)} and B {tuple(s.b_NR.shape)} do not fit a weight of "
            f"{weight.out_features} × {weight.in_features}: expected A [r, {weight.in_features}] and "
            f"B [{weight.out_features}, r]"
        )
    if not 0 <= s.rows.start <= s.rows.stop <= x_TK.shape[0]:
        raise ValueError(f"segment rows {s.rows.start}:{s.rows.stop} lie outside the batch's {x_TK.shape[0]} rows")


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
