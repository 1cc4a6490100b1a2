"""The compiled way to weights in 4 bits: quantised, made dense again, or multiplied with a few rows as they are.

All give None where there is no kernel for these tensors, and the caller takes its plain way (``nf4.dequantize``,
``quantized.multiply``). The product with few rows never writes a dense W: with bfloat16 rows its levels are rounded to
bfloat16, and multiplied by their block's scale after the sum over the block, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import find

if TYPE_CHECKING:
    from .nf4 import Quantized

MOST_ROWS = 8
"""Up to so many rows are faster from 4 bits; more are worth a dense W and a library's product."""

_UNIT = 128
"""Weights that the product reads at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Codebooks:
    """What codes stand for."""

    levels: Tensor
    """float32 [16]: of weights."""
    scale_map: Tensor
    """float32 [256]: of scales that are quantised themselves."""
    bounds: Tensor
    """float32 [16]: midpoints between neighbouring levels, ascending, filled up with infinity."""
    order: Tensor
    """int32 [16]: the code of each interval between bounds."""


def quantize(w: Tensor, books: Codebooks, block_size: int) -> tuple[Tensor, Tensor] | None:
    """(codes uint8 [⌈n/2⌉], scales float32 [S]), bit for bit as the plain way has them; a scale is nan where its block
    holds infinities or nans."""
    kernel = find("quantize4", "pppppii", w)
    if kernel is None or not w.is_contiguous():
        return None
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-w.numel() // block_size))
    tensors = (w, books.bounds, books.order, packed, scales)
    kernel(*map(_at, tensors), w.numel(), block_size)
    return packed, scales


def dequantize(q: Quantized, books: Codebooks, dtype: torch.dtype, out: Tensor | None = None) -> Tensor | None:
    """W in its own shape, bit for bit as ``nf4.dequantize_reference`` has it; in ``out``'s memory where given."""
    w = torch.empty(q.shape, dtype=dtype, device=q.packed.device) if out is None else out
    kernel = find("dequantize4", "ppppppfpii", w)
    if kernel is None:
        return None
    tensors = _tensors(q, books)
    kernel(*map(_at, tensors), _offset(q), _at(w), w.numel(), q.block_size)
    return w


def multiply(x_TK: Tensor, q: Quantized, books: Codebooks) -> Tensor | None:
    """x·Wᵀ [T, N] in x's dtype for at most ``MOST_ROWS`` rows."""
    (rows, width), num_outputs = x_TK.shape, q.shape[0]
    if rows > MOST_ROWS or rows == 0 or width % _UNIT or width % q.block_size:
        return None
    kernel = find("multiply4", "pippppppfpiiipp", x_TK)
    if kernel is None or q.packed.device.type != "cpu":
        return None
    x_TK, y_TN = x_TK.contiguous(), x_TK.new_empty(rows, num_outputs)
    scratch = torch.empty(rows * width + torch.get_num_threads() * (width // q.block_size))
    tensors = _tensors(q, books)
    at_scales = scratch.data_ptr() + 4 * rows * width
    kernel(
        *(_at(x_TK), rows, *map(_at, tensors), _offset(q)),
        *(_at(y_TN), num_outputs, width, q.block_size, _at(scratch), at_scales),
    )
    return y_TN


def _tensors(q: Quantized, books: Codebooks) -> tuple[Tensor | None, ...]:
    """Codes, levels, and the scales in one of their two forms."""
    packed, s = q.packed.contiguous(), q.scales
    if isinstance(s, Tensor):
        return packed, books.levels, s.contiguous(), None, None, None
    return packed, books.levels, None, s.codes.contiguous(), books.scale_map, s.absmax.contiguous()


def _offset(q: Quantized) -> float:
    return 0.0 if isinstance(q.scales, Tensor) else float(q.scales.offset)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
