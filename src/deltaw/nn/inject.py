"""Put adapters into a model and take them out again; switch between them; say what trains.

Linear layers and embeddings are swapped in place for adapted ones that hold the original whole, so ``restore`` is the
exact inverse of ``inject``. What a model holds is one ``AdapterState`` that all its adapted layers share.

Left out: what an adapter is on disk (``adapters``) and PEFT's class around it all (``peft``).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import LoraConfig, as_names
from ..errors import UserError
from ..targets import choose, compact, saved_whole
from . import starts
from .biases import TrainedBiases
from .dora import adapted_norm, row_norms_squared
from .embedding import AdaptedEmbedding, is_embedding
from .extras import WRAPPERS, Extras
from .linear import AdaptedLinear
from .lowrank import Active, LowRank
from .merged import follow
from .parameters import AdaptedParameters
from .saved import SavedModule
from .storage import frozen_weight, is_linear
from .tokens import TokenLayer, TokenRows, check_apart

AdaptedLayer = AdaptedLinear | AdaptedEmbedding
Carrier = AdaptedLayer | TokenLayer | AdaptedParameters
"""Whatever stands in a module's place with adapters that can be merged into it."""
_STATE = "_deltaw_adapters"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-@+]{0,127}")


@dataclass
class AdapterState:
    """What a model knows of its adapters."""

    active: Active = field(default_factory=Active)
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    """Each adapter's config, its targets resolved to names."""
    biases: dict[str, TrainedBiases] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    """Adapters that require gradients while they are active."""
    thawed: list[nn.Parameter] = field(default_factory=list)
    """The base's parameters that required a gradient before the first adapter came; they do again after the last."""
    parts: dict[str, list[nn.Module]] = field(default_factory=dict)
    """Each adapter's modules with parameters, so that switching need not walk through the model."""
    originals: dict[str, nn.Module] = field(default_factory=dict)
    """While adapters are merged: the base's own layers whose place a merged one has, by name."""


def state_of(model: nn.Module) -> AdapterState:
    """The model's adapters; an empty state where it never had any."""
    state = model.__dict__.get(_STATE)
    return state if isinstance(state, AdapterState) else AdapterState()


def logical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) as in the model without adapters: adapted layers count as one and are not entered."""

    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        if not isinstance(module, WRAPPERS):
            inner = [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]
            waiting += reversed(inner)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of every layer that holds adapters."""
    return ((name, m) for name, m in logical_modules(model) if isinstance(m, AdaptedLayer))


def carriers(model: nn.Module) -> Iterator[tuple[str, Carrier]]:
    """(name, module) of all that holds adapters: layers, embeddings with single rows, modules with bare parameters."""
    return ((name, m) for name, m in logical_modules(model) if isinstance(m, Carrier))


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """(name, module) of every module that is trained whole for some adapter."""
    return ((name, m) for name, m in logical_modules(model) if isinstance(m, SavedModule))


def linear_names(model: nn.Module) -> list[str]:
    """Names of all layers that can be adapted as linear, in the model's order."""
    return [n for n, m in logical_modules(model) if is_linear(m) or isinstance(m, AdaptedLinear)]


def head_name(model: nn.Module) -> str | None:
    """Name of the output head, where the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        return None
    modules = logical_modules(model)
    return next((n for n, m in modules if m is head or (isinstance(m, WRAPPERS) and m.base_layer is head)), None)


def embedding_name(model: nn.Module) -> str | None:
    """Name of the input embedding, where the model has one."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:
        return None
    return next((n for n, m in logical_modules(model) if m is embedding), None)


def find_extras(model: nn.Module, config: LoraConfig) -> Extras:
    """The single rows and bare parameters that a config means. Raises ``UserError`` where the model hasn't got them."""
    if not (config.trainable_token_indices or config.target_parameters):
        return Extras([], {})
    originals = state_of(model).originals
    bases = {name: originals.get(name, _base(module)) for name, module in logical_modules(model)}
    return Extras.find(config, bases, embedding_name(model))


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
    make = make or (lambda layer: fresh_adapter(layer, config))
    _check_layers(config, {n: modules[n] for n in chosen})
    saved = _modules_to_save(config, modules, chosen, strict=is_fresh)
    biases = bias_parameters(modules, chosen, saved, config.bias)
    extras.check_free(modules, [*chosen, *saved])
    owner = next(iter(state_of(model).biases), None)
    if biases and owner is not None:
        raise UserError(f"bias={config.bias!r}: adapter {owner!r} already trains the biases; use bias='none'")

    state = state_of(model)
    unmerge(model)
    # All is made before anything is put in place: what fails in between leaves no half-adapted model.
    layers = {target: _adapted(target, modules[target], state.active) for target in chosen}
    adapters = {target: make(layer) for target, layer in layers.items()}
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
        fan_in_fan_out=any(getattr(frozen_weight(_base(m)), "transposed", False) for m in _linear(modules, chosen)),
    )
    if not state.configs:
        state.thawed = [p for p in model.parameters() if p.requires_grad]
        for parameter in state.thawed:
            parameter.requires_grad_(False)
        model.__dict__[_STATE] = state
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
    state.configs[name] = resolved
    state.parts[name] = _parts(model, name)
    activate(model, [name], trainable=trainable)
    return chosen


def restore(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter out of the model, or all of them; the last one leaves the model as it was found.

    As it was found means its modules, its parameters, their values, and which of them require a gradient.
    Raises ``UserError`` for a name that the model doesn't have. Other adapters stay as they are.
    """
    state = state_of(model)
    gone = list(state.configs) if name is None else [_known(state, name)]
    activate(model, [n for n in state.active.names if n not in gone])
    for adapter in gone:
        del state.configs[adapter]
        state.biases.pop(adapter, None)
        state.trainable.discard(adapter)
        state.parts.pop(adapter, None)
    for target, layer in [*carriers(model), *saved_modules(model)]:
        kept = layer.copies if isinstance(layer, SavedModule) else layer.adapters
        for adapter in gone:
            if adapter in kept:
                del kept[adapter]
        if not len(kept):
            model.set_submodule(target, layer.base_layer)
    if not state.configs:
        model.__dict__.pop(_STATE, None)
        for parameter in state.thawed:
            parameter.requires_grad_(True)


def activate(model: nn.Module, names: Sequence[str], *, trainable: bool | None = None) -> None:
    """Make these adapters the active ones (none: the base alone). Only active adapters require gradients.

    ``trainable`` says whether they do from now on; None leaves each as it was last told. Raises ``UserError`` for
    names that the model doesn't have, and for several at once where one has a DoRA magnitude, which scales a sum of
    its own. Merged adapters are unmerged: to switch is to work with adapters held apart.
    """
    state = state_of(model)
    before, after = set(state.active.names), tuple(_known(state, name) for name in names)
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


def _put(modules: dict[str, nn.Module], target: str, module: nn.Module) -> None:
    """Set a module by its name; ``modules`` are all the model's."""
    owner, _, own = target.rpartition(".")
    setattr(modules[owner], own, module)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, each counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _check_name(model: nn.Module, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"adapter name {name!r}: use letters, digits, '-' and '_' (at most 128), without dots")
    if name in state_of(model).configs:
        raise UserError(f"adapter {name!r} is already in the model; delete it first or choose another name")


def _known(state: AdapterState, name: str) -> str:
    if name not in state.configs:
        has = ", ".join(state.configs) or "none"
        raise UserError(f"no adapter {name!r} in this model (it has {has}); load it first")
    return name


def check_together(state: AdapterState, names: tuple[str, ...]) -> None:
    """``UserError`` for adapters that can't be active at once."""
    if len(set(names)) < len(names):
        raise UserError(f"adapters {', '.join(names)}: one is named twice; name each once")
    check_apart((n, part) for n in names for part in state.parts.get(n, ()) if isinstance(part, TokenRows))
    scaled = [name for name in names if state.configs[name].use_dora]
    if scaled and len(names) > 1:
        raise UserError(f"adapter {scaled[0]!r} has a DoRA magnitude and can only be active alone; activate it alone")


def _check_layers(config: LoraConfig, chosen: dict[str, nn.Module]) -> None:
    """Every chosen module must be one that can be adapted; all that can't are named in one error."""
    fits = {n: is_linear(m) or is_embedding(m) or isinstance(m, AdaptedLayer) for n, m in chosen.items()}
    bad = {n: type(m).__name__ for n, m in chosen.items() if not fits[n]}
    if bad:
        shown = ", ".join(f"{name} ({kind})" for name, kind in list(bad.items())[:5])
        raise UserError(
            f"target_modules chooses {len(bad)} modules that are neither linear nor an embedding: {shown}"
            f"{' …' if len(bad) > 5 else ''}; narrow it to layers that `deltaw modules MODEL` lists"
        )


def _modules_to_save(
    config: LoraConfig, modules: dict[str, nn.Module], chosen: list[str], *, strict: bool
) -> list[str]:
    """Modules to copy; loaded configs (not ``strict``) may name some that aren't there, since PEFT guesses heads."""
    saved = saved_whole(config, modules)
    missing = [end for end in as_names(config.modules_to_save) if strict and not any(n.endswith(end) for n in saved)]
    if missing:
        raise UserError(f"modules_to_save: no module is called {', '.join(missing)}; give names that the model has")
    # A module that is copied whole can't hold adapters, of this config or another, nor a second module to save.
    nested = [inner for inner in [*saved, *chosen] for outer in saved if inner.startswith(f"{outer}.")]
    adapted = [n for n in saved if n in chosen or any(isinstance(m, Carrier) for m in modules[n].modules())]
    holders = [n for n in saved if any(isinstance(m, SavedModule) for m in list(modules[n].modules())[1:])]
    if bad := [*nested, *adapted, *holders]:
        raise UserError(f"modules_to_save: {bad[0]} is adapted or saved for itself already; leave one of the two out")
    return saved


def _adapted(name: str, module: nn.Module, active: Active) -> AdaptedLayer:
    """The layer that stands there, or a new one around it that is not in the model yet."""
    if isinstance(module, AdaptedLayer):
        return module
    kind = AdaptedEmbedding if isinstance(module, nn.Embedding) else AdaptedLinear
    layer = kind(module, name, active)  # type: ignore[arg-type]
    layer.training = module.training
    return layer


def _saved(name: str, module: nn.Module, active: Active) -> SavedModule:
    return module if isinstance(module, SavedModule) else SavedModule(module, name, active)


def blank_adapter(layer: AdaptedLayer, config: LoraConfig) -> LowRank:
    """What ``fresh_adapter`` makes, with nothing in it yet: a resumed run reads its factors from a checkpoint."""
    is_lookup = isinstance(layer, AdaptedEmbedding)
    return fresh_adapter(layer, config, starts.blank if is_lookup else starts.blank_for(config))


def fresh_adapter(layer: AdaptedLayer, config: LoraConfig, start: starts.Start | None = None) -> LowRank:
    """An untrained adapter for one layer, on its device, in float32 (float64 over a float64 base).

    Raises ``UserError`` where the config's start can't be made for this layer.
    """
    scaling, weight = config.scaling_of(layer.name), layer.weight
    site = starts.Site(name=layer.name, weight=layer.storage, rank=config.rank_of(layer.name), scaling=scaling)
    is_lookup = isinstance(layer, AdaptedEmbedding)
    start = start or (starts.embedding_start_for(config) if is_lookup else starts.start_for(config))
    made = start(site)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # In the layout that a file gives, since that decides the last bit of a product, and resuming is exact.
    a_RK, b_NR = (t.to(weight.device, dtype).contiguous() for t in (made.a_RK, made.b_NR))
    magnitude_N = None
    if config.use_dora:
        norms_squared_N = row_norms_squared(layer.storage)
        if made.is_subtracted:  # step 0 is the base
            magnitude_N = norms_squared_N.sqrt()
        else:
            magnitude_N = adapted_norm(layer.storage, norms_squared_N, a_RK, b_NR, scaling)
    adapter = LowRank(
        a_RK,
        b_NR,
        scaling=scaling,
        dropout=float(config.lora_dropout),
        magnitude_N=magnitude_N,
        start=(a_RK.clone(), b_NR.clone()) if made.is_subtracted else None,
    )
    return adapter.to(weight.device, dtype)


def bias_parameters(
    modules: dict[str, nn.Module], chosen: list[str], saved: list[str], which: str
) -> dict[str, nn.Parameter]:
    """Biases to train, by their name in the model without adapters; modules that are saved whole bring their own."""
    owners = {"none": {}, "lora_only": {n: modules[n] for n in chosen}, "all": modules}[which]
    owners = {n: module for n, module in owners.items() if not any(f"{n}.".startswith(f"{s}.") for s in saved)}
    found = {n: getattr(_base(module), "bias", None) for n, module in owners.items()}
    biases = {f"{n}.bias" if n else "bias": b for n, b in found.items() if isinstance(b, nn.Parameter)}
    if which != "none" and not biases:
        raise UserError(f"bias={which!r}: the model has no such biases; use bias='none'")
    return biases


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, WRAPPERS) else module


def _linear(modules: dict[str, nn.Module], chosen: list[str]) -> Iterator[nn.Module]:
    return (modules[n] for n in chosen if is_linear(_base(modules[n])))
