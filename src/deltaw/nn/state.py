"""What a model knows of its adapters: one ``AdapterState`` that all its adapted layers share.

It hangs on the model itself, from the first adapter to the last, and holds what must be given back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ..config import LoraConfig
from ..errors import UserError
from .biases import TrainedBiases
from .lowrank import Active
from .tokens import TokenRows, check_apart

_KEY = "_deltaw_adapters"


class QuantizedBase(NamedTuple):
    """Which 4-bit weights a model has."""

    sha256: str
    """Of all codes and scales (``quantized_base.py``)."""
    method: str
    """How they came to be, as ``--quantization`` names it."""


@dataclass
class AdapterState:
    """What a model knows of its adapters."""

    active: Active = field(default_factory=Active)
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    """Each adapter's config, its targets resolved to names."""
    biases: dict[str, TrainedBiases] = field(default_factory=dict)
    shelved: tuple[str, ...] = ()
    """Adapters that were active when all were switched off, to come back when they are switched on again."""
    trainable: set[str] = field(default_factory=set)
    """Adapters that require gradients while they are active."""
    bound: dict[str, QuantizedBase] = field(default_factory=dict)
    """Adapters that belong to one quantised base, since they make good what quantising it has lost (LoftQ)."""
    thawed: list[nn.Parameter] = field(default_factory=list)
    """The base's parameters that required a gradient before the first adapter came; they do again after the last."""
    parts: dict[str, list[nn.Module]] = field(default_factory=dict)
    """Each adapter's modules with parameters, so that switching need not walk through the model."""
    originals: dict[str, nn.Module] = field(default_factory=dict)
    """While adapters are merged: the base's own layers whose place a merged one has, by name."""


def state_of(model: nn.Module) -> AdapterState:
    """The model's adapters; an empty state where it never had any."""
    state = model.__dict__.get(_KEY)
    return state if isinstance(state, AdapterState) else AdapterState()


def attach(model: nn.Module, state: AdapterState) -> None:
    """Hang the state on a model that has none, and freeze the base."""
    state.thawed = [p for p in model.parameters() if p.requires_grad]
    for parameter in state.thawed:
        parameter.requires_grad_(False)
    model.__dict__[_KEY] = state


def detach(model: nn.Module) -> None:
    """The inverse of ``attach``; nothing where the model has no state."""
    state = model.__dict__.pop(_KEY, None)
    if isinstance(state, AdapterState):
        for parameter in state.thawed:
            parameter.requires_grad_(True)


def check_known(state: AdapterState, names: Sequence[str]) -> None:
    """``UserError`` for the first name that the model doesn't have."""
    for name in names:
        if name not in state.configs:
            has = ", ".join(state.configs) or "none"
            raise UserError(f"no adapter {name!r} in this model (it has {has}); load it first")


def check_together(state: AdapterState, names: tuple[str, ...]) -> None:
    """``UserError`` for adapters that can't be active at once."""
    if len(set(names)) < len(names):
        raise UserError(f"adapters {', '.join(names)}: one is named twice; name each once")
    check_apart((n, part) for n in names for part in state.parts.get(n, ()) if isinstance(part, TokenRows))
    scaled = [name for name in names if state.configs[name].use_dora]
    if scaled and len(names) > 1:
        raise UserError(f"adapter {scaled[0]!r} has a DoRA magnitude and can only be active alone; activate it alone")
