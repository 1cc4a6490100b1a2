"""EVA: adapters that start where the layer's inputs vary most (Paischer et al. 2024, arXiv:2410.07170).

The user's data go through the base once or twice; then A is the leading directions of what the layer got
(``nn/eva_state.py``), and B is zero, so step 0 is the base. Ranks move between layers, to where the directions matter
most; a layer may end without an adapter.

Left out: where batches come from (the caller's model and data). Layers that are not linear keep their usual start.
Shapes: T tokens of a batch, K inputs, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError
from ..patterns import tails_of
from ..settings import EvaConfig
from ..targets import compact
from .eva_state import EvaBatch, eva_state, settings_of
from .inject import activate, unmerge
from .linear import AdaptedLinear
from .lowrank import LowRank
from .state import state_of
from .walk import adapted_layers, logical_modules

Forward = Callable[[nn.Module, Any], object]


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward | None = None,
    adapter_name: str = "default",
) -> None:
    """PEFT's function of this name: give a fresh ``init_lora_weights="eva"`` adapter its A's and ranks, in place.

    ``dataloader`` gives the model's inputs as mappings, of which those tokens count that ``attention_mask`` and (with
    ``use_label_mask``) ``labels`` leave; ``forward_fn(model, inputs)`` is ``model(**inputs)`` unless given.
    ``eva_state_dict`` (from ``get_eva_state_dict``) is used instead where there is one. To be called before the
    optimiser is made: the parameters are new. Raises ``UserError`` for an adapter of another start or one that has
    been trained, and for data that don't suffice.
    """
    if eva_state_dict is None:
        if dataloader is None:
            raise UserError("EVA needs data: give a dataloader, or an eva_state_dict")
        eva_state_dict = get_eva_state_dict(model, dataloader, forward_fn, adapter_name)
    apply_eva(_adapted_model(model), eva_state_dict, adapter_name)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    forward_fn: Forward | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """What ``initialize_lora_eva_weights`` would give each layer: name → A [rank, K], of no rows where it gets none."""
    inner = _adapted_model(model)
    settings = settings_of(_eva_config(inner, adapter_name))
    return _observed(inner, adapter_name, _Batches(inner, dataloader, forward_fn, settings))


def start_from_data(model: nn.Module, batches: Iterable[EvaBatch], name: str = "default") -> None:
    """Give the model's EVA adapter its A's and ranks from these batches, which must allow to be gone through again.

    The base alone runs, in evaluation mode and without gradients. Raises as ``initialize_lora_eva_weights`` does.
    """
    apply_eva(model, _observed(model, name, batches), name)


def apply_eva(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Put an EVA state into a fresh adapter: new A's, B zero; ranks and alphas go into the config's patterns.

    A layer of rank 0 loses the adapter. Raises ``UserError``, with the model as it was, for a state that doesn't fit.
    """
    config = _eva_config(model, name)
    linear = _linear_layers(model, name)
    state = {key.removeprefix("base_model.model."): a_RK for key, a_RK in state.items()}
    _check_fits(state, linear, config)
    keeps_scaling = settings_of(config).adjust_scaling_factors
    ranks, alphas = {}, {}
    for target, layer in adapted_layers(model):
        if name in layer.adapters:
            before = config.rank_of(target)
            ranks[target] = rank = len(state[target]) if target in state else before
            alphas[target] = config.alpha_of(target) * (rank / before if keeps_scaling else 1)
    targets = [target for target, rank in ranks.items() if rank]
    keys = _unambiguous(targets)
    resolved = dataclasses.replace(
        config,
        target_modules=compact(targets, [n for n, _ in logical_modules(model)]),
        rank_pattern={keys[t]: ranks[t] for t in targets if ranks[t] != config.r},
        alpha_pattern={keys[t]: alphas[t] for t in targets if alphas[t] != config.lora_alpha},
    )
    adapters = {t: _with_a(linear[t].adapter(name), state[t], resolved.scaling_of(t)) for t in linear if ranks[t]}
    unmerge(model)
    for target, layer in linear.items():
        if target in adapters:
            layer.adapters[name] = adapters[target]
        else:
            del layer.adapters[name]
            if not len(layer.adapters):
                model.set_submodule(target, layer.base_layer)
    state_of(model).configs[name] = resolved


def _check_fits(state: Mapping[str, Tensor], linear: Mapping[str, AdaptedLinear], config: LoraConfig) -> None:
    remedy = "compute it on this model, with this config"
    if odd := sorted(state.keys() ^ linear.keys()):
        raise UserError(f"the EVA state doesn't fit the adapter: {odd[0]} is in only one of them; {remedy}")
    for name, a_RK in state.items():
        if a_RK.dim() != 2 or a_RK.shape[1] != linear[name].in_features:
            expected = f"[rank, {linear[name].in_features}]"
            raise UserError(f"the EVA state gives {name} A {list(a_RK.shape)}, expected {expected}; {remedy}")
    without = [name for name, a_RK in state.items() if not len(a_RK)]
    if len(without) == len(state):
        raise UserError(f"the EVA state gives no layer a rank; {remedy}")
    if without and config.bias == "lora_only":
        raise UserError(f"EVA leaves {without[0]} without an adapter, whose bias would train; use bias='none' or rho=1")


def _with_a(old: LowRank, a_RK: Tensor, scaling: float) -> LowRank:
    """A fresh adapter like the old one, with this A."""
    a_RK = a_RK.to(old.lora_A.device, old.lora_A.dtype, copy=True, memory_format=torch.contiguous_format)
    b_NR = old.lora_B.new_zeros(old.lora_B.shape[0], len(a_RK))
    magnitude = old.lora_magnitude_vector
    magnitude_N = None if magnitude is None else magnitude.detach().clone()
    new = LowRank(a_RK, b_NR, scaling=scaling, dropout=old.dropout, magnitude_N=magnitude_N)
    return new.train(old.training).requires_grad_(old.lora_A.requires_grad)


def _unambiguous(names: Iterable[str]) -> dict[str, str]:
    """Name → a pattern for it alone: the name, anchored where another one ends in it."""
    tails = {tail for name in names for tail in tails_of(name) if tail != name}
    return {name: f"^{name}" if name in tails else name for name in names}


class _Batches:
    """A dataloader's inputs as batches to watch; may be gone through any number of times."""

    def __init__(
        self, model: nn.Module, dataloader: Iterable[Mapping[str, Any]], forward: Forward | None, settings: EvaConfig
    ) -> None:
        if iter(dataloader) is dataloader:
            raise UserError("EVA goes through the data several times; give a list or a DataLoader, not an iterator")
        self.model, self.dataloader, self.settings = model, dataloader, settings
        self.forward = forward or (lambda model, inputs: model(**inputs))
        self.device = next(model.parameters()).device

    def __iter__(self) -> Iterator[EvaBatch]:
        for given in self.dataloader:
            inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            yield EvaBatch(partial(self.forward, self.model, inputs), self._counts(inputs))

    def _counts(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Tokens that are not padding and, if so set, have a label."""
        ids, mask, labels = (inputs.get(key) for key in ("input_ids", "attention_mask", "labels"))
        counts = mask.bool() if mask is not None and mask.dim() == 2 else None
        if self.settings.use_label_mask and labels is not None and ids is not None and labels.shape == ids.shape:
            labelled = labels != self.settings.label_mask_value
            counts = labelled if counts is None else counts & labelled
        return None if counts is None else counts.reshape(-1)


def _observed(model: nn.Module, name: str, batches: Iterable[EvaBatch]) -> dict[str, Tensor]:
    """``eva_state`` of the base alone, in evaluation mode; afterwards all is as it was."""
    config, layers = _eva_config(model, name), _linear_layers(model, name)
    active, training = state_of(model).active.names, [m for m in model.modules() if m.training]
    activate(model, [])
    model.eval()
    try:
        with torch.no_grad():
            return eva_state(layers, config, batches)
    finally:
        for module in training:
            module.training = True
        activate(model, active)


def _linear_layers(model: nn.Module, name: str) -> dict[str, AdaptedLinear]:
    layers = {n: m for n, m in adapted_layers(model) if isinstance(m, AdaptedLinear)}
    return {n: layer for n, layer in layers.items() if name in layer.adapters}


def _adapted_model(model: nn.Module) -> nn.Module:
    """The model that was adapted in place, perhaps inside a wrapper."""
    return next((module for module in model.modules() if state_of(module).configs), model)


def _eva_config(model: nn.Module, name: str) -> LoraConfig:
    """Config of the adapter, which must be an untrained one of this start."""
    config = state_of(model).configs.get(name)
    if config is None:
        raise UserError(f"no adapter {name!r} in this model; add one with init_lora_weights='eva' first")
    if config.init_lora_weights != "eva":
        raise UserError(f"adapter {name!r} has init_lora_weights={config.init_lora_weights!r}, expected 'eva'")
    if any(layer.adapter(name).lora_B.any() for layer in _linear_layers(model, name).values()):
        raise UserError(f"adapter {name!r} has been trained already, and EVA would start it afresh; add a new one")
    return config
