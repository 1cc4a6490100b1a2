"""One projection's part in a batch, forward and backward, as plain functions on tensors.

    z = (x∘m)·Aᵀ          y = c∘(x·Wᵀ + s·z·Bᵀ) + bias

for the rows of a segment; rows in no segment get x·Wᵀ + bias, exactly. Backward, with g = c∘dy:

    u = s·g·B     dB = s·gᵀ·z     dA = uᵀ·(x∘m)     dx = g·W + (u·A)∘m     dc = Σ_t dy∘(y - bias)/c

A mask m is one bit an entry. A start (A₀, B₀) adds −s·B₀·A₀·x to the sum inside c, without mask and without
gradients of its own. Factors may be float32 masters over a bfloat16 x: they are cast to x's dtype for the products,
and their gradients come back in their own.

Projections on one input (q, k and v; gate and up) have their A's in one product: Z = X·[A_q; A_k; A_v]ᵀ, and back
[dA_q; dA_k; dA_v] = Uᵀ·X and dX += U·[A_q; A_k; A_v]. Thin products are bound by reading X, which is then read once.
Only where each has one segment over all rows, without dropout and start (``joint``).

Shapes: T rows, K inputs, N outputs, R rank, J the ranks of all joined. ``adapted.py`` makes autograd's nodes of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import scale, scale_backward, scale_reference
from .dropout import DropoutMask, kept
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

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What it has that can be trained."""
        return self.a_RK, self.b_NR, self.column_scale_N


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A frozen weight, its bias, and who adapts which rows of its output."""

    weight: FrozenWeight
    segments: tuple[Segment, ...]
    bias_N: Tensor | None = None
    is_unread: bool = False
    """Whether nobody reads y, and only what backward needs is wanted: the last product of what is computed again."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may need a gradient: the bias, then each segment's factors."""
        return self.bias_N, *(t for s in self.segments for t in s.factors)

    @property
    def trains_scale(self) -> bool:
        return any(s.column_scale_N is not None and s.column_scale_N.requires_grad for s in self.segments)


def joint(projections: Sequence[Projection], x_TK: Tensor) -> Tensor | None:
    """The A's of all projections one above the other [J, K] in x's dtype; None where they can't be one product."""
    segments = [s for p in projections for s in p.segments]
    if len(projections) < 2 or len(segments) != len(projections) or any(len(p.segments) != 1 for p in projections):
        return None
    if any(s.rows != slice(0, x_TK.shape[0]) or s.mask is not None or s.start is not None for s in segments):
        return None
    return torch.cat([s.a_RK.to(x_TK.dtype) for s in segments])


def forward(x_TK: Tensor, p: Projection, z_TR: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
    """(y [T, N] in x's dtype, what ``backward`` needs of it); ``z_TR`` where it was formed together with others."""
    is_scaled = any(s.column_scale_N is not None for s in p.segments)
    if p.is_unread and not p.trains_scale:
        y_TN = x_TK.new_empty(x_TK.shape[0], p.weight.out_features)
    else:
        y_TN = p.weight.multiply(x_TK, None if is_scaled else p.bias_N)
    saved: list[Tensor | None] = []
    for s in p.segments:
        x, y = x_TK[s.rows], y_TN[s.rows]
        mask = None if s.mask is None else s.mask.draw(*x.shape)
        z = (x if mask is None else kept(x, mask)) @ s.a_RK.to(x.dtype).T if z_TR is None else z_TR
        if s.mask is not None:
            z.mul_(s.mask.scale)
        b_NR = s.b_NR.to(x.dtype)
        if s.start is None:
            y.addmm_(z, b_NR.T, alpha=s.scaling)
        else:  # in one product, so that what cancels does so before it is rounded
            a0_RK, b0_NR = (t.to(x.dtype) for t in s.start)
            y.addmm_(torch.cat([z, x @ a0_RK.T], 1), torch.cat([b_NR, -b0_NR], 1).T, alpha=s.scaling)
        unscaled = None
        if s.column_scale_N is not None:
            if s.column_scale_N.requires_grad and not s.column_scale_N.all():
                unscaled = y.clone()  # what a scale of zero leaves can't be divided by it
            scale(y, s.column_scale_N)
        saved += [z, unscaled, mask]
    scaled_TN = y_TN if p.trains_scale else None
    if is_scaled and p.bias_N is not None:  # it stands outside DoRA's scale
        y_TN = y_TN.add_(p.bias_N) if scaled_TN is None else y_TN + p.bias_N.to(y_TN.dtype)
    return y_TN, [scaled_TN, *saved]


@dataclass(slots=True)
class Gradients:
    """What ``backward`` leaves: of x, of u where A's are joined, and of ``Projection.tensors``."""

    dx_TK: Tensor | None
    u_TR: Tensor | None
    tensors: list[Tensor | None]


def backward(
    dy_TN: Tensor,
    x_TK: Tensor,
    p: Projection,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    onto: Tensor | None,
    needs_x: bool,
    is_joint: bool,
) -> Gradients:
    """Gradients by ``Projection.tensors`` that ``needs`` asks for, and dx, added to ``onto`` where that is given.

    ``tensors`` are the projection's own, as autograd hands them back. Where A's are joined, u is left to the caller
    instead of dA and A's part in dx.
    """
    dy_TN = dy_TN.contiguous()
    scaled_TN, *saved_by_segment = saved
    g_TN, sums = _scaled_gradient(dy_TN, scaled_TN, p.segments, tensors[1:])
    dx_TK = _grad_input(p.weight, g_TN, onto) if needs_x else None
    out = Gradients(dx_TK, None, [dy_TN.sum(0) if needs[0] else None])
    for i, s in enumerate(p.segments):
        a_RK, b_NR, c_N = tensors[1 + 3 * i : 4 + 3 * i]
        z_TR, unscaled, mask = saved_by_segment[3 * i : 3 * i + 3]
        needs_a, needs_b, needs_c = needs[1 + 3 * i : 4 + 3 * i]
        assert a_RK is not None and b_NR is not None and z_TR is not None
        g, x = g_TN[s.rows], x_TK[s.rows]
        u_TR = (g @ b_NR.to(g.dtype)).mul_(s.scaling)
        # The scale of dropout goes into u, after which dA and dx are those of the kept entries.
        if s.mask is not None:
            u_TR.mul_(s.mask.scale)
        grad_a = None
        if is_joint:
            out.u_TR = u_TR
        elif needs_a:
            grad_a = (u_TR.T @ (x if mask is None else kept(x, mask))).to(a_RK.dtype)
        out.tensors += [
            grad_a,
            (g.T @ z_TR).mul_(s.scaling).to(b_NR.dtype) if needs_b else None,
            _grad_scale(dy_TN[s.rows], c_N, sums[i], unscaled) if needs_c else None,
        ]
        if dx_TK is not None and not is_joint:
            _add_low_rank(dx_TK[s.rows], g, u_TR, a_RK, s, mask)
    return out


def _grad_input(weight: FrozenWeight, g_TN: Tensor, onto: Tensor | None) -> Tensor:
    dx_TK = weight.multiply_transposed(g_TN)
    return dx_TK if onto is None else onto.add_(dx_TK)


def _add_low_rank(dx: Tensor, g: Tensor, u_TR: Tensor, a_RK: Tensor, s: Segment, mask: Tensor | None) -> None:
    """dx += (u·A)∘m, and what a start takes off again."""
    a = a_RK.to(g.dtype)
    if s.start is not None:
        a0_RK, b0_NR = (t.to(g.dtype) for t in s.start)
        u0_TR = (g @ b0_NR).mul_(-s.scaling)
        if mask is None:
            u_TR, a = torch.cat([u_TR, u0_TR], 1), torch.cat([a, a0_RK])
        else:
            dx.addmm_(u0_TR, a0_RK)
    if mask is None:
        dx.addmm_(u_TR, a)
    else:
        kept(u_TR @ a, mask, onto=dx)


def _scaled_gradient(
    dy_TN: Tensor, scaled_TN: Tensor | None, segments: Sequence[Segment], factors: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """(g = c∘dy on the rows of scaled segments, each segment's Σ_t dy∘y); dy itself where none is scaled."""
    scales = factors[2::3]
    sums: list[Tensor | None] = [None] * len(segments)
    if all(c_N is None for c_N in scales):
        return dy_TN, sums
    g_TN = None if segments[0].rows == slice(0, dy_TN.shape[0]) else dy_TN.clone()
    for i, (s, c_N) in enumerate(zip(segments, scales, strict=True)):
        if c_N is None:
            continue
        dy = dy_TN[s.rows]
        g, sums[i] = (
            (scale_reference(dy.clone(), c_N), None)
            if scaled_TN is None
            else scale_backward(dy, scaled_TN[s.rows], c_N)
        )
        if g_TN is None:
            return g, sums
        g_TN[s.rows] = g
    assert g_TN is not None
    return g_TN, sums


def _grad_scale(dy_TN: Tensor, c_N: Tensor | None, sums_N: Tensor | None, unscaled_TN: Tensor | None) -> Tensor:
    """dc of y = c∘u, from Σ_t dy∘y where no entry of c is zero."""
    assert c_N is not None and sums_N is not None
    if unscaled_TN is not None:
        sums_N = (dy_TN * unscaled_TN).sum(0, dtype=sums_N.dtype)
        return sums_N.to(c_N.dtype)
    return sums_N.div_(c_N).to(c_N.dtype)
