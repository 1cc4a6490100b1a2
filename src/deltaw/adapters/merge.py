"""Fold adapters into the base's weights, and take them out again.

    merge             W → W' = W + Σᵢ ΔWᵢ (DoRA: c∘(W + ΔW), alone); the arithmetic stands in ``nn/merged.py``
    unmerge           W comes back bit for bit: it was kept, nothing is subtracted
    merge_and_unload  the adapters are gone, a plain model with W' remains

While adapters are merged they are the active ones, no others run, and a forward costs what the base's costs. What
needs adapters held apart ends that: to switch to other adapters or to none (``activate``), to add, load or delete one
unmerges first. A batch that names an adapter for each row is refused, since the weights are the same for all rows.
Saving an adapter works as ever: its factors don't change.

Weights that were tied (an output head and the embedding) come apart when one of them is merged: the other must not
move. ``unmerge`` ties them again; ``merge_and_unload`` says so in ``config.tie_word_embeddings``.

What is merged into a quantised or packed layer is a dense one, in the dtype of the embedding: to quantise
W' again loses most of the adapter's small changes. ``merge_and_unload`` makes the layers that no adapter touched dense,
too, since a checkpoint is one or the other; or quantises W' again all the same, by the layer's own method, where that
is asked for. Either way it says what rounding took (``merge_loss.py``).
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..nn import bnb
from ..nn.inject import activate, restore, unmerge
from ..nn.load import forget_base
from ..nn.merged import dense_weight, follow, is_dense, with_weight
from ..nn.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedModule, TiedHead
from ..nn.saved import SavedModule
from ..nn.state import AdapterState, check_together, state_of
from ..nn.walk import Carrier, base_of, carriers, logical_modules, saved_modules
from ..ops.nf4 import QuantizedScales
from ..ops.quantized import Method
from .merge_loss import MergeLoss

log = logging.getLogger("deltaw")

__all__ = ["merge", "merge_and_unload", "merged_names", "unmerge"]


def merged_names(model: nn.Module) -> tuple[str, ...]:
    """Adapters that are merged into the model's weights now, in the order in which they were."""
    return state_of(model).active.merged


def merge(model: nn.Module, names: Sequence[str] | None = None, *, safe: bool = False) -> None:
    """Merge these adapters (None: the active ones) and whatever is merged already; they become the active ones.

    Memory: the base's own weights are kept beside the merged ones until ``unmerge``. To merge what is merged already
    is a no-op. The model is as it was where anything is raised: ``UserError`` for names that it doesn't have, for
    several where one is DoRA, and, with ``safe``, for a result that is not finite, naming the module.
    """
    state = state_of(model)
    wanted = _wanted(state, names)
    if wanted == state.active.merged:
        return
    layers, dtype = dict(_touched(model, wanted)), bnb.activation_dtype(model)
    stand_ins: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        stand_ins[name] = _merged_layer(layer, _own_base(state, name, layer), wanted, dtype)
        if safe:
            _check_finite(name, stand_ins[name])
    activate(model, wanted)
    for name, layer in layers.items():
        state.originals[name], layer.base_layer = layer.base_layer, stand_ins[name]
    state.active.merged = wanted


def merge_and_unload(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    safe: bool = False,
    requantize: bool = False,
    loss: MergeLoss | None = None,
) -> nn.Module:
    """Merge these adapters (None: the active ones), take all adapters out, and return the model, plain again.

    Their ``modules_to_save`` and trained biases stay in place, and quantised layers become dense ones. What required a
    gradient before the first adapter came does so again. The model is no longer the base that it was loaded as, and
    forgets its identity.

    ``requantize``: quantised layers stay so; those that an adapter touched are quantised anew from W' in float32, as
    they were, and the others keep their codes to the bit. ``UserError`` where there are none, where bitsandbytes holds
    them, and for adapters on a quantised embedding or a head that is tied to one.
    ``loss`` is filled with what was lost; a warning says it, too.

    Memory: one layer's merged weights beside the model, in its own dtype (of a quantised layer also dense ones in
    float32), and whatever the allocator keeps of blocks that were freed. They are written over the original ones, so
    there is no way back, and whoever else holds those tensors sees them change; what is tied within the model is
    replaced.
    Raises as ``merge`` does, with the model as it was; memory that runs out on the way leaves a model to load anew.
    ``safe`` computes everything twice: once to look, once to keep.
    """
    state, dtype = state_of(model), bnb.activation_dtype(model)
    wanted = _wanted(state, names)
    loss = MergeLoss() if loss is None else loss
    if requantize:
        _check_requantizable(model, state, wanted)
    if not all(map(is_dense, state.originals.values())):
        unmerge(model)  # what is merged already is dense, and rounded
    if wanted != state.active.merged:
        if safe:
            for name, layer in _touched(model, wanted):
                _check_finite(name, _merged_layer(layer, _own_base(state, name, layer), wanted, dtype))
        activate(model, wanted)
    thawed = _thawed(model, state)
    is_done = bool(state.active.merged)
    state.originals.clear()
    used = Counter(map(_memory_of, model.parameters())) + Counter(map(_memory_of, _tied(model)))
    for name in [name for name, _ in carriers(model)]:  # names only: a list of layers would keep them all alive
        layer = cast(Carrier, model.get_submodule(name))
        base = layer.base_layer
        is_plain = is_done or not _holds(layer, wanted)
        merged = base if is_plain else _merged_layer(layer, base, wanted, dtype, requantize=requantize)
        if not (is_plain or is_dense(base)):
            _measure(loss, name, layer, base, wanted, merged)
        model.set_submodule(name, _in_place(base, merged, used))
        del layer, base, merged
    for name, module in list(saved_modules(model)):
        model.set_submodule(name, module.in_use())
    state.biases.clear()  # they stay where they are: in the model
    restore(model)
    if not requantize:
        _make_dense(model, dtype)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in thawed)
    _untie(model)
    forget_base(model)
    if loss.layers:
        log.warning("%s", loss)
    return model


def _in_place(base: nn.Module, merged: nn.Module, used: Mapping[int, int]) -> nn.Module:
    """``base`` with ``merged``'s values in its own memory, where nothing else in the model has that; else ``merged``.

    Weights that were mapped from a file lie in one mapping, which stays as long as one of them does: to let go of the
    others would free nothing. Written to, a mapped page becomes memory in its place, and the file never changes.
    """
    old, new = dict(base.named_parameters()), dict(merged.named_parameters())
    if isinstance(base, QuantizedModule):  # whose weight is no parameter
        return merged
    if base is merged or type(base) is not type(merged) or old.keys() != new.keys():
        return merged
    changed = [(old[name], new[name]) for name in old if old[name] is not new[name]]
    for one, two in changed:
        is_alike = (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
        if not is_alike or used[_memory_of(one)] > 1 or one.is_inference() or one.stride() != two.stride():
            return merged
    for one, two in changed:
        one.data.copy_(two.data)
    return base


def _memory_of(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().data_ptr()


def _tied(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that stand in a second place, once more for each."""
    seen: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield parameter
        seen.add(id(parameter))


def _wanted(state: AdapterState, names: Sequence[str] | None) -> tuple[str, ...]:
    """What will be merged: what is already, then the new ones; ``UserError`` where that can't be."""
    given = state.active.names if names is None else tuple([names] if isinstance(names, str) else names)
    unknown = [name for name in given if name not in state.configs]
    if unknown:
        has = ", ".join(state.configs) or "none"
        raise UserError(f"no adapter {', '.join(unknown)} in this model to merge (it has {has}); load it first")
    if not given:
        raise UserError("no adapter is active, so there is nothing to merge; name the adapters, or activate them first")
    wanted = tuple(dict.fromkeys([*state.active.merged, *given]))
    check_together(state, wanted)
    return wanted


def _touched(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Carrier]]:
    """Layers that at least one of these adapters changes."""
    return ((name, layer) for name, layer in carriers(model) if _holds(layer, names))


def _holds(layer: Carrier, names: Sequence[str]) -> bool:
    return any(name in layer.adapters for name in names)


def _own_base(state: AdapterState, name: str, layer: Carrier) -> nn.Module:
    """The base's own layer, where the model is now, whether or not a merged one stands in for it."""
    own = state.originals.get(name, layer.base_layer)
    follow(own, layer.base_layer)
    return own


def _merged_layer(
    layer: Carrier, base: nn.Module, names: Sequence[str], dtype: torch.dtype, *, requantize: bool = False
) -> nn.Module:
    # Parameters made under inference mode could never be trained or copied from again.
    with torch.inference_mode(False), torch.no_grad():
        merged = layer.merged_layer(base, names)
        if is_dense(base):
            return merged
        return _requantized(merged, base) if requantize else _cast(merged, dtype)


def _requantized(merged: nn.Module, base: nn.Module) -> nn.Module:
    """A merged layer in the storage of the base's."""
    assert isinstance(base, QuantizedLinear)
    old = base.quantized
    method = Method(kind=old.kind, block_size=old.block_size, double=isinstance(old.scales, QuantizedScales))
    return QuantizedLinear.of(merged, dataclasses.replace(method.quantize(dense_weight(merged)), dtype=old.dtype))


def _check_requantizable(model: nn.Module, state: AdapterState, names: Sequence[str]) -> None:
    layers = {name: state.originals.get(name, base_of(module)) for name, module in logical_modules(model)}
    if not any(isinstance(layer, QuantizedModule) for layer in layers.values()):
        what = "bitsandbytes' own" if any(map(bnb.is_quantized, layers.values())) else "dense"
        raise UserError(f"requantize: the base's layers are {what}; expected a base loaded with quantization='nf4'")
    touched = [name for name, _ in _touched(model, names)]
    tied = [name for name in touched if isinstance(layers[name], TiedHead | QuantizedEmbedding)]
    if tied:
        raise UserError(f"requantize: {tied[0]} is an embedding in 4 bits, or tied to one; merge to a dense model")


def _measure(
    loss: MergeLoss, name: str, layer: Carrier, base: nn.Module, names: Sequence[str], merged: nn.Module
) -> None:
    """Note what W' of a quantised layer lost in its new storage."""
    with torch.inference_mode(False), torch.no_grad():
        exact, stored = dense_weight(layer.merged_layer(base, names)), dense_weight(merged)
        loss.add(name, before=dense_weight(base), exact=exact, stored=stored)
    if isinstance(merged, QuantizedModule):
        loss.storage = merged.quantized.kind.upper()
    else:
        loss.storage = str(stored.dtype).removeprefix("torch.")


def _cast(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Into the dtype of what the layer is given, with tensors of its own."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.dtype != dtype:  # a bias is shared with the base's own layer
            setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return layer


def _make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Make whatever is still quantised or packed dense, layer by layer, and take back what the model says of it."""
    with torch.inference_mode(False), torch.no_grad():
        for name in [name for name, module in model.named_modules() if not is_dense(module)]:
            layer = model.get_submodule(name)
            model.set_submodule(name, _cast(with_weight(layer, dense_weight(layer)), dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for note in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(note, None)


def _check_finite(name: str, layer: nn.Module) -> None:
    bad = [key for key, parameter in layer.named_parameters() if not _is_finite(parameter)]
    if bad:
        raise UserError(
            f"{name}.{bad[0]} is not finite after merging (NaN, or too large for {layer.get_parameter(bad[0]).dtype}); "
            "the adapter or the base is damaged there: leave it out, or merge in a wider dtype"
        )


def _is_finite(tensor: Tensor) -> bool:
    # Row by row: a mask of the whole would be as large as an 8-bit copy of the weight.
    rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[None]
    return all(bool(part.isfinite().all()) for part in rows.split(4096))


def _thawed(model: nn.Module, state: AdapterState) -> set[str]:
    """Names, in the model without adapters, of what required a gradient before; lets go of the parameters."""
    ids = {id(parameter) for parameter in state.thawed}
    names: set[str] = set()
    for owner, module in logical_modules(model):
        if isinstance(module, Carrier | SavedModule):
            base = state.originals.get(owner, module.base_layer)
            own = list(base.named_parameters(remove_duplicate=False))
        else:
            own = list(module.named_parameters(recurse=False, remove_duplicate=False))
        names |= {f"{owner}.{key}" if owner else key for key, parameter in own if id(parameter) in ids}
    state.thawed.clear()  # else every original would live as long as this list
    return names


def _untie(model: nn.Module) -> None:
    """Say in the config that head and embedding are two tensors now, where they were one; or make them one again.

    Single trained tokens change both alike, so that there is no need for two.
    """
    embedding, head = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("in", "out"))
    one, two = getattr(embedding, "weight", None), getattr(head, "weight", None)
    config = getattr(model, "config", None)
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    saying = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    if not saying or one is None or two is None or one is two or isinstance(head, TiedHead):
        return
    if head is not None and one.shape == two.shape and one.device == two.device and torch.equal(one, two):
        head.weight = one
        return
    for part in saying:
        part.tie_word_embeddings = False
