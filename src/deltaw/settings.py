"""The settings that single starts bring along, and what counts as a number in a config."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from .errors import UserError, short

Quantization = Literal["none", "nf4", "nf4-single", "fp4", "int4"]
"""How the base's linear layers are stored: nf4 is QLoRA's, with double quantisation; the others are to compare with."""


@dataclass
class LoftQConfig:
    """PEFT's settings of a LoftQ start (Li et al. 2023, algorithm 1)."""

    loftq_bits: int = 4
    """Bits of the quantised weight."""
    loftq_iter: int = 1
    """Rounds of quantising and taking the residual's singular vectors."""

    def __post_init__(self) -> None:
        if self.loftq_bits not in (2, 4, 8):
            raise UserError(f"LoftQConfig(loftq_bits={short(self.loftq_bits)}): expected 2, 4 or 8")
        if not is_whole(self.loftq_iter) or not 1 <= self.loftq_iter <= 100:
            raise UserError(f"LoftQConfig(loftq_iter={short(self.loftq_iter)}): expected a whole number from 1 to 100")


@dataclass
class EvaConfig:
    """PEFT's settings of an EVA start (Paischer et al. 2024)."""

    rho: float = 2.0
    """A layer's rank is at most ρ·r; 1 leaves every layer at r."""
    tau: float = 0.99
    """Singular vectors whose cosine similarity between two steps is above this have converged."""
    use_label_mask: bool = True
    """Only positions with a label are looked at."""
    label_mask_value: int = -100
    """The label of positions that are not looked at."""
    whiten: bool = False
    """Divide each singular vector by its singular value."""
    adjust_scaling_factors: bool = True
    """Keep α/r the same where the rank has changed."""

    def __post_init__(self) -> None:
        for name, low, high in (("rho", 1, 1000), ("tau", 0, 1)):
            if not is_number(value := getattr(self, name)) or not low <= value <= high:
                raise UserError(f"EvaConfig({name}={short(value)}): expected a number from {low} to {high}")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"EvaConfig({name}={short(value)}): expected true or false")
        if not is_whole(self.label_mask_value):
            raise UserError(f"EvaConfig(label_mask_value={short(self.label_mask_value)}): expected a whole number")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # false for nan; whole numbers of any size compare
