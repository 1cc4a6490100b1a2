"""The frozen product: what a base weight must be able to do, and the plain dense way to do it.

A frozen W [N, K] is used in two products and no third: y = x·Wᵀ on the way forward, dx = dy·W on the way back.
dW = dyᵀ·x is never formed; that is where LoRA's third of the step is saved. Whoever can do these two products can be
a base: dense here, packed or 4-bit elsewhere.

Shapes: T rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class FrozenWeight(Protocol):
    """A weight W [N, K] that is never trained. All products are in the dtype of their input."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x·Wᵀ (+ bias) → [T, N]."""
        ...

    def multiply_transposed(self, dy_TN: Tensor) -> Tensor:
        """dy·W → [T, K]: the gradient with respect to the input."""
        ...

    def dequantize(self) -> Tensor:
        """W itself as a dense [N, K] tensor; a view where that costs nothing."""
        ...


class DenseWeight:
    """A plain tensor as a ``FrozenWeight``; ``transposed`` for layers that keep W as [K, N] (Conv1D)."""

    __slots__ = ("transposed", "weight")

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        self.weight = weight
        self.transposed = transposed

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        bias_N = None if bias_N is None else bias_N.to(x_TK.dtype)
        return F.linear(x_TK, self.dequantize().to(x_TK.dtype), bias_N)

    def multiply_transposed(self, dy_TN: Tensor) -> Tensor:
        return dy_TN @ self.dequantize().to(dy_TN.dtype)

    def dequantize(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight
