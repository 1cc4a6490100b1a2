"""Put a stored adapter into a model and say what was applied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...nn.embedding import AdaptedEmbedding
from ...nn.inject import inject
from ...nn.load import base_info
from ...nn.lowrank import LowRank
from ...nn.quantized_base import quantized_base
from ...nn.scope import find_extras
from ...nn.starts import Site, start_for
from ...nn.state import QuantizedBase, state_of
from ...nn.walk import AdaptedLayer, logical_modules, saved_modules
from .experts import fused
from .match import match_extras, match_factors, match_others
from .read import StoredAdapter, read_adapter

TAKEN_OFF = ("pissa", "olora", "loftq")
"""Starts that PEFT takes off the base's weight (or, LoftQ, changes it by): such files go with the changed base."""


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
    unknown, missing or of the wrong shape, and for an adapter whose recorded base is another one, or is quantised
    otherwise where it belongs to one quantisation (unless ``allow_other_base``).
    """
    stored = adapter if isinstance(adapter, StoredAdapter) else read_adapter(adapter)
    if not allow_other_base:
        _check_base(model, stored)
    modules = dict(logical_modules(model))
    with _about(stored.path):
        stored = fused(stored, modules, trainable=trainable)
        extras = find_extras(model, stored.config)
        stored, trained = match_extras(stored, extras, modules, copy=trainable)
        chosen = match_factors(model, stored, modules, extras.parameter_names)
        extra, ignored = match_others(stored, modules, chosen)

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
    if stored.provenance.quantized_base is not None:
        state_of(model).bound[name] = stored.provenance.quantized_base
    tensors = [t for parts in stored.factors.values() for t in parts.values()]
    tensors += [*trained.values(), *extra.values()]
    dtype = tensors[0].dtype if tensors else torch.float32
    changed = (*chosen, *extras.module_names)
    return Receipt(name, changed, sum(t.numel() for t in tensors), dtype, tuple(ignored))


def _check_base(model: nn.Module, stored: StoredAdapter) -> None:
    info, came = base_info(model), stored.provenance
    if came.quantized_base is not None:
        _check_quantized_base(model, stored, came.quantized_base)
        return  # that very base, whatever file it was read from
    if info is not None and came.base_sha256 is not None and info.sha256 != came.base_sha256:
        raise UserError(
            f"{stored.path} was trained on {came.base_name} (sha256 {came.base_sha256[:12]}…), this base is "
            f"{info.name} (sha256 {info.sha256[:12]}…); load that base, or allow another one (allow_other_base)"
        )


def _check_quantized_base(model: nn.Module, stored: StoredAdapter, wanted: QuantizedBase) -> None:
    found = quantized_base(model)
    if found is None or found.sha256 != wanted.sha256:
        this = "dense" if found is None else f"another quantised one ({found.method}, sha256 {found.sha256[:12]}…)"
        raise UserError(
            f"{stored.path} was started by LoftQ and makes good what quantising {stored.provenance.base_name} has lost "
            f"({wanted.method}, sha256 {wanted.sha256[:12]}…); this base is {this}: load that one "
            f"(--quantization {wanted.method}), or allow another (--allow-other-base, allow_other_base=True)"
        )


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What doesn't fit in here is this adapter's fault: the message begins with its folder."""
    try:
        yield
    except UserError as error:
        raise (error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")) from None


def _start_of_file(stored: StoredAdapter, layer: AdaptedLayer) -> tuple[Tensor, Tensor] | None:
    """(A₀, B₀) for a file that PEFT wrote without converting it: its A and B go with a base that lacks their start.

    PEFT finds the start again from the base's own weight, as is done here. Raises ``UserError`` where that can't be.
    """
    start = stored.config.init_lora_weights
    if not isinstance(start, str) or not start.startswith(TAKEN_OFF) or isinstance(layer, AdaptedEmbedding):
        return None
    if start not in ("pissa", "olora"):
        raise UserError(
            f"{stored.path}: init_lora_weights={start!r} changed its base, and how can't be found again; save it once "
            "more from PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    rank, scaling = stored.config.rank_of(layer.name), stored.config.scaling_of(layer.name)
    made = start_for(stored.config)(Site(name=layer.name, weight=layer.storage, rank=rank, scaling=scaling))
    return made.a_RK.to(layer.weight.device), made.b_NR.to(layer.weight.device)


def _placed(tensor: Tensor | None, device: torch.device, *, copy: bool) -> Tensor | None:
    """On the device; copied where it will be trained, since the file's pages are shared with whoever maps them."""
    return None if tensor is None else tensor.to(device, copy=copy)


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
