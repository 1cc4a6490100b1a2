"""What a low-rank ΔW = s·B·A is made of, from its factors alone; no [N, K] matrix is ever formed.

    B = Q·L      [N, M]·[M, R]         thin QR of each factor
    Aᵀ = P·T     [K, M]·[M, R]
    s·B·A = Q·(s·L·Tᵀ)·Pᵀ = U·diag(σ)·Vᵀ      with the SVD of the small s·L·Tᵀ

U = Q·u and V = P·v are orthonormal, since Q and P are. Everything else follows from (U, σ, V):

    ‖ΔW‖² = Σ σᵢ²        energy that the best approximation of rank k keeps: Σ_{i≤k} σᵢ² / ‖ΔW‖²  (Eckart-Young)
    effective rank = exp(−Σ pᵢ·log pᵢ), pᵢ = σᵢ/Σσ                    (Roy & Vetterli 2007, "The effective rank")
    ⟨ΔW, ΔW′⟩ = Σᵢⱼ σᵢ·σ′ⱼ·(UᵀU′)ᵢⱼ·(VᵀV′)ᵢⱼ
    overlap of two subspaces = ‖UᵀU′‖²_F / min(r, r′)                   (Hu et al. 2021, arXiv:2106.09685, §7.2)

The singular values of UᵀU′ are the cosines of the principal angles (Björck & Golub 1973). Two random subspaces of
N dimensions overlap by max(r, r′)/N on average, so an overlap means something by how far it is above that.

A fused parameter of E experts is E deltas of one rank. They are taken together as one ΔW with E blocks: norms and
inner products are sums over the experts, and ``spectrum`` is the root mean square over them, so that its energies are
those of cutting every expert to the same rank.

What is left out: DoRA, whose column scale is no part of B·A (``base_norms.py``), and everything that isn't low-rank.
All in float64, whatever the factors are in: what little is left between factors that nearly cancel is then right.

Shapes: E experts (1 for a layer), N outputs, K inputs, R rank, M = min(R, N) or min(R, K).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_NOISE = 16 * torch.finfo(torch.float64).eps
"""Singular values below this share of σ₁ are rounding."""

_UNMOVED = 1e-10
"""‖ΔW‖ below this share of |s|·‖B‖·‖A‖ is none: a start of rank 2r that never moved cancels but for rounding."""

_DIRECTION = 1e-6
"""Singular values below this share of σ₁ are no directions: factors in float32 know no better."""


class Svd(NamedTuple):
    """ΔW = U·diag(σ)·Vᵀ of each expert, σ falling and not negative."""

    u_ENM: Tensor
    s_EM: Tensor
    v_EKM: Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """One module's ΔW = s·B·A; the factors of a layer have E = 1."""

    a_ERK: Tensor
    b_ENR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a_ERK.shape[1]

    @property
    def num_experts(self) -> int:
        return self.a_ERK.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one expert's ΔW."""
        return self.b_ENR.shape[1], self.a_ERK.shape[2]

    @cached_property
    def is_finite(self) -> bool:
        """Whether all entries are numbers; nothing below can be asked where they aren't."""
        return math.isfinite(self.scaling) and all(bool(t.isfinite().all()) for t in (self.a_ERK, self.b_ENR))

    def svd(self) -> Svd:
        """Computed anew whenever it is asked for: of a whole adapter, U and V would take a lot of memory."""
        u, s, v = thin_svd(self.a_ERK.double(), self.b_ENR.double())
        return Svd(u * math.copysign(1, self.scaling), s * abs(self.scaling), v)

    @cached_property
    def singular_values(self) -> Tensor:
        """σ [E, M] of every expert, float64, largest first."""
        left, right = (torch.linalg.qr(f.double(), mode="r").R for f in (self.b_ENR, self.a_ERK.mT))
        s_EM: Tensor = torch.linalg.svdvals(left @ right.mT) * abs(self.scaling)
        return s_EM

    @cached_property
    def spectrum(self) -> Tensor:
        """Singular values [M], float64, largest first; of experts, their root mean square."""
        return self.singular_values.square().mean(0).sqrt()

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), of experts all together."""
        return float(self.singular_values.norm())

    @cached_property
    def has_moved(self) -> bool:
        """Whether ΔW is anything: not where B is zero, nor where A and B still are the start beside them."""
        most = abs(self.scaling) * float(self.b_ENR.double().norm()) * float(self.a_ERK.double().norm())
        return self.norm > _UNMOVED * most

    @property
    def effective_rank(self) -> float:
        """How many directions it has, counted by their weight: from 1 to the rank; 0 for no ΔW."""
        total = float(self.spectrum.sum())
        if not (self.has_moved and total):
            return 0.0
        return float(torch.special.entr(self.spectrum / total).sum().exp())

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share (0 to 1) of ‖ΔW‖²; 0 for no ΔW."""
        return rank_for(self.spectrum, energy) if self.has_moved else 0

    def energy_at(self, rank: int) -> float:
        """Share of ‖ΔW‖² that the best approximation of this rank keeps; 1 for no ΔW."""
        energies = self.spectrum.square()
        total = float(energies.sum())
        return float(energies[:rank].sum()) / total if total else 1.0

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A [E, k, K], B [E, N, k]) of the best approximation of rank k at the same scaling, float64.

        Each has the root of the singular values: neither is then so small, or so large, that 16 bits would lose it,
        and training goes on from balanced factors.
        """
        u, s, v = (part[..., :rank] for part in self.svd())
        missing = max(0, rank - s.shape[-1])  # where A or B has fewer dimensions than the rank
        root_EM = (s / abs(self.scaling)).sqrt() if self.scaling else torch.zeros_like(s)
        sign = math.copysign(1, self.scaling)
        a, b = (v * root_EM[:, None]).mT, u * (sign * root_EM[:, None])
        pad = torch.nn.functional.pad
        return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def thin_svd(a_XRK: Tensor, b_XNR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [..., N, M], σ [..., M], V [..., K, M]) of B·A, which is never formed; in the factors' dtype."""
    q_XNM, left = torch.linalg.qr(b_XNR)
    p_XKM, right = torch.linalg.qr(a_XRK.mT)
    u, s, vt = torch.linalg.svd(left @ right.mT, full_matrices=False)
    return q_XNM @ u, s, p_XKM @ vt.mT


def rank_for(s_M: Tensor, energy: float) -> int:
    """The least k whose largest k singular values keep this share of Σσ²; at least 1."""
    energies = torch.where(s_M > _NOISE * s_M[0], s_M.square(), 0)
    # From the small end: what is cut away is then known to the last digit.
    lost_M = energies.flip(0).cumsum(0).flip(0)  # what is lost by keeping 0, 1 … M−1 of them
    return max(1, int((lost_M > (1 - energy) * lost_M[0]).sum()))


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How two ΔW's of one module relate; None where one of them is zero, which has no direction."""

    product: float
    """⟨ΔW, ΔW′⟩ = tr(ΔWᵀ·ΔW′), over all experts."""
    cosine: float | None
    """⟨ΔW, ΔW′⟩ / (‖ΔW‖·‖ΔW′‖)."""
    overlap_out: float | None = None
    """Of the subspaces of outputs, those of B: from 0 (orthogonal) to 1 (the smaller lies in the larger)."""
    overlap_in: float | None = None
    """Of the subspaces of inputs, those of A."""
    by_chance_out: float | None = None
    """Overlap that two random subspaces of these ranks have on average."""
    by_chance_in: float | None = None
    cosines_out: tuple[float, ...] = ()
    """Cosines of the principal angles, largest first, min(r, r′) for each expert."""
    cosines_in: tuple[float, ...] = ()


def likeness(one: Delta, other: Delta) -> Likeness:
    """Compare two deltas of one shape and as many experts, whatever their ranks."""
    if not (one.has_moved and other.has_moved):
        return Likeness(product=0.0, cosine=None)
    (u, s, v), (u2, s2, v2) = one.svd(), other.svd()
    outs_EMM, ins_EMM = u.mT @ u2, v.mT @ v2
    product = float((s[:, :, None] * s2[:, None, :] * outs_EMM * ins_EMM).sum())
    ranks = [(_num_directions(s_M), _num_directions(s2_M)) for s_M, s2_M in zip(s, s2, strict=True)]
    both = [pair for pair in ranks if min(pair)]  # experts that have both moved
    least, most = sum(map(min, both)), sum(map(max, both)) / max(1, len(both))
    cosines_out, cosines_in = _principal_cosines(outs_EMM, ranks), _principal_cosines(ins_EMM, ranks)
    outputs, inputs = one.shape
    return Likeness(
        product=product,
        cosine=max(-1.0, min(1.0, product / (one.norm * other.norm))),
        overlap_out=math.fsum(c * c for c in cosines_out) / least if least else None,
        overlap_in=math.fsum(c * c for c in cosines_in) / least if least else None,
        by_chance_out=most / outputs,
        by_chance_in=most / inputs,
        cosines_out=tuple(cosines_out),
        cosines_in=tuple(cosines_in),
    )


def _num_directions(s_M: Tensor) -> int:
    """Numerical rank of one expert's ΔW: factors may be padded with zeros, or repeat a direction."""
    return int((s_M > _DIRECTION * s_M[0]).sum())


def _principal_cosines(between_EMM: Tensor, ranks: list[tuple[int, int]]) -> list[float]:
    found: list[float] = []
    for between_MM, (r1, r2) in zip(between_EMM, ranks, strict=True):
        if r1 and r2:
            found += torch.linalg.svdvals(between_MM[:r1, :r2]).clamp(max=1).tolist()
    return sorted(found, reverse=True)
