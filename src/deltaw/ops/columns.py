"""DoRA's column scale: y = c∘u, in one pass each way.

    g = c∘dy        dc = Σ_t dy∘u = (Σ_t dy∘y)/c

The output stands in for u, which would be a second copy of it; where an entry of c is zero, u has to be kept.

Shapes: T rows, N columns. ``scale_reference`` and ``scale_backward_reference`` are the plain twins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import find

_SUM_ROWS = 64
"""Rows whose sums a kernel forms together."""


def scale(y_TN: Tensor, c_N: Tensor) -> Tensor:
    """c∘y, in y's own memory."""
    kernel = find("scale_columns", "ppii", y_TN)
    if kernel is None or not y_TN.is_contiguous():
        return scale_reference(y_TN, c_N)
    c_N = c_N.detach().float().contiguous()
    kernel(y_TN.data_ptr(), c_N.data_ptr(), *y_TN.shape)
    return y_TN


def scale_reference(y_TN: Tensor, c_N: Tensor) -> Tensor:
    """The plain twin of ``scale``."""
    return y_TN.mul_(c_N.to(y_TN.dtype))


def scale_backward(dy_TN: Tensor, y_TN: Tensor, c_N: Tensor) -> tuple[Tensor, Tensor]:
    """(g [T, N] in dy's dtype, Σ_t dy∘y [N] in float32; float64 for float64)."""
    kernel = find("scale_columns_backward", "pppppii", dy_TN)
    if kernel is None or y_TN.dtype != dy_TN.dtype or not (dy_TN.is_contiguous() and y_TN.is_contiguous()):
        return scale_backward_reference(dy_TN, y_TN, c_N)
    c_N = c_N.detach().float().contiguous()
    g_TN = torch.empty_like(dy_TN)
    sums = torch.empty(-(-dy_TN.shape[0] // _SUM_ROWS), dy_TN.shape[1])
    kernel(*(t.data_ptr() for t in (dy_TN, y_TN, c_N, g_TN, sums)), *dy_TN.shape)
    return g_TN, sums.sum(0)


def scale_backward_reference(dy_TN: Tensor, y_TN: Tensor, c_N: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of ``scale_backward``."""
    dtype = torch.promote_types(c_N.dtype, torch.float32)
    return dy_TN * c_N.to(dy_TN.dtype), (dy_TN * y_TN).sum(0, dtype=dtype)
