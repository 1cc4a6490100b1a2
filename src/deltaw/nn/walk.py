"""A model's modules by the names that they have without adapters, and among them those that hold adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from . import bnb
from .embedding import AdaptedEmbedding
from .extras import WRAPPERS
from .linear import AdaptedLinear
from .parameters import AdaptedParameters
from .quantized import num_quantized
from .saved import SavedModule
from .storage import is_linear
from .tokens import TokenLayer

AdaptedLayer = AdaptedLinear | AdaptedEmbedding
Carrier = AdaptedLayer | TokenLayer | AdaptedParameters
"""Whatever stands in a module's place with adapters that can be merged into it."""


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


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module, whatever stands in its place."""
    return module.base_layer if isinstance(module, WRAPPERS) else module


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, each counted once; those in 4 bits as many as they stand for."""
    parameters = list(model.parameters())
    total = sum(bnb.num_elements(p) for p in parameters) + num_quantized(model)
    return sum(p.numel() for p in parameters if p.requires_grad), total
