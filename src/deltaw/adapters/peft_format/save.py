"""Write an adapter of a model as PEFT's two files, both or neither."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ...config import CONFIG_NAME, LoraConfig
from ...errors import UserError
from ...files import replace_files
from ...nn.load import base_info
from ...nn.state import state_of
from ...nn.walk import adapted_layers
from .keys import WEIGHTS_NAME
from .provenance import Provenance, header_of, versions_in_use
from .read import StoredAdapter
from .state_dict import adapter_tensors

_PEFT_VERSION = "0.21.2"
"""The version of PEFT whose format is written here."""


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, data_sha256: str | None = None
) -> Path:
    """Write the adapter as PEFT's two files, both or neither; returns the folder.

    Raises ``UserError`` for a name that the model doesn't have, and where there can be no such folder.
    """
    state = state_of(model)
    if name not in state.configs:
        raise UserError(f"no adapter {name!r} in this model (it has {', '.join(state.configs) or 'none'})")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there ({error}); give another") from None
    # Contiguous copies: safetensors refuses tensors that share memory or are views.
    tensors = {k: v.to("cpu", copy=True).contiguous() for k, v in adapter_tensors(model, name).items()}
    info, bound = base_info(model), state.bound.get(name)
    provenance = Provenance(
        base_name=None if info is None else info.name,
        base_sha256=None if info is None else info.sha256,
        data_sha256=data_sha256,
        quantized_sha256=bound.sha256 if bound else None,
        quantization=bound.method if bound else None,
        versions=versions_in_use(),
    )
    _write(path, tensors, _as_peft_wants(model, _joined(model, name)), provenance)
    return path


def write_adapter(adapter: StoredAdapter, folder: str | Path) -> Path:
    """The inverse of ``read_adapter``, without any model: tensors under the keys that they came by, and the config.

    Returns the folder, which must exist. The provenance is the adapter's own, with the hash of this config.
    """
    named = {f"{module}.{part}": t for module, parts in adapter.factors.items() for part, t in parts.items()}
    named |= adapter.others
    tensors = {adapter.keys[name]: t.to("cpu", copy=True).contiguous() for name, t in named.items()}
    _write(Path(folder), tensors, adapter.config, adapter.provenance)
    return Path(folder)


def _write(folder: Path, tensors: Mapping[str, Tensor], adapter_config: LoraConfig, provenance: Provenance) -> None:
    config = adapter_config.to_json()
    provenance = dataclasses.replace(provenance, config_sha256=hashlib.sha256(config.encode()).hexdigest())
    metadata = {"format": "pt"} | header_of(provenance)
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_NAME: lambda scratch: save_file(dict(tensors), scratch, metadata=metadata),
        CONFIG_NAME: lambda scratch: scratch.write_text(config, encoding="utf-8"),
    }
    replace_files(folder, writers)


def _joined(model: nn.Module, name: str) -> LoraConfig:
    """The config that means ``adapter_tensors``: rank 2r at the same scaling where factors stand beside their start."""
    config = state_of(model).configs[name]
    # No start has anything to say once training has begun, and PEFT's would change the base while loading.
    config = dataclasses.replace(config, init_lora_weights=True, loftq_config={}, eva_config=None)
    layers = {target: layer.adapter(name) for target, layer in adapted_layers(model) if name in layer.adapters}
    if all(adapter.start is None for adapter in layers.values()):
        return config
    more: float = math.sqrt(2) if config.use_rslora else 2
    plain = [target for target, adapter in layers.items() if adapter.start is None]  # embeddings
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={target: config.rank_of(target) for target in plain}
        | {key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={target: config.alpha_of(target) for target in plain}
        | {key: more * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _as_peft_wants(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with what PEFT expects filled in: the base's name, a version, inference mode."""
    info = base_info(model)
    name = config.base_model_name_or_path or (info.name if info else getattr(model, "name_or_path", None)) or None
    version = config.peft_version or _PEFT_VERSION
    return dataclasses.replace(config, base_model_name_or_path=name, peft_version=version, inference_mode=True)
