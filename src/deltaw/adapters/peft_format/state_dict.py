"""An adapter of a model as tensors under PEFT's keys, and back into one that is set up alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...nn.embedding import AdaptedEmbedding
from ...nn.parameters import AdaptedParameters
from ...nn.state import state_of
from ...nn.tokens import TokenLayer
from ...nn.walk import AdaptedLayer, adapted_layers, carriers, saved_modules
from .keys import PREFIX, ROWS, bias_key, factor_keys, parameter_paths


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, as they are in memory; factors and their start joined to rank 2r."""
    out: dict[str, Tensor] = {}
    for target, layer in adapted_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            key_a, key_b, key_m = _keys_of(target, layer)
            out[key_a], out[key_b] = (factor.detach() for factor in adapter.joined())
            if adapter.lora_magnitude_vector is not None:
                out[key_m] = adapter.lora_magnitude_vector.detach()
    for target, carrier in carriers(model):
        if isinstance(carrier, TokenLayer) and name in carrier.adapters:
            rows = carrier.adapter(name)
            if rows.target.modules[0] == target:  # tied modules use the same rows
                out[f"{PREFIX}{target}.{ROWS}"] = rows.trainable_tokens_delta.detach()
        elif isinstance(carrier, AdaptedParameters) and name in carrier.adapters:
            own = dict(carrier.factors(name))
            for parameter, path in parameter_paths(target, list(own)).items():
                key_a, key_b, _ = factor_keys(path)
                out[key_a], out[key_b] = own[parameter].lora_A.detach(), own[parameter].lora_B.detach()
    for target, module in saved_modules(model):
        if name in module.copies:
            out |= {f"{PREFIX}{target}.{k}": v.detach() for k, v in module.copies[name].state_dict().items()}
    biases = state_of(model).biases.get(name)
    if biases is not None:
        adapted = {target for target, _ in adapted_layers(model)}
        for bias, value in biases.values().items():
            out[bias_key(bias, is_adapted=bias.removesuffix(".bias") in adapted)] = value
    return out


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """The inverse of ``adapter_tensors``, bit for bit, into an adapter that is set up as the one they came from.

    Raises ``UserError``, with the model as it was, for other keys or shapes than the adapter has.
    """
    mine = adapter_tensors(model, name)
    strange = sorted(mine.keys() ^ tensors.keys()) or [k for k, t in mine.items() if t.shape != tensors[k].shape]
    if strange:
        raise UserError(f"{strange[0]}: not the tensor that adapter {name!r} has there; give such an adapter's")
    with torch.no_grad():
        for target, layer in adapted_layers(model):
            if name in layer.adapters and (start := layer.adapter(name).start) is not None:
                adapter = layer.adapter(name)
                key_a, key_b, _ = _keys_of(target, layer)
                for part, given in zip((adapter.lora_A, start[0]), tensors[key_a].chunk(2), strict=True):
                    part.copy_(given)
                for part, given in zip((adapter.lora_B, start[1]), tensors[key_b].chunk(2, dim=1), strict=True):
                    part.copy_(given if part is adapter.lora_B else -given)
                del mine[key_a], mine[key_b]
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])


def _keys_of(target: str, layer: AdaptedLayer) -> tuple[str, str, str]:
    return factor_keys(target, is_embedding=isinstance(layer, AdaptedEmbedding))
