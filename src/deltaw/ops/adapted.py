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
memory. A mask is saved as one bit an entry. A start (A₀, B₀) adds −s·B₀·A₀·x to the sum inside c, without mask and
without gradients of its own. Factors may be float32 masters over a bfloat16 x: they are
cast to x's dtype for the products, and their gradients come back in their own.

Shapes: T rows, K inputs, N outputs, R rank. ``adapted_reference`` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import DropoutMask, kept, pack_bits, unpack_bits
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
    start: tuple[Tensor, Tensor] | None = None
    """(A₀, B₀) of a start whose product isn't zero: s·B₀·A₀ is taken off again, without dropout. Never trained."""


def adapted(x_TK: Tensor, weight: FrozenWeight, segments: Sequence[Segment], bias_N: Tensor | None = None) -> Tensor:
    """y [T, N] in x's dtype; differentiable in x, bias and every segment's A, B and column scale.

    Raises ``ValueError`` for factors that do not fit the weight (nothing is broadcast by accident), and for rows that
    a segment with a column scale shares with another.
    """
    for segment in segments:
        _check(segment, x_TK, weight)
    _check_overlaps(segments)
    factors = [t for s in segments for t in (s.a_RK, s.b_NR, s.column_scale_N)]
    kind = x_TK.device.type
    if torch.is_autocast_enabled(kind) and x_TK.dtype != torch.float64:
        # Autocast knows nothing of the products inside: they are in x's dtype, so x is cast and autocast left.
        x_TK = x_TK.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
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
        if s.start is not None:
            a0_RK, b0_NR = s.start
            y = y - s.scaling * (x_TK[s.rows] @ a0_RK.to(x.dtype).T) @ b0_NR.to(x.dtype).T
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
            mask = None if s.mask is None else s.mask.draw(*x.shape)
            z_TR = (x if mask is None else kept(x, mask)) @ s.a_RK.to(x.dtype).T
            if s.mask is not None:
                z_TR.mul_(s.mask.scale)
            b_NR = s.b_NR.to(x.dtype)
            if s.start is None:
                y.addmm_(z_TR, b_NR.T, alpha=s.scaling)
            else:  # in one product, so that what cancels does so before it is rounded
                a0_RK, b0_NR = (t.to(x.dtype) for t in s.start)
                y.addmm_(torch.cat([z_TR, x @ a0_RK.T], 1), torch.cat([b_NR, -b0_NR], 1).T, alpha=s.scaling)
            unscaled = None
            if s.column_scale_N is not None:
                if s.column_scale_N.requires_grad and not s.column_scale_N.all():
                    unscaled = y.clone()  # what a scale of zero leaves can't be divided by it
                y.mul_(s.column_scale_N.to(y.dtype))
            saved += [z_TR, unscaled, None if mask is None else pack_bits(mask)]
        trains_scale = any(s.column_scale_N is not None and s.column_scale_N.requires_grad for s in segments)
        scaled_TN = y_TN if trains_scale else None
        if is_scaled and bias_N is not None:  # it stands outside DoRA's scale
            y_TN = y_TN.add_(bias_N) if scaled_TN is None else y_TN + bias_N.to(y_TN.dtype)
        ctx.weight, ctx.segments = weight, segments
        # Factors are saved, not read off the segments: autograd then notices when one was changed in between.
        ctx.save_for_backward(x_TK, scaled_TN, *factors, *saved)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = grads
        segments: tuple[Segment, ...] = ctx.segments
        x_TK, scaled_TN, *tensors = ctx.saved_tensors
        factors, saved = tensors[: 3 * len(segments)], tensors[3 * len(segments) :]
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dy_TN = dy_TN.contiguous()
        g_TN = _scaled_gradient(dy_TN, segments, factors)
        dx_TK = ctx.weight.multiply_transposed(g_TN) if needs_x else None
        factor_grads: list[Tensor | None] = []
        for i, s in enumerate(segments):
            a_RK, b_NR, c_N = factors[3 * i : 3 * i + 3]
            z_TR, unscaled, bits = saved[3 * i : 3 * i + 3]
            mask = None if bits is None else unpack_bits(bits, *x_TK[s.rows].shape)
            needs_a, needs_b, needs_c = ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i]
            g = g_TN[s.rows]
            u_TR = (g @ b_NR.to(g.dtype)).mul_(s.scaling)
            x, dx = x_TK[s.rows], None if dx_TK is None else dx_TK[s.rows]
            # The scale of dropout goes into u, after which dA and dx are those of the kept entries.
            if s.mask is not None:
                u_TR.mul_(s.mask.scale)
            factor_grads += [
                (u_TR.T @ (x if mask is None else kept(x, mask))).to(a_RK.dtype) if needs_a else None,
                (g.T @ z_TR).mul_(s.scaling).to(b_NR.dtype) if needs_b else None,
                _grad_scale(dy_TN[s.rows], c_N, scaled_TN[s.rows], unscaled) if needs_c else None,
            ]
            if dx is not None:
                a = a_RK.to(g.dtype)
                if s.start is not None:
                    a0_RK, b0_NR = (t.to(g.dtype) for t in s.start)
                    u0_TR = (g @ b0_NR).mul_(-s.scaling)
                    if mask is None:
                        u_TR, a = torch.cat([u_TR, u0_TR], 1), torch.cat([a, a0_RK])
                    else:
                        dx.addmm_(u0_TR, a0_RK)
                dx.addmm_(u_TR, a) if mask is None else dx.add_(kept(u_TR @ a, mask))
        return dx_TK, dy_TN.sum(0) if needs_bias else None, None, None, *factor_grads


def _scaled_gradient(dy_TN: Tensor, segments: tuple[Segment, ...], factors: list[Tensor | None]) -> Tensor:
    """g = c∘dy on the rows of scaled segments; dy itself, not a copy, where nothing is scaled."""
    scales = factors[2::3]
    if all(c_N is None for c_N in scales):
        return dy_TN
    if len(segments) == 1 and segments[0].rows == slice(0, dy_TN.shape[0]):
        return dy_TN * scales[0].to(dy_TN.dtype)  # type: ignore[union-attr]
    g_TN = dy_TN.clone()
    for s, c_N in zip(segments, scales, strict=True):
        if c_N is not None:
            g_TN[s.rows].mul_(c_N.to(g_TN.dtype))
    return g_TN


def _grad_scale(dy_TN: Tensor, c_N: Tensor, scaled_TN: Tensor, unscaled_TN: Tensor | None) -> Tensor:
    """dc = Σ_t dy∘u of y = c∘u. The output stands in for u, which would be a second copy of it: u = y/c."""
    dtype = torch.promote_types(c_N.dtype, torch.float32)
    if unscaled_TN is not None:
        return (dy_TN * unscaled_TN).sum(0, dtype=dtype).to(c_N.dtype)
    return (dy_TN * scaled_TN).sum(0, dtype=dtype).div_(c_N).to(c_N.dtype)


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
