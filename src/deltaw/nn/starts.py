"""Where training starts: one function an initialiser, chosen by PEFT's ``init_lora_weights``.

Every start but ``random`` makes B·A zero, so that step 0 is exactly the base model. Factors are drawn in float32
from torch's generator, on the CPU, so that a seed means the same everywhere.

Shapes: A [R, K], B [N, R].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Start = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""(rank, inputs, outputs) → (A, B)."""


def kaiming(rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A uniform in ±1/√K, B zero: the reference implementation's start and PEFT's default."""
    a_RK = torch.empty(rank, inputs)
    nn.init.kaiming_uniform_(a_RK, a=math.sqrt(5))
    return a_RK, torch.zeros(outputs, rank)


def gaussian(rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A normal with deviation 1/r, B zero (Hu et al. 2021, §4.1, with PEFT's deviation)."""
    return torch.randn(rank, inputs) / rank, torch.zeros(outputs, rank)


def random(rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Both factors as fresh linear layers would be: for tests, where B = 0 would prove nothing."""
    a_RK, _ = kaiming(rank, inputs, outputs)
    b_RN, _ = kaiming(outputs, rank, inputs)
    return a_RK, b_RN


def embedding(rank: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor]:
    """A zero, B normal: PEFT's start for embeddings."""
    return torch.zeros(rank, vocabulary), torch.randn(hidden, rank)


_BY_NAME: dict[bool | str, Start] = {True: kaiming, False: random, "gaussian": gaussian}


def start_for(init_lora_weights: bool | str) -> Start:
    """The initialiser that a (validated) config names."""
    return _BY_NAME[init_lora_weights]
