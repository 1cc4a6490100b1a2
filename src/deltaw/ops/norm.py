"""RMS norm in one pass forward and one backward, over a frozen weight (Zhang & Sennrich 2019).

    r = 1/√(mean(x²) + ε)      y = w∘(x·r)      dx = r·(g - x·r²·mean(g∘x))   with g = w∘dy

Llama's kind rounds x·r to x's dtype before it multiplies by w; Gemma's multiplies by 1 + w in float32 and rounds once.
Eager torch makes some six passes forward and more backward, and saves three tensors; here x and r are all that
backward needs.

Shapes: T rows, H entries of a row. ``rms_norm_reference`` is the plain twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import find


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """A frozen norm's weight and what belongs to it."""

    weight_H: Tensor
    eps: float
    adds_one: bool = False
    """Whether rows are multiplied by 1 + weight (Gemma)."""

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(y [T, H] in x's dtype, r [T] in float32, float64 for float64)."""
        x_TH, w_H = x_TH.contiguous(), self.weight_H.contiguous()
        kernel = find("rms_norm", "ppppiifi", x_TH)
        if kernel is None or w_H.dtype != x_TH.dtype or w_H.shape != x_TH.shape[1:]:
            x = x_TH.to(_accurate(x_TH))
            r_T = torch.rsqrt(x.square().mean(-1) + self.eps)
            return self._weigh(x * r_T[:, None], x_TH.dtype), r_T
        y_TH, r_T = torch.empty_like(x_TH), x_TH.new_empty(len(x_TH), dtype=torch.float32)
        kernel(*_at(x_TH, w_H, y_TH, r_T), *x_TH.shape, self.eps, self.adds_one)
        return y_TH, r_T

    def backward(self, dy_TH: Tensor, x_TH: Tensor, r_T: Tensor) -> Tensor:
        """dx [T, H] in x's dtype."""
        dy_TH, x_TH, w_H = dy_TH.contiguous(), x_TH.contiguous(), self.weight_H.contiguous()
        kernel = find("rms_norm_backward", "pppppiii", x_TH)
        if kernel is None or not w_H.dtype == dy_TH.dtype == x_TH.dtype:
            dtype = _accurate(x_TH)
            w = w_H.to(dtype) + 1 if self.adds_one else w_H.to(dtype)
            g, x, r = dy_TH.to(dtype) * w, x_TH.to(dtype), r_T[:, None]
            return (r * (g - x * r.square() * (g * x).mean(-1, keepdim=True))).to(x_TH.dtype)
        dx_TH = torch.empty_like(x_TH)
        kernel(*_at(dy_TH, x_TH, w_H, r_T, dx_TH), *x_TH.shape, self.adds_one)
        return dx_TH

    def _weigh(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        if self.adds_one:
            return (normed * (1.0 + self.weight_H.to(normed.dtype))).to(dtype)
        return self.weight_H * normed.to(dtype)


def rms_norm(x_TH: Tensor, norm: RmsNorm) -> Tensor:
    """y [T, H]; differentiable in x only."""
    y_TH: Tensor = _RmsNorm.apply(x_TH, norm)  # type: ignore[no-untyped-call]
    return y_TH


def rms_norm_reference(x_TH: Tensor, norm: RmsNorm) -> Tensor:
    """The plain twin: the same with autograd's derivative."""
    x = x_TH.to(_accurate(x_TH))
    return norm._weigh(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps), x_TH.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, norm: RmsNorm) -> Tensor:
        y_TH, r_T = norm.forward(x_TH)
        ctx.norm = norm
        ctx.save_for_backward(x_TH, r_T)
        return y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.norm.backward(grads[0], *ctx.saved_tensors), None


def _accurate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _at(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]
