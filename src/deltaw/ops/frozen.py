"""The frozen product: what a base weight must be able to do, and the plain dense way to do it.

A frozen W [N, K] is used in two products and no third: y = x·Wᵀ on the way forward, dx = dy·W on the way back.
dW = dyᵀ·x is never formed; that is where LoRA's third of the step is saved. Whoever can do these two products can be
a base: dense here, packed or 4-bit elsewhere.

Shapes: T rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
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
        return _linear(x_TK, self.dequantize().to(x_TK.dtype), bias_N)

    def multiply_transposed(self, dy_TN: Tensor) -> Tensor:
        return _linear(dy_TN, self.dequantize().to(dy_TN.dtype).T, None)

    def dequantize(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight


ONEDNN_ROWS = 64
"""From so many rows on, a float32 product goes through oneDNN."""


def _linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x·Wᵀ + bias by the fastest library at hand.

    torch gives float32 products on a CPU to MKL, which leaves a third of the speed of processors that aren't Intel's.
    oneDNN doesn't, and putting W into its own blocks on the way costs little beside a product of many rows: no packed
    copy is kept, in either direction.
    """
    is_plain = not (torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad))
    if is_plain and _HAS_ONEDNN and _is_float32_on_cpu(x_TK) and x_TK.shape[0] >= ONEDNN_ROWS:
        y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, w_NK, bias_N, "none", [], "")
        return y_TN
    return F.linear(x_TK, w_NK, bias_N)


def _is_float32_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
