"""A whole model as a GGUF file, and its weights read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGUFType, GGUFWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UserError
from ...nn.saved import SavedModule
from ...nn.walk import Carrier, logical_modules
from .layout import ROPE_FACTORS, Layout
from .metadata import write_config
from .tensors import Entry, Outtype, decoded, open_gguf, write_gguf
from .vocabulary import write_vocabulary


def write_model_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    outtype: Outtype = "f16",
    base_only: bool = False,
    describe: Callable[[GGUFWriter], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a plain model and its tokenizer, a tensor at a time; with ``base_only``, the base of an adapted one.

    Raises ``UserError`` for an architecture, a config or a tokenizer that llama.cpp doesn't know, for a head of its own
    where llama.cpp has a tied one, and for adapters in the model, which would be lost.
    """
    if not base_only and is_adapted(model):
        raise UserError("the model has adapters in it, which a model's GGUF can't hold; merge them first")
    layout = Layout(model)
    if not (layout.is_tied or layout.family.has_head):
        raise UserError(
            f"llama.cpp's {layout.family.name} has no head apart from the embedding, and this model has; an adapter "
            "that changes neither can be exported"
        )

    def metadata(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        if describe is not None:
            describe(writer)
        write_config(writer, model.config, layout.family)
        write_vocabulary(writer, tokenizer, layout.tensors[layout.parameters["token_embd.weight"]].shape[0])

    entries = [Entry(name, tuple(t.shape), lambda t=t: t) for name, t in layout.extra_tensors().items()]  # type: ignore[misc]
    entries += [_entry(layout, own, name) for own, name in layout.parameters.items()]
    write_gguf(path, layout.family.name, outtype, metadata, entries, progress)


def read_model_gguf(path: Path, model: PreTrainedModel) -> None:
    """The inverse: overwrite a model's weights with those of the file, a tensor at a time.

    Raises ``UserError`` for tensors that the model doesn't have, that are missing, or of another shape.
    """
    layout = Layout(model)
    with open_gguf(path) as reader, torch.no_grad():
        missing = set(layout.parameters)
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            if tensor.name not in missing:
                raise UserError(f"{path}: {tensor.name} belongs to nothing in the model; give the model's own file")
            missing.remove(tensor.name)
            name = layout.parameters[tensor.name]
            values, parameter = decoded(tensor), layout.tensors[name]
            if values.shape != parameter.shape:
                raise UserError(f"{path}: {tensor.name} is {tuple(values.shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(layout.from_gguf(name, values))
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors are missing ({sorted(missing)[0]}); get a complete copy")


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether anything stands in the model that the base alone doesn't have."""
    return any(isinstance(module, Carrier | SavedModule) for _, module in logical_modules(model))


def _entry(layout: Layout, own: str, name: str) -> Entry:
    parameter = layout.tensors[name]
    return Entry(own, tuple(parameter.shape), lambda: layout.to_gguf(name, parameter))
