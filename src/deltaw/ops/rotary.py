"""Rotary positions in one pass (Su et al. 2021), in the halves that transformers has: y = x∘cos + (-x₂, x₁)∘sin.

The map is linear, so backward is its transpose. Roundings in bfloat16 are those of the three eager operations, bit for
bit.

Shapes: T tokens, N heads, D head size. ``rotary_reference`` is the plain twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import find


def rotary(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """y [T, N, D], contiguous; differentiable in x only. x may have any strides between tokens and heads."""
    y_TND: Tensor = _Rotary.apply(x_TND, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return y_TND


def rotary_reference(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The plain twin, with autograd's derivative."""
    first, second = x_TND.chunk(2, -1)
    return x_TND * cos_TD[:, None] + torch.cat([-second, first], -1) * sin_TD[:, None]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate(x_TND, cos_TD, sin_TD, transposed=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0], *ctx.saved_tensors, transposed=True), None, None


def _rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, transposed: bool) -> Tensor:
    kernel = find("rotate", "ppppiiiiiiif", x_TND)
    fits = cos_TD.shape == sin_TD.shape == (x_TND.shape[0], x_TND.shape[2])
    if kernel is None or not fits or not cos_TD.dtype == sin_TD.dtype == x_TND.dtype or x_TND.stride(-1) != 1:
        if not transposed:
            return rotary_reference(x_TND, cos_TD, sin_TD).contiguous()
        first, second = (x_TND * sin_TD[:, None]).chunk(2, -1)
        return x_TND * cos_TD[:, None] + torch.cat([second, -first], -1)
    cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
    y_TND = torch.empty_like(x_TND, memory_format=torch.contiguous_format)
    addresses = (t.data_ptr() for t in (x_TND, cos_TD, sin_TD, y_TND))
    kernel(*addresses, *x_TND.shape, *x_TND.stride()[:2], *y_TND.stride()[:2], -1.0 if transposed else 1.0)
    return y_TND
