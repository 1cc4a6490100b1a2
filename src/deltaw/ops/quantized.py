"""A weight in 4 bits as a frozen weight: products with what is stored, never with a dense copy that is kept.

    y = x·Wᵀ        dx = dy·W        with W = codebook[codes] · scales, made dense in the dtype of x for the product

A dense W lives as long as one product, and of a large one so many rows at a time as make ``_AT_ONCE`` weights.

Left out: the codes themselves (``nf4``), layers and files (``nn/quantized``).
Shapes: T rows, K inputs, N outputs; W [N, K] is stored row by row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import nf4, nf4_kernel
from .frozen import DenseWeight
from .nf4 import BLOCK, Quantized, dequantize, dequantize_scales

_AT_ONCE = 2**24
"""Weights that are dense at once: 32 MB in bfloat16. Matrices above that are few, and multiplied in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are quantised."""

    kind: str = "nf4"
    """Codebook: nf4, fp4 or int4."""
    block_size: int = BLOCK
    """Weights that share a scale."""
    double: bool = False
    """Whether the scales are quantised as well, in blocks of 256."""

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4", "int4"):
            raise UserError(f"quantisation {self.kind!r}: expected nf4, fp4 or int4")
        if self.block_size not in nf4.BLOCK_SIZES:
            sizes = ", ".join(map(str, nf4.BLOCK_SIZES))
            raise UserError(f"blocks of {self.block_size} weights: expected one of {sizes}")

    def __str__(self) -> str:
        return f"{self.kind.upper()}{' + double quantisation' if self.double else ''}, blocks of {self.block_size}"

    def quantize(self, w: Tensor) -> Quantized:
        """Raises ``UserError`` for infinities and nans."""
        return nf4.quantize(w, self.kind, block_size=self.block_size, double=self.double)


METHODS = {
    "nf4": Method(double=True),
    "nf4-single": Method(),
    "fp4": Method(kind="fp4"),
    "int4": Method(kind="int4"),
}
"""By the names that ``--quantization`` takes: nf4 is QLoRA's, the others are there to compare with."""


class QuantizedWeight:
    """A quantised W [N, K] as a ``FrozenWeight``."""

    __slots__ = ("quantized",)

    def __init__(self, quantized: Quantized) -> None:
        self.quantized = quantized

    @property
    def out_features(self) -> int:
        return self.quantized.shape[0]

    @property
    def in_features(self) -> int:
        return self.quantized.shape[1]

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        y_TN = multiply(x_TK, self.quantized)
        return y_TN if bias_N is None else y_TN.add_(bias_N.to(y_TN.dtype))

    def multiply_transposed(self, dy_TN: Tensor) -> Tensor:
        return multiply_transposed(dy_TN, self.quantized)

    def dequantize(self) -> Tensor:
        """W in the dtype that it was quantised from."""
        return dequantize(self.quantized)


def multiply(x_TK: Tensor, q: Quantized) -> Tensor:
    """x·Wᵀ → [T, N] in x's dtype; where x has few rows, without a dense W."""
    y_TN = nf4_kernel.multiply(x_TK, q, nf4.codebooks(q.kind))
    return multiply_reference(x_TK, q) if y_TN is None else y_TN


def multiply_reference(x_TK: Tensor, q: Quantized) -> Tensor:
    """The plain twin of ``multiply``."""
    parts = [DenseWeight(_dense(part, x_TK.dtype)).multiply(x_TK) for _, part in row_blocks(q)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def multiply_transposed(dy_TN: Tensor, q: Quantized) -> Tensor:
    """dy·W → [T, K] in dy's dtype, summed in it over blocks of W's rows."""
    blocks = row_blocks(q)
    rows, first = next(blocks)
    dx_TK = DenseWeight(_dense(first, dy_TN.dtype)).multiply_transposed(dy_TN[:, rows])
    for rows, part in blocks:
        dx_TK.addmm_(dy_TN[:, rows], _dense(part, dy_TN.dtype))
    return dx_TK


class _Scratch(threading.local):
    """Memory for the dense W of the product that is going on, kept for the next one: the system takes longer to hand
    out fresh pages for a large matrix than a kernel to fill it."""

    buffer: Tensor | None = None


_scratch = _Scratch()


def _dense(q: Quantized, dtype: torch.dtype) -> Tensor:
    """W, valid until the next call on this thread."""
    num_bytes = q.shape.numel() * dtype.itemsize
    if q.packed.device.type != "cpu":
        return dequantize(q, dtype)
    if _scratch.buffer is None or _scratch.buffer.numel() < num_bytes:
        _scratch.buffer = torch.empty(num_bytes, dtype=torch.uint8)
    return dequantize(q, dtype, out=_scratch.buffer[:num_bytes].view(dtype).view(q.shape))


def row_blocks(q: Quantized) -> Iterator[tuple[slice, Quantized]]:
    """(rows, W[rows]) one after another; every block but the last is of whole blocks of codes."""
    num_rows, width = q.shape
    whole = q.block_size // math.gcd(max(width, 1), q.block_size)  # so many rows end where a block does
    step = max(_AT_ONCE // max(width, 1) // whole, 1) * whole
    if step >= num_rows:
        yield slice(0, num_rows), q
        return
    scales = dequantize_scales(q.scales)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        codes = q.packed.view(-1)[start * width // 2 : (stop * width + 1) // 2]
        own = scales[start * width // q.block_size :][: math.ceil((stop - start) * width / q.block_size)]
        yield slice(start, stop), replace(q, packed=codes, scales=own, shape=torch.Size((stop - start, width)))


def look_up(q: Quantized, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of W by their numbers: [*ids.shape, K], as an embedding gives them. Only these rows become dense."""
    width = q.shape[1]
    if width % q.block_size:  # rows that share blocks with their neighbours
        return F.embedding(ids, dequantize(q, dtype))
    flat = ids.reshape(-1)
    blocks = flat[:, None] * (width // q.block_size) + torch.arange(width // q.block_size, device=ids.device)
    own = dequantize_scales(q.scales)[blocks]
    rows = replace(
        q,
        packed=q.packed.view(q.shape[0], width // 2)[flat].view(-1),
        scales=own.view(-1),
        shape=torch.Size((len(flat), width)),
    )
    return dequantize(rows, dtype).view(*ids.shape, width)


def frozen_linear(x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b for x [..., K], differentiable in x and b. Between forward and backward nothing is kept but W itself."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        y_TN: Tensor = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
        if bias_N is not None:
            y_TN = y_TN.add_(bias_N.to(y_TN.dtype))
        return y_TN.view(*x.shape[:-1], weight.out_features)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return weight.multiply(x_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.weight.multiply_transposed(grads[0]) if ctx.needs_input_grad[0] else None, None
