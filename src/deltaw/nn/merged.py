"""What adapters are once they are merged: a plain layer that stands where the base's own layer stood.

    W' = W + Σᵢ ΔWᵢ                      plain adapters, ΔW = s·B·A
    W' = c∘(W + ΔW), c = m/‖W + ΔW‖      one DoRA adapter, row by row; the bias stands outside

computed in float32 (float64 where W or a factor is), some rows at a time, and cast once. The base's layer is never
written to: the stand-in has a weight of its own and shares everything else (bias, buffers, hooks), so the base's layer
can come back exactly as it was, and whatever W is tied to does not move.

Which adapters of a model are merged is ``adapters/merge.py``'s business. A new kind of adapted layer takes part with
one method, ``merged_layer(base, names)``.

Shapes: W [N, K], n of its rows at a time, A [R, K], B [N, R], magnitude m and scale c [N].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.frozen import DenseWeight
from ..ops.nf4 import dequantize
from . import bnb
from .lowrank import LowRank
from .quantized import QuantizedModule, dense_linear
from .storage import frozen_weight, is_linear

_BLOCK = 2**18
"""Entries of W that are computed at a time."""


def merged_weight(w_NK: Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """W' in W's dtype; a fresh tensor, laid out as W is. A DoRA adapter must be the only one (``activate`` sees to it).

    A few rows at a time: besides the result itself, no matrix of W's size is ever there.
    """
    m_N = adapters[0].lora_magnitude_vector
    pairs = [(adapter.scaling, *adapter.joined()) for adapter in adapters]
    dtypes = [w_NK.dtype, *(a_RK.dtype for _, a_RK, _ in pairs)]
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    factors = [(a_RK.to(dtype), scaling * b_NR.to(dtype)) for scaling, a_RK, b_NR in pairs]
    out_NK, num_rows = torch.empty_like(w_NK), max(1, _BLOCK // w_NK.shape[1])
    for start in range(0, len(w_NK), num_rows):
        own = slice(start, start + num_rows)
        deltas = (b_NR[own] @ a_RK for a_RK, b_NR in factors)
        total_nK = next(deltas)
        for delta_nK in deltas:
            total_nK.add_(delta_nK)
        total_nK.add_(w_NK[own])
        if m_N is not None:
            norm_n = torch.linalg.vector_norm(total_nK, dim=1)
            total_nK.mul_((m_N[own] / norm_n.masked_fill_(norm_n == 0, 1)).to(dtype)[:, None])
        out_NK[own] = total_nK
    return out_NK


def is_dense(layer: nn.Module) -> bool:
    """Whether a layer's weight is plain numbers: of linear layers those that are neither quantised nor packed."""
    if isinstance(layer, QuantizedModule):
        return False
    return not is_linear(layer) or isinstance(frozen_weight(layer), DenseWeight)


def dense_weight(layer: nn.Module) -> Tensor:
    """W [N, K] of a linear layer, or an embedding's table.

    float32 out of any other storage than a dense one, to be cast when it is known to what.
    """
    if isinstance(layer, QuantizedModule):
        return dequantize(layer.quantized, torch.float32)
    w_NK = layer.weight if isinstance(layer, nn.Embedding) else frozen_weight(layer).dequantize()
    return w_NK if is_dense(layer) else w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))


def with_weight(layer: nn.Module, w_NK: Tensor) -> nn.Module:
    """A linear layer that is ``layer`` with another W: dense, whatever storage ``layer`` has; the bias is shared."""
    if isinstance(layer, QuantizedModule):
        return layer.as_dense(w_NK)
    storage = frozen_weight(layer)
    if isinstance(storage, DenseWeight):
        return twin(layer, w_NK.T.contiguous() if storage.transposed else w_NK)
    is_conv1d = bnb.stands_for(layer, Conv1D)
    return dense_linear(w_NK, layer.bias, is_conv1d=is_conv1d).train(layer.training)  # type: ignore[arg-type]


def twin(layer: nn.Module, weight: Tensor) -> nn.Module:
    """``layer`` with another ``weight``, sharing all the rest with it."""
    if isinstance(layer, QuantizedModule):
        return layer.as_dense(weight)
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters)
    other.__dict__.pop("forward", None)  # one of its own (accelerate's hooks set such) computes with the old weight
    other.weight = nn.Parameter(weight, requires_grad=False)
    return other


def follow(layer: nn.Module, stand_in: nn.Module) -> None:
    """Take ``layer`` to where its stand-in has gone meanwhile: mode, device and dtype of what the two don't share."""
    layer.train(stand_in.training)
    theirs = dict(stand_in.named_parameters())
    device = next(iter([*theirs.values(), *stand_in.buffers()])).device
    if any(tensor.device != device for tensor in [*layer.parameters(), *layer.buffers()]):
        layer.to(device)
    for name, parameter in layer.named_parameters():
        now = theirs.get(name, parameter)
        if parameter.is_floating_point() and now.dtype != parameter.dtype:
            parameter.data = parameter.data.to(now.dtype)
