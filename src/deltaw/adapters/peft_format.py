"""PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``: the only place that knows their keys.

    base_model.model.{module}.lora_A.weight             [r, in]      lora_embedding_A without ".weight" [r, vocab]
    base_model.model.{module}.lora_B.weight             [out, r]     lora_embedding_B [hidden, r]
    base_model.model.{module}.lora_magnitude_vector     [out]        (DoRA)
    base_model.model.{module}.base_layer.bias           [out]        (trained biases; without base_layer elsewhere)
    base_model.model.{module}.{weight, bias …}                       (modules_to_save)
    base_model.model.{module}.token_adapter.trainable_tokens_delta   [tokens, hidden]
    base_model.model.{module}.lora_A.weight             [experts·r, in]     lora_B [out, r·experts]  (bare parameters)

Of several bare parameters in one module, the last has these keys, the one before it {module}.base_layer.lora_A.weight,
and so on inwards.

What this project adds (hashes of base and data, versions) stands in the safetensors header, where every reader
ignores what it doesn't know. Writing is atomic; reading maps the file and copies nothing that is only used.

Reading is strict both ways: a tensor that nothing takes, or a module whose tensor is missing, is an error that names
it. The well-known silent failure, a mismatched prefix that serves the bare base, can't happen here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CONFIG_NAME, MAX_CONFIG_BYTES, LoraConfig, read_config
from ..errors import UserError
from ..files import left_over, replace_files
from ..hub import resolve_file
from ..nn.embedding import AdaptedEmbedding
from ..nn.extras import Extras
from ..nn.inject import (
    AdaptedLayer,
    adapted_layers,
    bias_parameters,
    carriers,
    find_extras,
    head_name,
    inject,
    linear_names,
    logical_modules,
    saved_modules,
    state_of,
)
from ..nn.linear import AdaptedLinear
from ..nn.load import base_info
from ..nn.lowrank import LowRank
from ..nn.parameters import AdaptedParameters, ParameterShape
from ..nn.starts import Site, start_for
from ..nn.storage import frozen_weight, is_linear
from ..nn.tokens import TokenLayer
from ..targets import choose, saved_whole
from .tensors import read_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
"""What old versions of PEFT wrote; read as data only, never written."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
_DOUBLES = (".original_module.bias", ".modules_to_save.bias")
"""With ``bias="all"`` PEFT writes the bias of a module that is saved whole twice more, by the names of its wrapper."""

_ROWS = "token_adapter.trainable_tokens_delta"
_TAKEN_OFF = ("pissa", "olora", "loftq")
"""Starts that PEFT takes off the base's weight (or, LoftQ, changes it by): such files go with the changed base."""

_OWN_KEY = "deltaw"
MAX_NOTE_CHARS = 10_000
"""Under that key stand a few names, hashes and versions."""


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; empty for files of other tools."""

    base_name: str | None = None
    base_sha256: str | None = None
    data_sha256: str | None = None
    config_sha256: str | None = None
    """The config that was saved with these weights."""
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
    """The adapter's tensors under PEFT's keys, as they are in memory; factors and their start joined to rank 2r."""
    out: dict[str, Tensor] = {}
    for target, layer in adapted_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            key_a, key_b, key_m = _factor_keys(target, layer)
            out[key_a], out[key_b] = (factor.detach() for factor in adapter.joined())
            if adapter.lora_magnitude_vector is not None:
                out[key_m] = adapter.lora_magnitude_vector.detach()
    for target, carrier in carriers(model):
        if isinstance(carrier, TokenLayer) and name in carrier.adapters:
            rows = carrier.adapter(name)
            if rows.target.modules[0] == target:  # tied modules use the same rows
                out[f"{_PREFIX}{target}.{_ROWS}"] = rows.trainable_tokens_delta.detach()
        elif isinstance(carrier, AdaptedParameters) and name in carrier.adapters:
            own = dict(carrier.factors(name))
            for parameter, path in _parameter_paths(target, list(own)).items():
                out[f"{_PREFIX}{path}.lora_A.weight"] = own[parameter].lora_A.detach()
                out[f"{_PREFIX}{path}.lora_B.weight"] = own[parameter].lora_B.detach()
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
                key_a, key_b, _ = _factor_keys(target, layer)
                for part, given in zip((adapter.lora_A, start[0]), tensors[key_a].chunk(2), strict=True):
                    part.copy_(given)
                for part, given in zip((adapter.lora_B, start[1]), tensors[key_b].chunk(2, dim=1), strict=True):
                    part.copy_(given if part is adapter.lora_B else -given)
                del mine[key_a], mine[key_b]
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])


def _factor_keys(target: str, layer: AdaptedLayer) -> tuple[str, str, str]:
    """Keys of A, B and the magnitude of one layer."""
    kind, end = ("lora_embedding_", "") if isinstance(layer, AdaptedEmbedding) else ("lora_", ".weight")
    own = f"{_PREFIX}{target}."
    return f"{own}{kind}A{end}", f"{own}{kind}B{end}", f"{own}lora_magnitude_vector"


def _parameter_paths(module: str, parameters: Sequence[str]) -> dict[str, str]:
    """Where the factors of a module's bare parameters stand in the file."""
    return {p: module + depth * ".base_layer" for depth, p in enumerate(reversed(parameters))}


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
    config = _as_peft_wants(model, _joined(model, name)).to_json()
    provenance = Provenance(
        base_name=None if info is None else info.name,
        base_sha256=None if info is None else info.sha256,
        data_sha256=data_sha256,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        versions=_versions(),
    )
    metadata = {"format": "pt", _OWN_KEY: json.dumps(dataclasses.asdict(provenance))}
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
    tensors, texts = read_tensors(path)
    provenance = _provenance(texts)
    _check_one_save(path, config_path, provenance)
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
    return StoredAdapter(config_path.parent, config, factors, others, provenance, path.stat().st_size)


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
    with _about(stored.path):
        extras = find_extras(model, stored.config)
        stored, trained = _match_extras(stored, extras, modules, copy=trainable)
        chosen = _match(model, stored, modules, extras.parameter_names)
        extra, ignored = _match_others(stored, modules, chosen)

    def make(layer: AdaptedLayer) -> LowRank:
        parts = stored.factors[layer.name]
        on = layer.weight.device
        a, b, m = (_placed(parts.get(k), on, copy=trainable) for k in ("lora_A", "lora_B", "lora_magnitude_vector"))
        assert a is not None and b is not None
        scaling, dropout = stored.config.scaling_of(layer.name), float(stored.config.lora_dropout)
        start = _start_of_file(stored, layer)
        return LowRank(a, b, scaling=scaling, dropout=dropout, magnitude_N=m, start=start)

    inject(model, stored.config, name, make=make, chosen=chosen, trained=trained, trainable=trainable)
    _apply_others(model, name, extra)
    tensors = [t for parts in stored.factors.values() for t in parts.values()]
    tensors += [*trained.values(), *extra.values()]
    dtype = tensors[0].dtype if tensors else torch.float32
    changed = (*chosen, *extras.module_names)
    return Receipt(name, changed, sum(t.numel() for t in tensors), dtype, tuple(ignored))


def _start_of_file(stored: StoredAdapter, layer: AdaptedLayer) -> tuple[Tensor, Tensor] | None:
    """(A₀, B₀) for a file that PEFT wrote without converting it: its A and B go with a base that lacks their start.

    PEFT finds the start again from the base's own weight, as is done here. Raises ``UserError`` where that can't be.
    """
    start = stored.config.init_lora_weights
    if not isinstance(start, str) or not start.startswith(_TAKEN_OFF) or isinstance(layer, AdaptedEmbedding):
        return None
    if start not in ("pissa", "olora"):
        raise UserError(
            f"{stored.path}: init_lora_weights={start!r} changed its base, and how can't be found again; save it once "
            "more from PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    rank, scaling = stored.config.rank_of(layer.name), stored.config.scaling_of(layer.name)
    made = start_for(stored.config)(Site(name=layer.name, weight=layer.storage, rank=rank, scaling=scaling))
    return made.a_RK.to(layer.weight.device), made.b_NR.to(layer.weight.device)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What doesn't fit in here is this adapter's fault: the message begins with its folder."""
    try:
        yield
    except UserError as error:
        raise (error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")) from None


def _weights_file(folder: str | Path) -> Path:
    try:
        return resolve_file(folder, WEIGHTS_NAME)
    except UserError:
        try:
            return resolve_file(folder, PICKLED_NAME)
        except UserError:
            pass
        raise


def _match_extras(
    stored: StoredAdapter, extras: Extras, modules: dict[str, nn.Module], *, copy: bool
) -> tuple[StoredAdapter, dict[str, Tensor]]:
    """(what is left of the adapter, values for single rows and bare parameters as ``Extras.make`` takes them)."""
    factors, others = dict(stored.factors), dict(stored.others)
    found: list[tuple[str, Tensor | None, tuple[int, ...], torch.device]] = []
    strange: list[str] = []
    for module, parameters in extras.parameters.items():
        base = getattr(modules[module], "base_layer", modules[module])
        for parameter, path in _parameter_paths(module, parameters).items():
            name, parts, on = f"{module}.{parameter}", factors.pop(path, {}), base.get_parameter(parameter).device
            shape_a, shape_b = ParameterShape(base, parameter).of_factors(stored.config.rank_of(name))
            found.append((f"{name}.lora_A", parts.get("lora_A"), shape_a, on))
            found.append((f"{name}.lora_B", parts.get("lora_B"), shape_b, on))
            strange += [f"{name}.{part} not expected" for part in parts if part not in ("lora_A", "lora_B")]
    for target in extras.tokens:
        owner = target.modules[0]
        weight = getattr(modules[owner], "base_layer", modules[owner]).get_parameter("weight")
        shape = (len(target.indices), weight.shape[1])
        found.append((owner, others.pop(f"{owner}.{_ROWS}", None), shape, weight.device))
    problems = strange + [
        f"{name} missing" if tensor is None else f"{name} is {tuple(tensor.shape)} {tensor.dtype}, needed is {shape}"
        for name, tensor, shape, _ in found
        if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point()
    ]
    if problems:
        raise UserError(f"{stored.path}: does not fit this base: {'; '.join(problems[:4])}. Check the base model")
    trained = {name: tensor.to(on, copy=copy) for name, tensor, _, on in found if tensor is not None}
    return dataclasses.replace(stored, factors=factors, others=others), trained


def _match(
    model: nn.Module, stored: StoredAdapter, modules: dict[str, nn.Module], parameters: Sequence[str]
) -> list[str]:
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
        linear, head = linear_names(model), head_name(model)
        expected = choose(stored.config, list(modules), linear, head=head, parameters=parameters, strict=False)
        problems += [f"{name}: named by the config, without weights" for name in expected if name not in stored.factors]
        unnamed = sorted(stored.factors.keys() - expected)
        problems += [f"{name}: weights, but not named by the config" for name in unnamed]
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
    saved = [(owner, module) for owner, module in saved_modules(model) if name in module.copies]
    with torch.no_grad():
        for target, tensor in tensors.items():
            if biases is not None and target in biases.parameters:
                biases.parameters[target].copy_(tensor)
                continue
            for owner, module in saved:
                if target.startswith(f"{owner}."):
                    module.copies[name].state_dict()[target.removeprefix(f"{owner}.")].copy_(tensor)


def _check_base(model: nn.Module, stored: StoredAdapter) -> None:
    info, came = base_info(model), stored.provenance
    if info is not None and came.base_sha256 is not None and info.sha256 != came.base_sha256:
        raise UserError(
            f"{stored.path} was trained on {came.base_name} (sha256 {came.base_sha256[:12]}…), this base is "
            f"{info.name} (sha256 {info.sha256[:12]}…); load that base, or allow another one (allow_other_base)"
        )


def _check_one_save(path: Path, config_path: Path, came: Provenance) -> None:
    """``UserError`` where a save was cut off between its two renames: the weights' own config still waits beside.

    A config that merely differs was edited since, and may be.
    """

    def is_own(file: Path) -> bool:
        return hashlib.sha256(file.read_bytes()).hexdigest() == came.config_sha256

    if came.config_sha256 is not None and not is_own(config_path):
        for other in left_over(config_path):
            if other.stat().st_size <= MAX_CONFIG_BYTES and is_own(other):
                raise UserError(
                    f"{path}: its config is {other.name}, whose save was cut off before it became {CONFIG_NAME}; "
                    "rename it so, or save the adapter again"
                )


def _provenance(texts: Mapping[str, str]) -> Provenance:
    """Our own note in the header; a note that isn't ours, or damaged, is no note."""
    note = texts.get(_OWN_KEY, "")
    try:
        raw: Any = json.loads(note) if len(note) <= MAX_NOTE_CHARS else {}
        known = {f.name for f in dataclasses.fields(Provenance)}
        given = {k: v for k, v in raw.items() if k in known}
        versions = given.pop("versions", {})
        are_texts = all(isinstance(text, str | None) for text in [*given.values(), *versions.values()])
        return Provenance(**given, versions=versions) if are_texts else Provenance()
    except (json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        return Provenance()


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


_PEFT_VERSION = "0.21.2"
"""The version of PEFT whose format is written here."""


@cache  # finding them takes longer than writing a small adapter
def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("deltaw", "torch", "transformers")}


def _placed(tensor: Tensor | None, device: torch.device, *, copy: bool) -> Tensor | None:
    """On the device; copied where it will be trained, since the file's pages are shared with whoever maps them."""
    return None if tensor is None else tensor.to(device, copy=copy)
