"""Adapters as files and as dicts of tensors, and a model that takes them: PEFT's functions, and what they need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.peft_format import (
    WEIGHTS_NAME,
    Receipt,
    StoredAdapter,
    adapter_tensors,
    load_adapter,
    read_adapter,
    set_adapter_tensors,
)
from ..config import CONFIG_NAME, LoraConfig
from ..errors import UserError
from ..hub import resolve_file
from ..nn.parameters import AdaptedParameters
from ..nn.state import state_of
from ..nn.walk import adapted_layers, carriers
from .switching import Switching
from .vocabulary import take_embeddings, with_own_embeddings

HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments that find an adapter's files and mean nothing else."""

_PLACING = ("device_map", "max_memory", "torch_device", "torch_dtype", "dtype")
"""What scripts give along for the base: an adapter always goes where its layers are, and keeps its own dtype."""


class LoadResult(NamedTuple):
    """What ``load_state_dict`` would return; loading here is strict, so both are always empty."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read(model_id: str | Path, config: LoraConfig | None = None, **options: Any) -> StoredAdapter:
    """A stored adapter from a folder or hub id; ``config`` stands in for its own.

    Raises ``UserError`` for anything unreadable, and for options that neither find the files nor place a base.
    """
    options = {name: value for name, value in options.items() if name not in _PLACING}
    strange = [name for name, value in options.items() if name not in HUB_OPTIONS and value not in (None, False)]
    if strange:
        raise UserError(
            f"{strange[0]}={options[strange[0]]!r} is not supported when an adapter is loaded; leave it out"
        )
    adapter = read_adapter(_folder(model_id, **options))
    return adapter if config is None else dataclasses.replace(adapter, config=config)


def load(model: nn.Module, adapter: StoredAdapter, name: str, is_trainable: bool, as_float32: bool) -> Receipt:
    """Put a stored adapter into the model; one that will train gets float32 factors, if so wished."""
    receipt = load_adapter(model, with_own_embeddings(model, adapter), name, trainable=is_trainable)
    if is_trainable and as_float32:
        for _, layer in carriers(model):
            if name in layer.adapters:
                half = [p for p in layer.adapters[name].parameters() if p.dtype in (torch.float16, torch.bfloat16)]
                for parameter in half:
                    parameter.data = parameter.data.float()
    return receipt


def overwrite(model: nn.Module, adapter: StoredAdapter, name: str) -> Receipt:
    """Give an adapter of the model the values of a stored one, in place: optimisers keep their parameters.

    Raises ``UserError``, with the model as it was, where the two differ in their modules, ranks or scaling.
    """
    scalings = {n: layer.adapter(name).scaling for n, layer in adapted_layers(model) if name in layer.adapters}
    extras = [(n, m) for n, m in carriers(model) if isinstance(m, AdaptedParameters) and name in m.adapters]
    bare = {f"{n}.{parameter}": own.scaling for n, m in extras for parameter, own in m.factors(name)}
    other = [n for n, s in (scalings | bare).items() if not math.isclose(adapter.config.scaling_of(n), s)]
    other += [n for n in adapter.factors if n not in scalings and not bare]
    if adapter.config.trainable_token_indices != state_of(model).configs[name].trainable_token_indices:
        other.append("trainable_token_indices")
    if other:
        raise UserError(
            f"{adapter.path}: adapter {name!r} is in the model with other settings (first at {other[0]}); delete it "
            "first, or load this one under another name"
        )
    tensors = take_embeddings(model, load_peft_weights(adapter.path), name)
    set_adapter_tensors(model, tensors, name)
    dtype = next(iter(tensors.values())).dtype
    return Receipt(name, tuple(scalings), sum(t.numel() for t in tensors.values()), dtype, ())


def load_peft_weights(model_id: str | Path, device: str | None = None, **hub: Any) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of its file. Raises ``UserError`` for what isn't readable."""
    path = resolve_file(_folder(model_id, **hub), WEIGHTS_NAME)
    try:
        return load_file(path, device=device or "cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); get a complete copy") from None


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """One adapter's tensors under the keys of its file, as they are in memory, without gradients.

    Raises ``UserError`` for a name that the model doesn't have, and for a ``state_dict`` of someone else's making
    (of a sharded model, say).
    """
    if state_dict is not None:
        raise UserError("get_peft_model_state_dict(state_dict=…): tensors are read from the model; leave it out")
    return adapter_tensors(_known(model, adapter_name), adapter_name)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> LoadResult:
    """The inverse of ``get_peft_model_state_dict``, in place.

    Raises ``UserError``, with the model as it was, for keys or shapes that aren't the adapter's: none is left out.
    """
    set_adapter_tensors(_known(model, adapter_name), peft_model_state_dict, adapter_name)
    return LoadResult([], [])


def _known(model: nn.Module, name: str) -> nn.Module:
    inner = model.get_base_model() if isinstance(model, Switching) else model
    has = state_of(inner).configs
    if name not in has:
        raise UserError(f"no adapter {name!r} in this model (it has {', '.join(has) or 'none'}); load it first")
    return inner


def _folder(model_id: str | Path, **options: Any) -> Path:
    """The folder with the adapter's files: a local one, or the hub's snapshot with both files in it."""
    hub = {k: v for k, v in options.items() if v is not None}
    if Path(model_id).is_dir():
        return Path(model_id) / str(hub.get("subfolder", ""))
    config = resolve_file(model_id, CONFIG_NAME, **hub)
    try:
        return resolve_file(model_id, WEIGHTS_NAME, **hub).parent
    except UserError:
        return config.parent  # what an old version wrote as a pickle is looked for there
