"""Dropout masks that are a key, not a tensor.

A mask entry is a pure function of (seed, step, module, row, column). PCG64 (O'Neill 2014, in its DXSM variant) can
skip ahead, so the numbers of row n are reached without drawing those before it: a training job sees the same masks
alone, in company, in other micro-batches and after a resume.

Fifteen random bits decide an entry: p is met to 1/32,768, and kept entries are scaled by the exact inverse of the
probability that was used. A mask is one bit an entry, from forward to backward.

Shapes: T rows, K columns; a mask is uint8 [T, ⌈K/8⌉], whose bit k mod 8 of byte k div 8 is set where entry k is kept.
``DropoutMask.draw_reference`` and ``kept_reference`` are the plain twins.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import find, function

_LEVELS = 1 << 15
_ENTRIES_PER_WORD = 4
"""A word of 64 random bits makes four entries."""


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
        """The mask's bits, uint8 [num_rows, ⌈num_columns/8⌉]."""
        kernel = function("dropout_bits", "iiiiipii")
        if kernel is None:
            return self.draw_reference(num_rows, num_columns)
        drawn: Any = self._generator(num_columns).state["state"]
        words = (part for key in ("state", "inc") for part in (_signed(drawn[key] >> 64), _signed(drawn[key])))
        bits = torch.empty(num_rows, math.ceil(num_columns / 8), dtype=torch.uint8)
        kernel(*words, self._highest_dropped, bits.data_ptr(), num_rows, num_columns)
        return bits

    def draw_reference(self, num_rows: int, num_columns: int) -> Tensor:
        """The plain twin of ``draw``."""
        words_per_row = math.ceil(num_columns / _ENTRIES_PER_WORD)
        words = self._generator(num_columns).random_raw(num_rows * words_per_row).view(np.int16)
        numbers = words.reshape(num_rows, words_per_row * _ENTRIES_PER_WORD)[:, :num_columns] >> 1
        return torch.from_numpy(np.packbits(numbers > self._highest_dropped, axis=1, bitorder="little"))

    def _generator(self, num_columns: int) -> np.random.PCG64DXSM:
        """Standing where the first row begins: at a whole word, so that a row's bits don't depend on how many rows came
        before it in this call."""
        generator = np.random.PCG64DXSM(self.key)
        generator.advance(self.first_row * math.ceil(num_columns / _ENTRIES_PER_WORD))
        return generator

    def scale_for(self, x_TK: Tensor) -> Tensor:
        """The mask as a factor in x's dtype, 0 or ``scale``: the plain twin of ``kept``."""
        return unpack(self.draw(*x_TK.shape), x_TK.shape[1]).to(x_TK.device, x_TK.dtype) * self.scale

    @property
    def _dropped_levels(self) -> int:
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def _highest_dropped(self) -> int:
        """Of the numbers from -2¹⁴ on that are drawn."""
        return self._dropped_levels - _LEVELS // 2 - 1


def kept(x_TK: Tensor, bits: Tensor, onto: Tensor | None = None) -> Tensor:
    """x with zeros where the mask drops, not scaled: a new tensor, or added to ``onto``."""
    kernel = find("keep", "pppiii", x_TK)
    if kernel is None or not (onto is None or onto.is_contiguous()):
        y_TK = kept_reference(x_TK, bits)
        return y_TK if onto is None else onto.add_(y_TK)
    x_TK = x_TK.contiguous()
    y_TK = torch.empty_like(x_TK) if onto is None else onto
    kernel(x_TK.data_ptr(), bits.data_ptr(), y_TK.data_ptr(), *x_TK.shape, onto is not None)
    return y_TK


def kept_reference(x_TK: Tensor, bits: Tensor) -> Tensor:
    """The plain twin of ``kept``."""
    return torch.where(unpack(bits, x_TK.shape[1]).to(x_TK.device), x_TK, 0)


def unpack(bits: Tensor, num_columns: int) -> Tensor:
    """A mask's bits as bool [T, num_columns], True where kept."""
    numbers = np.unpackbits(bits.numpy(), axis=1, count=num_columns, bitorder="little")
    return torch.from_numpy(numbers.view(np.bool_))


def _signed(number: int) -> int:
    """The low 64 bits as a C interface takes them."""
    low = number & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low
