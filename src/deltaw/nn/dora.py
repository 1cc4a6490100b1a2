"""DoRA's column scale: magnitude over the norm of the adapted weight (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    c_n = m_n / ‖W_n + s·B_n·A‖        one number per output row n, in float32

The norm is detached (their §4.3), so only m receives a gradient through c. A row without a weight (norm zero) is
left alone: c = m. The norm comes in closed form, without forming
W + sBA:

    ‖W_n + s·B_n·A‖² = ‖W_n‖² + 2s·Σ_r B_nr·(W·Aᵀ)_nr + s²·Σ_r (B·(A·Aᵀ))_nr·B_nr

‖W_n‖² never changes, W·Aᵀ is one frozen product with r rows, and A·Aᵀ is r × r. Of an adapter that isn't
trained the result is kept until A, B or W change: torch counts in-place changes of a tensor in ``_version``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.frozen import FrozenWeight
from .batch import current_batch

_ENTRIES_AT_A_TIME = 2**24
"""Entries of W that are cast to float32 together when ‖W_n‖² is taken: 64 MB, whether rows are short or as long as a
vocabulary."""


def row_norms_squared(weight: FrozenWeight) -> Tensor:
    """‖W_n‖² for every output row, float32 [N] (float64 where W is)."""
    with torch.inference_mode(False), torch.no_grad():  # kept for later forwards, which may want gradients
        dense = weight.dequantize()
        dtype = torch.promote_types(dense.dtype, torch.float32)
        num_rows = max(1, _ENTRIES_AT_A_TIME // dense.shape[1])
        return torch.cat([rows.to(dtype).square().sum(1) for rows in dense.split(num_rows)])


def adapted_norm(weight: FrozenWeight, norms_squared_N: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """‖W_n + s·B_n·A‖ for every output row [N], in ``norms_squared_N``'s dtype, detached."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(a_RK.device.type, enabled=False):
        dtype = norms_squared_N.dtype
        a, b = a_RK.to(dtype), b_NR.to(dtype)
        w_NK = weight.dequantize()  # not ``multiply``: 8-bit layers round what they are given
        wa_NR = (w_NK @ a_RK.to(w_NK.dtype).T).to(dtype)
        cross = (b * wa_NR).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (norms_squared_N + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


class NormCache:
    """``adapted_norm`` of one adapter in one layer, computed again only when a tensor behind it has changed.

    While the factors train nothing is kept, unless the batch says that changes are counted (``Batch.counts_changes``):
    fused optimisers change them without torch counting it. In training of ours the norm is computed once a step,
    however many micro-batches there are. Frozen ones must not be changed through ``.data``, which isn't counted either.
    """

    def __init__(self) -> None:
        self._base_of: _Seen | None = None
        self._norm_of: tuple[_Seen, _Seen, float] | None = None
        self._base = self._norm = torch.empty(0)

    def norm(
        self,
        weight: FrozenWeight,
        tensor_of_weight: Tensor,
        a_RK: Tensor,
        b_NR: Tensor,
        s: float,
        joined: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The norm for W as it is in ``tensor_of_weight``; ``joined`` gives the factors that it is of, where these are
        A and B with something frozen beside them."""
        if self._base_of is None or not self._base_of.is_still(tensor_of_weight):
            self._base, self._base_of = row_norms_squared(weight), _Seen(tensor_of_weight)
            self._norm_of = None
        of = self._norm_of
        if of is None or not (of[0].is_still(a_RK) and of[1].is_still(b_NR) and of[2] == s):
            norm_N = adapted_norm(weight, self._base, *(joined() if joined else (a_RK, b_NR)), s)
            self._norm, self._norm_of = norm_N.masked_fill_(norm_N == 0, 1), (_Seen(a_RK), _Seen(b_NR), s)
        facts = current_batch()
        if (a_RK.requires_grad or b_NR.requires_grad) and not (facts is not None and facts.counts_changes):
            self._norm_of = None
        return self._norm

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        """Copies and pickles start empty: they belong to other tensors."""
        return NormCache, ()


class _Seen:
    """A tensor as it was: which one, where, and how often changed."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = self._of(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        return self._tensor() is tensor and self._state == self._of(tensor)

    @staticmethod
    def _of(tensor: Tensor) -> tuple[object, ...]:
        version = None if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), version, tensor.dtype, tensor.device
