"""PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``: the only place that knows their keys.

    base_model.model.{module}.lora_A.weight             [r, in]      lora_embedding_A without ".weight" [r, vocab]
    base_model.model.{module}.lora_B.weight             [out, r]     lora_embedding_B [hidden, r]
    base_model.model.{module}.lora_magnitude_vector     [out]        (DoRA)
    base_model.model.{module}.base_layer.bias           [out]        (trained biases; without base_layer elsewhere)
    base_model.model.{module}.{weight, bias …}                       (modules_to_save)

What this project adds (hashes of base and data, versions) stands in the safetensors header, where every reader
ignores what it doesn't know. Writing is atomic; reading maps the file and copies nothing that is only used.

Reading is strict both ways: a tensor that nothing takes, or a module whose tensor is missing, is an error that names
it. The well-known silent failure, a mismatched prefix that serves the bare base, can't happen here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CONFIG_NAME, LoraConfig, read_config, resolve_file
from ..errors import UserError
from ..files import replace_files
from ..nn.embedding import AdaptedEmbedding
from ..nn.inject import (
    AdaptedLayer,
    adapted_layers,
    bias_parameters,
    head_name,
    inject,
    linear_names,
    logical_modules,
    saved_modules,
    state_of,
)
from ..nn.linear import AdaptedLinear
from ..nn.load import base_info, first_line
from ..nn.lowrank import LowRank
from ..nn.storage import frozen_weight, is_linear
from ..targets import choose, saved_whole

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
"""What old versions of PEFT wrote; read with torch's weights-only unpickler, never written."""

MAX_HEADER_BYTES = 64 * 2**20
"""A header of this size would name half a million tensors."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
_DOUBLES = (".original_module.bias", ".modules_to_save.bias")
"""With ``bias="all"`` PEFT writes the bias of a module that is saved whole twice more, by the names of its wrapper."""

_OWN_KEY = "deltaw"


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; empty for files of other tools."""

    base_name: str | None = None
    base_sha256: str | None = None
    data_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: read, sorted by module, not yet matched with any model."""

    path: Path
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]]
    """module → {A, B, magnitude} under the names of ``LowRank``'s parameters."""
    others: dict[str, Tensor]
    """Everything else (biases, modules_to_save), by name in the model without adapters."""
    provenance: Provenance
    num_bytes: int
    """Size of the file with the tensors."""


@dataclass(frozen=True)
class Receipt:
    """What loading an adapter did."""

    name: str
    modules: tuple[str, ...]
    """Modules that got the adapter."""
    num_parameters: int
    dtype: torch.dtype
    ignored: tuple[str, ...]
    """Tensors that were not needed because the base already holds the same values."""

    def __str__(self) -> str:
        text = f"{self.name}: {self.num_parameters:,} parameters on {len(self.modules)} modules"
        return text + (f"; not needed: {', '.join(self.ignored)}" if self.ignored else "")


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, as they are in memory."""
    out: dict[str, Tensor] = {}
    for target, layer in adapted_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            kind, end = ("lora_embedding_", "") if isinstance(layer, AdaptedEmbedding) else ("lora_", ".weight")
            out[f"{_PREFIX}{target}.{kind}A{end}"] = adapter.lora_A.detach()
            out[f"{_PREFIX}{target}.{kind}B{end}"] = adapter.lora_B.detach()
            if adapter.lora_magnitude_vector is not None:
                out[f"{_PREFIX}{target}.lora_magnitude_vector"] = adapter.lora_magnitude_vector.detach()
    for target, module in saved_modules(model):
        if name in module.copies:
            out |= {f"{_PREFIX}{target}.{k}": v.detach() for k, v in module.copies[name].state_dict().items()}
    biases = state_of(model).biases.get(name)
    if biases is not None:
        adapted = {target for target, _ in adapted_layers(model)}
        for bias, value in biases.values().items():
            owner = bias.removesuffix(".bias")
            out[f"{_PREFIX}{owner}.base_layer.bias" if owner in adapted else f"{_PREFIX}{bias}"] = value
    return out


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
    info = base_info(model)
    provenance = Provenance(
        base_name=None if info is None else info.name,
        base_sha256=None if info is None else info.sha256,
        data_sha256=data_sha256,
        versions=_versions(),
    )
    metadata = {"format": "pt", _OWN_KEY: json.dumps(dataclasses.asdict(provenance))}
    config = _as_peft_wants(model, state.configs[name]).to_json()
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_NAME: lambda scratch: save_file(tensors, scratch, metadata=metadata),
        CONFIG_NAME: lambda scratch: scratch.write_text(config, encoding="utf-8"),
    }
    replace_files(path, writers)
    return path


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter's files (a folder or hub id) without any model.

    Raises ``UserError`` naming the file and the reason for whatever is missing, damaged, hostile or not LoRA.
    """
    config_path = resolve_file(folder, CONFIG_NAME)
    config = read_config(config_path)
    path = _weights_file(folder)
    tensors, metadata = _read_safetensors(path) if path.name == WEIGHTS_NAME else (_read_pickled(path), {})
    strange = [key for key in tensors if not key.startswith(_PREFIX)]
    if strange:
        raise UserError(f"{path}: keys must start with {_PREFIX!r}; found {', '.join(strange[:3])}")
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(_DOUBLES):
            continue
        own = key.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(own)
        if match:
            place, name = factors.setdefault(match["module"], {}), match["part"].replace("embedding_", "")
        else:
            place, name = others, own.replace(".base_layer.", ".")
        if name in place:
            raise UserError(f"{path}: {key} stands for the same tensor as another key; get a sound copy")
        place[name] = tensor
    return StoredAdapter(config_path.parent, config, factors, others, _provenance(metadata), path.stat().st_size)


def load_adapter(
    model: nn.Module,
    adapter: StoredAdapter | str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    allow_other_base: bool = False,
) -> Receipt:
    """Put a stored adapter into the model under ``name``, make it active, and say what was applied.

    Weights keep the dtype that they came in. Raises ``UserError``, with the model as it was, for tensors that are
    unknown, missing or of the wrong shape, and for an adapter whose recorded base is another one (unless
    ``allow_other_base``).
    """
    stored = adapter if isinstance(adapter, StoredAdapter) else read_adapter(adapter)
    if not allow_other_base:
        _check_base(model, stored)
    modules = dict(logical_modules(model))
    chosen = _match(model, stored, modules)
    extra, ignored = _match_others(stored, modules, chosen)

    def make(layer: AdaptedLayer) -> LowRank:
        parts = stored.factors[layer.name]
        on = layer.weight.device
        a, b, m = (_placed(parts.get(k), on, copy=trainable) for k in ("lora_A", "lora_B", "lora_magnitude_vector"))
        assert a is not None and b is not None
        scaling, dropout = stored.config.scaling_of(layer.name), float(stored.config.lora_dropout)
        return LowRank(a, b, scaling=scaling, dropout=dropout, magnitude_N=m)

    inject(model, stored.config, name, make=make, chosen=chosen, trainable=trainable)
    _apply_others(model, name, extra)
    tensors = [t for parts in stored.factors.values() for t in parts.values()] + list(extra.values())
    dtype = tensors[0].dtype if tensors else torch.float32
    return Receipt(name, tuple(chosen), sum(t.numel() for t in tensors), dtype, tuple(ignored))


def _weights_file(folder: str | Path) -> Path:
    try:
        return resolve_file(folder, WEIGHTS_NAME)
    except UserError:
        try:
            return resolve_file(folder, PICKLED_NAME)
        except UserError:
            pass
        raise


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """``adapter_model.bin``, as data only: a pickle that would run code is refused by torch."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises whatever a damaged byte leads it to
        raise UserError(f"{path}: not readable as tensors only: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors, found {type(tensors).__name__}")
    return {str(key): tensor for key, tensor in tensors.items()}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if length > min(MAX_HEADER_BYTES, size):
        raise UserError(f"{path}: not a safetensors file (its header claims {length:,} bytes); get a complete copy")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); get a complete copy") from None


def _match(model: nn.Module, stored: StoredAdapter, modules: dict[str, nn.Module]) -> list[str]:
    """Modules of the model that the adapter's factors belong to; every mismatch in one error."""
    problems: list[str] = []
    for name, parts in stored.factors.items():
        module = modules.get(name)
        needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if stored.config.use_dora else set())
        if module is None:
            problems.append(f"{name}: the model has no such module")
        elif missing := needed - parts.keys():
            problems.append(f"{name}: {', '.join(sorted(missing))} missing")
        elif unknown := parts.keys() - needed:
            problems.append(f"{name}: {', '.join(sorted(unknown))} not expected (use_dora is false)")
        else:
            problems += _misfits(name, parts, module, stored.config.rank_of(name))
    expected: list[str] = []
    if not problems:  # names are only worth comparing when the modules exist
        expected = choose(stored.config, list(modules), linear_names(model), head=head_name(model), strict=False)
        problems += [f"{name}: named by the config, without weights" for name in expected if name not in stored.factors]
        problems += [f"{name}: weights, but not named by the config" for name in stored.factors if name not in expected]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise UserError(f"{stored.path}: does not fit this base: {'; '.join(problems[:4])}{more}. Check the base model")
    return expected


def _misfits(name: str, parts: dict[str, Tensor], module: nn.Module, rank: int) -> list[str]:
    if not (is_linear(module) or isinstance(module, AdaptedLinear | AdaptedEmbedding | nn.Embedding)):
        return [f"{name}: {type(module).__name__} can't be adapted"]
    if isinstance(module, nn.Embedding | AdaptedEmbedding):
        outputs, inputs = module.embedding_dim, module.num_embeddings
    else:
        storage = module.storage if isinstance(module, AdaptedLinear) else frozen_weight(module)
        outputs, inputs = storage.out_features, storage.in_features
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude_vector": (outputs,)}
    return [
        f"{name}.{part} is {tuple(tensor.shape)} {tensor.dtype}, this base with r={rank} needs {wanted[part]}"
        for part, tensor in parts.items()
        if tuple(tensor.shape) != wanted[part] or not tensor.is_floating_point()
    ]


def _match_others(
    stored: StoredAdapter, modules: dict[str, nn.Module], chosen: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors to apply, tensors that only repeat the base): biases and modules_to_save; anything else is an error."""
    apply: dict[str, Tensor] = {}
    ignored: list[str] = []
    saved = saved_whole(stored.config, modules)
    own: dict[str, Tensor] = {}
    for module in saved:
        original = getattr(modules[module], "base_layer", modules[module])
        own |= {f"{module}.{key}": tensor for key, tensor in original.state_dict().items()}
    own |= bias_parameters(modules, chosen, saved, stored.config.bias)
    problems = [f"{name} missing" for name in own if name not in stored.others]
    for name, tensor in stored.others.items():
        owner, _, attribute = name.rpartition(".")
        base = modules.get(owner)
        current = own.get(name, None if base is None else getattr(getattr(base, "base_layer", base), attribute, None))
        if not isinstance(current, Tensor):
            problems.append(f"{name} (the model has no such tensor)")
        elif current.shape != tensor.shape or current.is_floating_point() != tensor.is_floating_point():
            given, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, current))
            problems.append(f"{name} is {given}, in this base {wanted}")
        elif name in own:
            apply[name] = tensor
        elif torch.equal(current.to(tensor), tensor):
            ignored.append(name)
        else:
            problems.append(f"{name} (trained, but neither in modules_to_save nor one of the config's biases)")
    if problems:
        raise UserError(f"{stored.path}: tensors that this base can't take: {'; '.join(problems[:4])}")
    return apply, ignored


def _apply_others(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    biases = state_of(model).biases.get(name)
    with torch.no_grad():
        for target, tensor in tensors.items():
            if biases is not None and target in biases.parameters:
                biases.parameters[target].copy_(tensor)
                continue
            for owner, module in saved_modules(model):
                if target.startswith(f"{owner}.") and name in module.copies:
                    module.copies[name].state_dict()[target.removeprefix(f"{owner}.")].copy_(tensor)


def _check_base(model: nn.Module, stored: StoredAdapter) -> None:
    info, came = base_info(model), stored.provenance
    if info is not None and came.base_sha256 is not None and info.sha256 != came.base_sha256:
        raise UserError(
            f"{stored.path} was trained on {came.base_name} (sha256 {came.base_sha256[:12]}…), this base is "
            f"{info.name} (sha256 {info.sha256[:12]}…); load that base, or allow another one (allow_other_base)"
        )


def _provenance(metadata: Mapping[str, str]) -> Provenance:
    """Our own note in the header; a note that isn't ours, or damaged, is no note."""
    try:
        raw: Any = json.loads(metadata.get(_OWN_KEY, "{}"))
        known = {f.name for f in dataclasses.fields(Provenance)}
        given = {k: v for k, v in raw.items() if k in known}
        hashes = [given.get(name) for name in ("base_name", "base_sha256", "data_sha256")]
        return Provenance(**given) if all(isinstance(text, str | None) for text in hashes) else Provenance()
    except (json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        return Provenance()


def _as_peft_wants(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with what PEFT expects filled in: the base's name, a version, inference mode."""
    info = base_info(model)
    name = config.base_model_name_or_path or (info.name if info else getattr(model, "name_or_path", None)) or None
    version = config.peft_version or _PEFT_VERSION
    return dataclasses.replace(config, base_model_name_or_path=name, peft_version=version, inference_mode=True)


_PEFT_VERSION = "0.21.2"
"""The version of PEFT whose format is written here."""


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("deltaw", "torch", "transformers")}


def _placed(tensor: Tensor | None, device: torch.device, *, copy: bool) -> Tensor | None:
    """On the device; copied where it will be trained, since the file's pages are shared with whoever maps them."""
    return None if tensor is None else tensor.to(device, copy=copy)
