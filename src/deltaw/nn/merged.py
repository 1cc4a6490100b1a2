"""What adapters are once they are merged: a plain layer that stands where the base's own layer stood.

    W' = W + Σᵢ ΔWᵢ                      plain adapters, ΔW = s·B·A
    W' = c∘(W + ΔW), c = m/‖W + ΔW‖      one DoRA adapter, row by row; the bias stands outside

computed in float32 (float64 where W or a factor is) and cast once. The base's layer is never written to: the stand-in
has a weight of its own and shares everything else (bias, buffers, hooks), so the base's layer can come back exactly as
it was, and whatever W is tied to does not move.

Which adapters of a model are merged is ``adapters/merge.py``'s business. A new kind of adapted layer takes part with
one method, ``merged_layer(base, names)``.

Shapes: W [N, K], magnitude m and scale c [N].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.frozen import DenseWeight
from ..ops.nf4 import dequantize
from .lowrank import LowRank
from .quantized import QuantizedModule
from .storage import frozen_weight, is_linear


def merged_weight(w_NK: Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """W' in W's dtype; a fresh tensor. A DoRA adapter must be the only one (``activate`` sees to it)."""
    deltas = (adapter.delta() for adapter in adapters)
    total = next(deltas)
    total = total.to(torch.promote_types(total.dtype, w_NK.dtype))
    for delta in deltas:  # one at a time: no more than two dense matrices of this layer at once
        total = total.to(torch.promote_types(total.dtype, delta.dtype)).add_(delta)
    total.add_(w_NK)
    m_N = adapters[0].lora_magnitude_vector
    if m_N is not None:
        norm_N = torch.linalg.vector_norm(total, dim=1)
        total.mul_((m_N / norm_N.masked_fill_(norm_N == 0, 1)).to(total.dtype)[:, None])
    return total.to(w_NK.dtype)


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
    dense = nn.Linear(storage.in_features, storage.out_features, bias=False, device="meta", dtype=w_NK.dtype)
    dense.weight = nn.Parameter(w_NK, requires_grad=False)
    dense.bias = layer.bias  # type: ignore[assignment]
    return dense.train(layer.training)


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
