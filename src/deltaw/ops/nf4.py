"""Weights in 4 bits: a codebook, blocks that share a scale, two codes a byte (QLoRA, Dettmers et al. 2023, §3).

    block of B neighbours:   s = max |w|      code_i = nearest codebook entry to w_i / s      ŵ_i = codebook[code_i] · s

NF4's sixteen levels are quantiles of a normal distribution, since trained weights are close to one; FP4 and INT4 are
here to compare with. A scale costs 32 / B bits a weight. Double quantisation (§3) brings that to 8 / B: the scales
less their mean are themselves quantised, in blocks of 256, to an 8-bit code whose steps widen with the value
(Dettmers 2015, arXiv:1511.04561).

Codes and scales equal bitsandbytes' bit for bit, whatever the shape; so do dequantised values, but where its AVX-512
code is off: rows of an even length that is no multiple of B, and denormals in bfloat16. What is quantised is the tensor
in row-major order, whatever its strides. Work goes through in pieces of bounded size.

Left out: products with quantised weights (``nn/storage``), 8-bit weights.
Shapes: n weights, S = ⌈n/B⌉ blocks, C entries of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import nf4_kernel

BLOCK = 64
"""Weights that share a scale, where nothing else is said (QLoRA's and bitsandbytes' choice)."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

SCALE_BLOCK = 256
"""Scales that share a scale of their own under double quantisation."""

_PIECE = 2**20
"""Weights that are worked on at once: a few megabytes in float32, near enough to the processor."""

_LAST_STEP = 65_535
"""Steps of the grid on which scales find their codes."""

_SMALLEST = 1e-38
"""Stands for the scale of a block of zeros where it is divided by."""

# NF4: QLoRA, appendix E. NF2: the same construction with two bits (LoftQ, Li et al. 2023, §3.1). FP4: a sign, two
# bits of exponent, one of mantissa, over 12. INT4: symmetric, -7 … 7; its first code is never given out.
_LEVELS: dict[str, list[float]] = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [level / 12 for level in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)],
    "int4": [level / 7 for level in range(-8, 8)],
    "nf2": [-1.0, 0.0, 0.33791524171829224, 1.0],
}  # fmt: skip
KINDS = tuple(_LEVELS)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedScales:
    """Scales under double quantisation: scale = dynamic[codes] · absmax + offset."""

    codes: Tensor
    """uint8 [S]."""
    absmax: Tensor
    """float32 [⌈S/256⌉]."""
    offset: Tensor
    """float32 scalar: the mean of the scales."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Quantized:
    """A quantised tensor."""

    packed: Tensor
    """uint8 [⌈n/2⌉]: two codes a byte, the first in the upper half. (NF2's two bits take four here.)"""
    scales: Tensor | QuantizedScales
    """float32 [S]: the largest magnitude of each block; or the same, quantised."""
    shape: torch.Size
    """Of the tensor that was quantised."""
    dtype: torch.dtype
    """Of that tensor; what it is dequantised to where nothing else is said."""
    kind: str = "nf4"
    """Codebook: one of ``KINDS``."""
    block_size: int = BLOCK
    """B."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        s = self.scales
        parts = [s] if isinstance(s, Tensor) else [s.codes, s.absmax, s.offset]
        return sum(t.nbytes for t in (self.packed, *parts))


def quantize(w: Tensor, kind: str = "nf4", *, block_size: int = BLOCK, double: bool = False) -> Quantized:
    """Quantise a tensor of any shape and strides; ``double``: its scales as well.

    Raises ``UserError`` for a kind, block size or dtype that there isn't, and for infinities and nans, which would
    take all of their block with them.
    """
    _check(w, kind, block_size)
    packed, scales = nf4_kernel.quantize(w, codebooks(kind), block_size) or _quantize_plain(w, kind, block_size)
    if not scales.isfinite().all():
        raise UserError("the tensor to quantise holds infinities or nans; repair the weights first")
    return Quantized(
        packed=packed,
        scales=_quantize_scales(scales) if double else scales,
        shape=w.shape,
        dtype=w.dtype,
        kind=kind,
        block_size=block_size,
    )


def _quantize_plain(w: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [⌈n/2⌉] and scales float32 [S]."""
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(math.ceil(w.numel() / block_size), device=w.device)
    for start, values in _pieces(w, block_size):
        codes, absmax = _encode(values, kind, block_size)
        scales[start // block_size :][: len(absmax)] = absmax
        packed[start // 2 :][: len(codes) // 2] = codes[::2] << 4 | codes[1::2]
    return packed, scales


def dequantize(q: Quantized, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The tensor again, in its own shape and dtype (or ``dtype``), rounded once from float32.

    ``out`` [shape], contiguous and of that dtype: where it is written; else a new tensor.
    """
    w = nf4_kernel.dequantize(q, codebooks(q.kind), dtype or q.dtype, out)
    if w is None:
        w = dequantize_reference(q, dtype)
        return w if out is None else out.copy_(w)
    return w


def dequantize_reference(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The plain twin of ``dequantize``."""
    n, size = q.shape.numel(), q.block_size
    w = torch.empty(n, dtype=dtype or q.dtype, device=q.packed.device)
    scales, pairs = dequantize_scales(q.scales), _pairs(q.kind, q.packed.device)
    for start in range(0, n, _PIECE):
        stop = min(start + _PIECE, n)
        levels = pairs.index_select(0, q.packed[start // 2 : (stop + 1) // 2].int()).view(torch.float32)
        blocks = F.pad(levels[: stop - start], (0, (start - stop) % size)).view(-1, size)
        blocks *= scales[start // size :][: len(blocks), None]
        w[start:stop] = blocks.view(-1)[: stop - start]
    return w.view(q.shape)


def dequantize_scales(scales: Tensor | QuantizedScales) -> Tensor:
    """The scales as float32 [S]."""
    if isinstance(scales, Tensor):
        return scales
    by_block = dynamic_map(scales.codes.device)[scales.codes.int()]
    by_block *= scales.absmax.repeat_interleave(SCALE_BLOCK)[: len(by_block)]
    return by_block + scales.offset


def _pieces(w: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """(position, values) in float32 and row-major order; every piece but the last is of whole blocks.

    Cut along the first dimension, so that a transposed tensor is never copied whole.
    """
    rows = w.reshape(1) if w.dim() == 0 else w
    width = max(rows[:1].numel(), 1)
    whole = block_size // math.gcd(width, block_size)  # so many rows are a whole number of blocks
    step = max(_PIECE // width // whole, 1) * whole
    for first in range(0, len(rows), step):
        piece = rows[first : first + step].reshape(-1).float()
        if len(piece):
            yield first * width, piece


def _encode(values: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, made even] and scales float32 [S] of one piece."""
    n = len(values)
    rest = n % block_size
    blocks = F.pad(values, (0, (-n) % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(1)
    scaled = blocks * (1 / scales.clamp(min=_SMALLEST))[:, None]
    if rest:  # bitsandbytes divides the last block where it is short, and multiplies the others: a bit's difference
        scales[-1].clamp_(min=_SMALLEST)
        scaled[-1] = blocks[-1] / scales[-1]
    bounds, order = _bounds(kind, values.device)
    codes = torch.bucketize(scaled.clamp_(-1, 1).view(-1)[: n + n % 2], bounds, out_int32=True)
    return order.index_select(0, codes), scales


def _quantize_scales(scales: Tensor) -> QuantizedScales:
    offset = scales.mean()
    if len(scales) and not offset.isfinite():
        raise UserError("the tensor to quantise is too large for double quantisation: its scales add up to infinity")
    centred = F.pad(scales - offset, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    absmax = centred.abs().amax(1)
    # Where all scales of a block are equal any code will do; bitsandbytes gives the lowest.
    scaled = torch.where(absmax[:, None] > 0, centred / absmax[:, None], -1)
    steps = ((scaled + 1) * 0.5 * _LAST_STEP + 0.5).int()
    codes = _nearest_on_a_grid(scales.device)[steps]
    return QuantizedScales(codes=codes.view(-1)[: len(scales)], absmax=absmax, offset=offset)


@cache
def codebooks(kind: str) -> nf4_kernel.Codebooks:
    """The levels of a kind as kernels read them, in the processor's memory."""
    cpu = torch.device("cpu")
    levels = F.pad(levels_of(kind, cpu), (0, 16 - len(_LEVELS[kind])))
    bounds, order = _bounds(kind, cpu)
    return nf4_kernel.Codebooks(
        levels=levels,
        scale_map=dynamic_map(cpu),
        bounds=F.pad(bounds, (0, 16 - len(bounds)), value=math.inf),
        order=F.pad(order.int(), (0, 16 - len(order))),
    )


@cache
def levels_of(kind: str, device: torch.device) -> Tensor:
    levels = torch.tensor(_LEVELS[kind], device=device)
    return levels / levels.abs().max() if kind == "fp4" else levels


@cache
def _bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels [C - 1], and each interval's code, uint8 [C]."""
    levels, order = levels_of(kind, device).sort(stable=True)
    return (levels[:-1] + levels[1:]) / 2, order.to(torch.uint8)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two levels that each byte stands for, as one word of 8 bytes, [256]: words are looked up fastest."""
    levels = F.pad(levels_of(kind, device), (0, 16 - len(_LEVELS[kind])))
    return torch.cartesian_prod(levels, levels).view(torch.float64).view(-1)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels of the signed 8-bit dynamic code: seven decades, each with twice the steps of the one below."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@cache
def _nearest_on_a_grid(device: torch.device) -> Tensor:
    """The nearest level's code for 65,536 evenly spaced values in [-1, 1], uint8.

    That is how bitsandbytes' CPU kernel finds codes. A search would be off by nothing instead of 1/65,535, which is
    below what 8 bits can show.
    """
    levels = dynamic_map(torch.device("cpu"))
    grid = torch.arange(_LAST_STEP + 1) / _LAST_STEP * 2 - 1
    return torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(device, torch.uint8)


def _check(w: Tensor, kind: str, block_size: int) -> None:
    if kind not in _LEVELS:
        raise UserError(f"quantisation {kind!r}: expected one of {', '.join(KINDS)}")
    if block_size not in BLOCK_SIZES:
        raise UserError(f"blocks of {block_size} weights: expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if not w.is_floating_point():
        raise UserError(f"a tensor of {w.dtype} can't be quantised; expected float32, float16 or bfloat16")
