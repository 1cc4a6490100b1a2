"""How a layer of a model becomes a frozen weight: one rule for each kind of layer.

The layer itself is kept whole under the adapter (``base_layer``), so that restoring a model is putting it back.
A new storage is one more entry here and nothing anywhere else.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..ops.frozen import DenseWeight, FrozenWeight
from ..ops.quantized import QuantizedWeight
from . import bnb
from .quantized import QuantizedLinear


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x·Wᵀ + b in a storage that we know."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # torch's own attention reads its weight and never calls it
        return False
    is_dense = type(layer) in (nn.Linear, Conv1D) or (isinstance(layer, nn.Linear) and _forward_is(layer, nn.Linear))
    return is_dense or isinstance(layer, QuantizedLinear) or bnb.is_quantized(layer)


def frozen_weight(layer: nn.Module) -> FrozenWeight:
    """The layer's W [out, in] for the two frozen products; reads the live parameter, so ``.to(…)`` is seen."""
    assert is_linear(layer), type(layer)
    if isinstance(layer, QuantizedLinear):
        return QuantizedWeight(layer.quantized)
    if bnb.is_quantized(layer):
        return bnb.BnbWeight(layer)
    return DenseWeight(layer.weight, transposed=isinstance(layer, Conv1D))  # type: ignore[arg-type]


def _forward_is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """A subclass that only renames; one with a forward of its own computes something that we don't know."""
    return type(layer).forward is kind.forward
