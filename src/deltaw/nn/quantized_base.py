"""A quantised base as a whole: its identity, and the dense weights that it was made from.

An adapter that was started by LoftQ makes good what quantising this base has lost, and would make another one worse.
It therefore carries the SHA-256 of all the base's codes and scales, layer by layer in the order of their names: equal
for this project's layers and bitsandbytes' live ones where these hold the same.

Left out: which adapters are so bound (``AdapterState.bound``), and what is done about it (``adapters/peft_format``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..ops.nf4 import Quantized, QuantizedScales
from ..ops.quantized import METHODS, Method
from . import bnb
from .load import base_info, weights_folder
from .quantized import TiedHead
from .state import QuantizedBase, state_of
from .walk import AdaptedLayer, base_of, logical_modules

_INDEX = "model.safetensors.index.json"


def quantized_base(model: nn.Module) -> QuantizedBase | None:
    """Identity of a model's 4-bit weights, whatever adapters it has; None where it has none.

    Takes about as long as reading them: a second for three gigabytes.
    """
    weights = sorted(_quantized(model), key=lambda pair: pair[0])
    if not weights:
        return None
    digest = hashlib.sha256()
    for name, q in weights:
        digest.update(json.dumps([name, list(q.shape), q.kind, q.block_size, _is_double(q)]).encode())
        for tensor in _tensors(q):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    q = weights[0][1]
    method = Method(kind=q.kind, block_size=q.block_size, double=_is_double(q))
    name = next((name for name, known in METHODS.items() if known == method), str(method))
    return QuantizedBase(digest.hexdigest(), name)


def original_of(model: nn.Module, layer: AdaptedLayer) -> Callable[[], Tensor]:
    """What reads a layer's W [N, K] again from the dense checkpoint that ``load_base`` quantised.

    Nothing is read, or looked for, before it is called. It raises ``UserError`` where there is no such checkpoint, or
    where it doesn't hold that weight in this shape.
    """
    return partial(_read, model, layer)


def _quantized(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """(name, weight) of all that is stored in 4 bits, merged or not; what is tied counts once."""
    originals = state_of(model).originals
    for name, module in logical_modules(model):
        layer = originals.get(name, base_of(module))
        found = getattr(layer, "quantized", None)
        if isinstance(found, Quantized) and not isinstance(layer, TiedHead):
            yield name, found
        elif bnb.is_4bit(layer):
            yield name, _of_bitsandbytes(layer)


def _of_bitsandbytes(layer: Any) -> Quantized:
    state = layer.weight.quant_state
    scales: Tensor | QuantizedScales = state.absmax
    if state.nested:
        scales = QuantizedScales(codes=state.absmax, absmax=state.state2.absmax, offset=state.offset)
    return Quantized(
        packed=layer.weight.data,
        scales=scales,
        shape=torch.Size(state.shape),
        dtype=state.dtype,
        kind=state.quant_type,
        block_size=state.blocksize,
    )


def _is_double(q: Quantized) -> bool:
    return isinstance(q.scales, QuantizedScales)


def _tensors(q: Quantized) -> Iterator[Tensor]:
    yield q.packed
    if isinstance(q.scales, QuantizedScales):
        yield from (q.scales.codes, q.scales.absmax, q.scales.offset)
    else:
        yield q.scales


def _is_quantised_on_disk(folder: Path) -> bool:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False


def _read(model: nn.Module, layer: AdaptedLayer) -> Tensor:
    info = base_info(model)
    if info is None or (info.gguf is None and _is_quantised_on_disk(info.folder)):
        what = "this base" if info is None else f"{info.name} is stored in 4 bits already, and"
        raise UserError(
            f"init_lora_weights='loftq': {what} doesn't say what {layer.name} was quantised from; load the dense "
            "checkpoint with --quantization nf4 (load_base(…, quantization='nf4')), or choose another start"
        )
    folder = weights_folder(info)
    key, file = _find(folder, f"{layer.name}.weight")
    try:
        with safe_open(file, framework="pt") as tensors:
            w: Tensor = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {key} can't be read again ({error}); get a complete copy") from None
    w_NK = w.T if getattr(layer.base_layer, "is_conv1d", False) else w
    shape = (layer.storage.out_features, layer.storage.in_features)
    if tuple(w_NK.shape) != shape:
        raise UserError(f"{folder}: {key} is {tuple(w_NK.shape)}, and the layer {shape}; load the base it came from")
    return w_NK


def _find(folder: Path, wanted: str) -> tuple[str, Path]:
    """(key, file) of a tensor; checkpoints have some prefix more or less than the model. ``UserError`` for none."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        if (folder / _INDEX).is_file():
            places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        else:
            places = {}
            for file in files:
                with safe_open(file, framework="pt") as tensors:
                    places |= dict.fromkeys(tensors.keys(), file.name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights can't be read again ({error}); get a complete copy") from None
    parts = wanted.split(".")
    tails = [".".join(parts[i:]) for i in range(min(3, len(parts) - 2))]
    for tail in tails:
        key = next((key for key in places if key == tail or key.endswith(f".{tail}")), None)
        if key is not None:
            return key, folder / places[key]
    raise UserError(
        f"init_lora_weights='loftq': {folder} holds no {wanted} to compare the quantised one with (it has "
        f"{', '.join(list(places)[:3]) or 'no safetensors'} …); choose another start"
    )
