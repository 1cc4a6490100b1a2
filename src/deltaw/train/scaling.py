"""Loss scaling, for bases in float16 (Micikevicius et al. 2018, arXiv:1710.03740, §3.2).

To float16, gradients below 6e-8 are zero. So backward starts from loss × scale, and the gradients are divided by the
scale again once they are float32. The scale is as large as it can be: halved when a gradient overflows (that step is
skipped), doubled after ``INTERVAL`` steps in a row without. It is a power of two: scaling rounds nothing.
"""

from __future__ import annotations

import torch
from torch import nn

FIRST = 2.0**16
INTERVAL = 2000


def is_needed(model: nn.Module) -> bool:
    """Whether gradients go through float16."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def adjusted(scale: float, num_good: int, *, is_finite: bool) -> tuple[float, int]:
    """(scale, steps in a row that it was good for), after one more step."""
    if not is_finite:
        return max(1.0, scale / 2), 0
    return (scale, num_good + 1) if num_good + 1 < INTERVAL else (scale * 2, 0)
