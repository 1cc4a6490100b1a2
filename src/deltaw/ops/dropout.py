"""Dropout masks that are a key, not a tensor.

A mask entry is a pure function of (seed, step, module, row, column). PCG64 (O'Neill 2014, in its DXSM variant) can
skip ahead, so the numbers of row n are reached without drawing those before it: a training job sees the same masks
alone, in company, in other micro-batches and after a resume.

Fifteen random bits decide an entry: p is met to 1/32,768, and kept entries are scaled by the exact inverse of the
probability that was used. A mask is all ones or all zeros in the bits of an integer, so that dropping is a bitwise
*and*: comparing, filling and multiplying by a mask each take torch five to ten times as long on a CPU. Between forward
and backward a mask is kept as one bit an entry.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 15
_ENTRIES_PER_WORD = 4
"""A word of 64 random bits makes four entries."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """Identifies a stream of masks: one job's step, or one call outside training."""

    seed: int
    step: int
    first_row: int = 0
    """Row number, within the step, of the batch's first row."""

    def mask(self, p: float, module: str, row: int) -> DropoutMask:
        """The mask of one module from row ``first_row + row`` on."""
        text = f"{self.seed}/{self.step}/{module}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
        return DropoutMask(p, key, self.first_row + row)


@dataclass(frozen=True, slots=True)
class DropoutMask:
    """Which inputs of one module's A are kept, from row ``first_row`` on."""

    p: float
    """Probability that an entry is dropped, in [0, 1)."""
    key: int
    """128 bits that seed the generator."""
    first_row: int

    @property
    def scale(self) -> float:
        """What kept entries are multiplied with: the inverse of the share that is kept."""
        return _LEVELS / (_LEVELS - self._dropped_levels)

    def draw(self, num_rows: int, num_columns: int) -> Tensor:
        """int16 [num_rows, num_columns]: −1, which is all ones, where kept, and 0 where dropped."""
        # Rows start at whole words, so that a row's bits don't depend on how many rows came before in this call.
        words_per_row = math.ceil(num_columns / _ENTRIES_PER_WORD)
        generator = np.random.PCG64DXSM(self.key)
        generator.advance(self.first_row * words_per_row)
        words = torch.from_numpy(generator.random_raw(num_rows * words_per_row).view(np.int16))
        number = words.view(num_rows, words_per_row * _ENTRIES_PER_WORD)[:, :num_columns] >> 1
        highest_dropped = self._dropped_levels - _LEVELS // 2 - 1
        return torch.rsub(number, highest_dropped).bitwise_right_shift_(15)  # the sign of (highest_dropped - number)

    def scale_for(self, x_TK: Tensor) -> Tensor:
        """The mask as a factor in x's dtype, 0 or ``scale``: the plain twin of ``kept``."""
        return (self.draw(*x_TK.shape) != 0).to(x_TK.device, x_TK.dtype) * self.scale

    @property
    def _dropped_levels(self) -> int:
        return min(round(self.p * _LEVELS), _LEVELS - 1)


def kept(x_TK: Tensor, mask_TK: Tensor) -> Tensor:
    """x with zeros where ``draw`` gave zero, not scaled yet; a new tensor."""
    bits = _BITS[x_TK.element_size()]
    return (x_TK.view(bits) & mask_TK.to(x_TK.device, bits)).view(x_TK.dtype)


def pack_bits(mask_TK: Tensor) -> Tensor:
    """A mask of ``draw`` as one bit an entry: uint8 [⌈T·K/8⌉]."""
    return torch.from_numpy(np.packbits(mask_TK.numpy() != 0))


def unpack_bits(packed: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The inverse of ``pack_bits``."""
    bits = np.unpackbits(packed.numpy(), count=num_rows * num_columns)
    return torch.from_numpy(bits.view(np.int8)).view(num_rows, num_columns).neg_().to(torch.int16)
