"""DoRA's column scale: magnitude over the norm of the adapted weight (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    c_n = m_n / ‖W_n + s·B_n·A‖        one number per output row n, in float32

The norm is detached (their §4.3), so only m receives a gradient through c. It comes in closed form, without forming
W + sBA:

    ‖W_n + s·B_n·A‖² = ‖W_n‖² + 2s·Σ_r B_nr·(W·Aᵀ)_nr + s²·Σ_r (B·(A·Aᵀ))_nr·B_nr

‖W_n‖² never changes, W·Aᵀ is one frozen product with r rows, and A·Aᵀ is r × r. The result is kept until A, B or W
change: torch counts in-place changes of a tensor in ``_version``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.frozen import FrozenWeight

_ROWS_AT_A_TIME = 4096
"""Rows of W that are cast to float32 together when ‖W_n‖² is taken."""


def row_norms_squared(weight: FrozenWeight) -> Tensor:
    """‖W_n‖² for every output row, float32 [N] (float64 where W is)."""
    dense = weight.dequantize()
    dtype = torch.promote_types(dense.dtype, torch.float32)
    return torch.cat([rows.to(dtype).square().sum(1) for rows in dense.split(_ROWS_AT_A_TIME)])


def adapted_norm(weight: FrozenWeight, norms_squared_N: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """‖W_n + s·B_n·A‖ for every output row [N], in ``norms_squared_N``'s dtype, detached."""
    with torch.no_grad():
        dtype = norms_squared_N.dtype
        a, b = a_RK.to(dtype), b_NR.to(dtype)
        wa_NR = weight.multiply(a_RK.to(weight.dequantize().dtype)).T.to(dtype)
        cross = (b * wa_NR).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (norms_squared_N + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


class NormCache:
    """``adapted_norm`` of one adapter in one layer, computed again only when a tensor behind it has changed."""

    def __init__(self) -> None:
        self._base_key: object = None
        self._key: object = None
        self._base: Tensor | None = None
        self._norm: Tensor | None = None

    def norm(self, weight: FrozenWeight, tensor_of_weight: Tensor, a_RK: Tensor, b_NR: Tensor, s: float) -> Tensor:
        base_key = _state(tensor_of_weight)
        if self._base is None or base_key != self._base_key:
            self._base, self._base_key = row_norms_squared(weight), base_key
        key = (base_key, _state(a_RK), _state(b_NR), s)
        if self._norm is None or key != self._key:
            self._norm, self._key = adapted_norm(weight, self._base, a_RK, b_NR, s), key
        return self._norm


def _state(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device
