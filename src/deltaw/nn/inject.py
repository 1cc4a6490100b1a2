"""Put adapters into a model and take them out again; switch between them.

Linear layers and embeddings are swapped in place for adapted ones that hold the original whole, so ``restore`` is the
exact inverse of ``inject``. What a model holds is one ``AdapterState`` (``state.py``).

Left out: what an adapter is on disk (``adapters``) and PEFT's class around it all (``peft``).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..config import LoraConfig, as_names
from ..errors import UserError
from ..targets import choose, compact
from .biases import TrainedBiases
from .embedding import AdaptedEmbedding
from .extras import WRAPPERS
from .families import lean, plain
from .fresh import fresh_adapter
from .linear import AdaptedLinear
from .lowrank import Active, LowRank
from .merged import follow
from .quantized_base import original_of, quantized_base
from .saved import SavedModule
from .scope import bias_parameters, check_layers, find_extras, modules_to_save
from .starts import is_quantised
from .state import attach, check_known, check_together, detach, state_of
from .storage import frozen_weight, is_linear
from .walk import AdaptedLayer, base_of, carriers, head_name, linear_names, logical_modules, saved_modules

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-@+]{0,127}")


def inject(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    make: Callable[[AdaptedLayer], LowRank] | None = None,
    chosen: list[str] | None = None,
    trained: Mapping[str, Tensor] | None = None,
    trainable: bool = True,
) -> list[str]:
    """Add the adapter ``name`` to the model, make it the active one, and return the adapted modules' names.

    ``make`` gives each layer its adapter (a fresh one by the config's start, where left out), and ``chosen`` the
    modules (the config's targets, where left out): a loaded adapter brings both. ``trained`` are its other values, as
    ``Extras.make`` takes them.
    Merged adapters are unmerged first: a start may look at the base's weights.
    The base is frozen: only the adapter's own parameters require a gradient (and only if ``trainable``). The model is
    as it was where anything is raised: ``UserError`` for a name that is taken, a target that matches nothing, a layer
    that can't be adapted; whatever else goes wrong, memory that runs out among it.
    """
    _check_name(model, name)
    modules = dict(logical_modules(model))
    names = list(modules)
    is_fresh = chosen is None
    extras = find_extras(model, config)
    if chosen is None:
        chosen = choose(config, names, linear_names(model), head=head_name(model), parameters=extras.parameter_names)
    make = make or (lambda layer: fresh_adapter(layer, config, original=original_of(model, layer)))
    check_layers(config, {n: modules[n] for n in chosen})
    saved = modules_to_save(config, modules, chosen, strict=is_fresh)
    biases = bias_parameters(modules, chosen, saved, config.bias, strict=is_fresh)
    extras.check_free(modules, [*chosen, *saved])
    owner = next(iter(state_of(model).biases), None)
    if biases and owner is not None:
        raise UserError(f"bias={config.bias!r}: adapter {owner!r} already trains the biases; use bias='none'")

    state = state_of(model)
    unmerge(model)
    # All is made before anything is put in place: what fails in between leaves no half-adapted model.
    layers = {target: _adapted(target, modules[target], state.active) for target in chosen}
    adapters = {target: make(layer) for target, layer in layers.items()}
    is_bound = config.init_lora_weights == "loftq" and any(is_quantised(layer.storage) for layer in layers.values())
    base = quantized_base(model) if is_bound else None
    wrappers = {target: _saved(target, modules[target], state.active) for target in saved}
    copies = {target: wrapper.fresh_copy() for target, wrapper in wrappers.items()}
    others = list(extras.make(config, modules, state.active, trained))
    trained_biases = TrainedBiases(biases)
    resolved = dataclasses.replace(
        copy.deepcopy(config),
        target_modules=compact(chosen, names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=as_names(config.modules_to_save) or None,
        fan_in_fan_out=any(getattr(frozen_weight(base_of(m)), "transposed", False) for m in _linear(modules, chosen)),
    )
    if not state.configs:
        attach(model, state)
    for target, layer in layers.items():
        layer.adapters[name] = adapters[target]
        _put(modules, target, layer)
    for target, wrapper in wrappers.items():
        wrapper.copies[name] = copies[target]
        _put(modules, target, wrapper)
    for target, carrier, part in others:
        carrier.adapters[name] = part
        _put(modules, target, carrier)
    if biases:
        state.biases[name] = trained_biases
    if base is not None:
        state.bound[name] = base
    state.configs[name] = resolved
    state.parts[name] = _parts(model, name)
    activate(model, [name], trainable=trainable)
    lean(model)
    return chosen


def restore(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter out of the model, or all of them; the last one leaves the model as it was found.

    As it was found means its modules, its parameters, their values, and which of them require a gradient.
    Raises ``UserError`` for a name that the model doesn't have. Other adapters stay as they are.
    """
    state = state_of(model)
    gone = list(state.configs) if name is None else [name]
    check_known(state, gone)
    activate(model, [n for n in state.active.names if n not in gone])
    for adapter in gone:
        del state.configs[adapter]
        state.biases.pop(adapter, None)
        state.trainable.discard(adapter)
        state.parts.pop(adapter, None)
        state.bound.pop(adapter, None)
    for target, layer in [*carriers(model), *saved_modules(model)]:
        kept = layer.copies if isinstance(layer, SavedModule) else layer.adapters
        for adapter in gone:
            if adapter in kept:
                del kept[adapter]
        if not len(kept):
            model.set_submodule(target, layer.base_layer)
    if not state.configs:
        plain(model)
        detach(model)


def activate(model: nn.Module, names: Sequence[str], *, trainable: bool | None = None) -> None:
    """Make these adapters the active ones (none: the base alone). Only active adapters require gradients.

    ``trainable`` says whether they do from now on; None leaves each as it was last told. Raises ``UserError`` for
    names that the model doesn't have, and for several at once where one has a DoRA magnitude, which scales a sum of
    its own. Merged adapters are unmerged: to switch is to work with adapters held apart.
    """
    state = state_of(model)
    before, after = set(state.active.names), tuple(names)
    check_known(state, after)
    check_together(state, after)
    unmerge(model)
    if trainable is not None:
        state.trainable = state.trainable | set(after) if trainable else state.trainable - set(after)
    learning = state.trainable & set(after)
    for adapter, biases in state.biases.items():
        biases.switch(on=adapter in after)
        biases.train(adapter in learning)
    state.active.names = after
    for adapter in before | set(after):
        _require_grad(state.parts[adapter], adapter in learning)


def unmerge(model: nn.Module) -> None:
    """Give the base its own layers back, bit for bit, where adapters are merged; they stay active, held apart.

    Nothing is subtracted: merging keeps the base's layers (``adapters/merge.py``). A model that was moved or cast in
    between has them moved and cast likewise.
    """
    state = state_of(model)
    for target, layer in carriers(model) if state.originals else ():
        if target in state.originals:
            original = state.originals.pop(target)
            follow(original, layer.base_layer)
            layer.base_layer = original
    state.active.merged = ()


def _check_name(model: nn.Module, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"adapter name {name!r}: use letters, digits, '-' and '_' (at most 128), without dots")
    if name in state_of(model).configs:
        raise UserError(f"adapter {name!r} is already in the model; delete it first or choose another name")


def _adapted(name: str, module: nn.Module, active: Active) -> AdaptedLayer:
    """The layer that stands there, or a new one around it that is not in the model yet."""
    if isinstance(module, AdaptedLayer):
        return module
    kind = AdaptedEmbedding if isinstance(module, nn.Embedding) else AdaptedLinear
    return kind(module, name, active)


def _saved(name: str, module: nn.Module, active: Active) -> SavedModule:
    return module if isinstance(module, SavedModule) else SavedModule(module, name, active)


def _linear(modules: dict[str, nn.Module], chosen: list[str]) -> Iterator[nn.Module]:
    return (modules[n] for n in chosen if is_linear(base_of(modules[n])))


def _put(modules: dict[str, nn.Module], target: str, module: nn.Module) -> None:
    """Set a module by its name; ``modules`` are all the model's."""
    owner, _, own = target.rpartition(".")
    setattr(modules[owner], own, module)


def _parts(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold one adapter's parameters."""
    wrappers = [module for _, module in logical_modules(model) if isinstance(module, WRAPPERS)]
    held = [module.copies if isinstance(module, SavedModule) else module.adapters for module in wrappers]
    return [part for kept in held if name in kept for part in kept[name].modules() if part._parameters]


def _require_grad(parts: list[nn.Module], on: bool) -> None:
    """As ``requires_grad_`` on each, in a fifth of the time: switching adapters is counted in microseconds."""
    for part in parts:
        for parameter in part._parameters.values():
            if parameter is not None and parameter.requires_grad is not on:
                parameter.requires_grad_(on)
