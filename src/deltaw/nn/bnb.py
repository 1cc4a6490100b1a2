"""bitsandbytes' 4-bit and 8-bit layers, as ``transformers`` loads them, as frozen weights.

A live layer is wrapped as it is: products go forward through the layer's own ``forward``, so that a row without an
adapter is to the bit what the quantised base gives, and back through its dequantised weight. bitsandbytes is never
imported from here on its own account: a model that has such layers has imported it already.

On processors with AVX512-BF16 bitsandbytes repacks a 4-bit weight in place as soon as it is used in evaluation mode.
What is repacked has no gradient any more, and coarser block scales (bfloat16): ``keep_differentiable`` prevents that.

Left out: quantising (``transformers`` or ``load_base`` do that) and 8-bit layers that keep 16-bit weights to train.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


def is_quantized(layer: nn.Module) -> bool:
    """Whether this is one of bitsandbytes' layers with a frozen 4-bit or 8-bit weight."""
    return is_4bit(layer) or is_8bit(layer)


def is_4bit(layer: nn.Module) -> bool:
    return _is_a(layer, "Linear4bit")


def is_8bit(layer: nn.Module) -> bool:
    return _is_a(layer, "Linear8bitLt") and not layer.state.has_fp16_weights  # type: ignore[union-attr]


def stands_for(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``transformers`` put this layer where one of that kind was; whatever it was, W lies as [N, K] in it."""
    source = getattr(layer, "source_cls", None)
    return isinstance(source, type) and issubclass(source, kind)


def num_elements(parameter: nn.Parameter) -> int:
    """Entries of the weight that a parameter stands for; a 4-bit one packs several into an element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that has a gradient, and bring back those that have left it already."""
    for layer in model.modules():
        if is_4bit(layer):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = layer.weight
            state = getattr(weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                weight.data, weight.quant_state = _unpacked(weight.data, state)


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what flows between layers: the input embedding's, for there it starts."""
    get = getattr(model, "get_input_embeddings", None)
    weights = [*(get().parameters() if get is not None else ()), *model.parameters()]
    return next((w.dtype for w in weights if w.is_floating_point()), torch.float32)


class BnbWeight:
    """The weight W [N, K] of one of bitsandbytes' layers as a ``FrozenWeight``."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        assert is_quantized(layer), type(layer)
        self.layer: Any = layer

    @property
    def out_features(self) -> int:
        return int(self.layer.out_features)

    @property
    def in_features(self) -> int:
        return int(self.layer.in_features)

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        layer = self.layer if bias_N is self.layer.bias else _with_bias(self.layer, bias_N)
        return layer(x_TK).to(x_TK.dtype)  # type: ignore[no-any-return]

    def multiply_transposed(self, dy_TN: Tensor) -> Tensor:
        return dy_TN @ self.dequantize().to(dy_TN.dtype)

    def dequantize(self) -> Tensor:
        """W in the dtype that it was quantised from (4-bit), or float32 (8-bit).

        Raises ``UserError`` for a layer that was made and not quantised yet.
        """
        return _dequantized_4bit(self.layer) if is_4bit(self.layer) else _dequantized_8bit(self.layer)


def _dequantized_4bit(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise UserError("a 4-bit layer whose weight is not quantised yet; move the model to its device first")
    codes = layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):  # dequantize_4bit would read the new layout as the old one
        codes, state = _unpacked(codes, state)
    return sys.modules["bitsandbytes.functional"].dequantize_4bit(codes, state)  # type: ignore[no-any-return]


def _unpacked(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """What was repacked for the processor in its first layout again, with the scales that the processor uses.

    bitsandbytes' own inverse leaves plain block scales transposed, and rounds doubly quantised ones once more.
    """
    scales_SN, state = state.absmax, copy.copy(state)
    state.original_nested = False
    codes, state = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = scales_SN.T.reshape(-1).to(torch.float32)
    return codes, state


def _dequantized_8bit(layer: Any) -> Tensor:
    """W_nk = q_nk·s_n/127: row-wise absolute maxima (Dettmers et al. 2022, arXiv:2208.07339, §2.1)."""
    scale_N = layer.state.SCB if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB
    if scale_N is None:
        raise UserError("an 8-bit layer whose weight is not quantised yet; move the model to its device first")
    return layer.weight.data.to(torch.float32) * (scale_N.to(torch.float32) / 127).unsqueeze(1)  # type: ignore[no-any-return]


def _with_bias(layer: nn.Module, bias_N: Tensor | None) -> nn.Module:
    """The same layer with another bias or none: shares its weight and its state."""
    other = copy.copy(layer)
    other.__dict__["_parameters"] = {**layer._parameters, "bias": None}
    if bias_N is not None:
        other.__dict__["_parameters"]["bias"] = bias_N
    return other


def _is_a(layer: nn.Module, name: str) -> bool:
    """Whether ``layer`` is bitsandbytes' class of this name, or a subclass that computes the same."""
    library = sys.modules.get("bitsandbytes")
    kind = getattr(getattr(library, "nn", None), name, None)
    return kind is not None and isinstance(layer, kind) and type(layer).forward is kind.forward
