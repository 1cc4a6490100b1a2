"""PEFT's class and method names over this project's functions: a thin layer that holds nothing of its own.

``PeftModel`` wraps a model whose layers were adapted in place (``nn.inject``). Everything that it is asked and does
not know (``config``, ``device`` …) is the wrapped model's.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .adapters.peft_format import load_adapter, save_adapter
from .config import LoraConfig, TaskType
from .errors import UserError
from .nn.batch import BASE, Batch, batch, checkpoint_context, current_batch
from .nn.inject import activate, inject, parameter_counts, restore, state_of

_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Fresh heads that PEFT trains whole for these tasks."""


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Freeze the model, put a fresh adapter into it (in place) and wrap it.

    Raises ``UserError`` for targets that match nothing, and for a model that has adapters already.
    """
    if state_of(model).configs:
        raise UserError("the model has adapters already; use PeftModel.add_adapter, or delete them first")
    wanted = _HEADS.get(TaskType(peft_config.task_type), ()) if peft_config.task_type else ()
    heads = [name for name in wanted if isinstance(getattr(model, name, None), nn.Module)]
    if heads:
        saved = sorted({*(peft_config.modules_to_save or ()), *heads})
        peft_config = dataclasses.replace(peft_config, modules_to_save=saved)
    inject(model, peft_config, adapter_name, trainable=not peft_config.inference_mode)
    return PeftModel(model)


class PeftModel(nn.Module):
    """A model with adapters, under PEFT's method names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        """The adapted model itself."""

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False
    ) -> PeftModel:
        """Put an adapter from a folder or hub id into the model and wrap it. Raises ``UserError`` if it doesn't fit."""
        load_adapter(model, model_id, adapter_name, trainable=is_trainable)
        return cls(model)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; ``adapter_names`` gives each item of the batch its adapter (``"__base__"``: none)."""
        with self._rows(adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's ``generate``; ``adapter_names`` as in ``forward``."""
        with self._rows(adapter_names):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add a fresh adapter beside those there are; the active one stays active."""
        before = self.active_adapters
        inject(self.base_model, peft_config, adapter_name)
        activate(self.base_model, before)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Add a stored adapter beside those there are; the active one stays active."""
        before = self.active_adapters
        load_adapter(self.base_model, model_id, adapter_name, trainable=is_trainable)
        activate(self.base_model, before)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; they train unless ``inference_mode``, as in PEFT."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activate(self.base_model, names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model."""
        restore(self.base_model, adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside; the active adapters come back afterwards."""
        before = self.active_adapters
        activate(self.base_model, [])
        try:
            yield
        finally:
            activate(self.base_model, before)

    def unload(self) -> nn.Module:
        """Take all adapters out and return the model as it was found."""
        restore(self.base_model)
        return self.base_model

    def save_pretrained(self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None) -> None:
        """Write PEFT's two files; adapters other than ``default`` go into a subfolder of their name, as in PEFT."""
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_adapter(self.base_model, folder, name)

    def activation_checkpointing_enable(self, kwargs: dict[str, Any] | None = None) -> None:
        """The model's own, with recomputation that sees the ``adapter_names`` of its forward."""
        given = {"use_reentrant": False} | (kwargs or {})
        if not given["use_reentrant"]:
            given.setdefault("context_fn", checkpoint_context)
        self.base_model.activation_checkpointing_enable(given)  # type: ignore[operator]

    gradient_checkpointing_enable = activation_checkpointing_enable

    def get_base_model(self) -> nn.Module:
        """The wrapped model."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return parameter_counts(self.base_model)

    def print_trainable_parameters(self) -> None:
        """The line that every PEFT tutorial prints."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return state_of(self.base_model).configs

    @property
    def active_adapters(self) -> list[str]:
        return list(state_of(self.base_model).active.names)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first where several are."""
        names = self.active_adapters
        if not names:
            raise UserError("no adapter is active; set_adapter one")
        if len(names) > 1:
            warnings.warn(f"{len(names)} adapters are active, the first is returned", stacklevel=2)
        return names[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: nn.Module's own __init__ is still running
                raise
            return getattr(self.base_model, name)

    @contextmanager
    def _rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        state = state_of(self.base_model)
        unknown = sorted({*adapter_names} - {BASE, *state.configs})
        if unknown:
            raise UserError(f"adapter_names: no adapter {', '.join(unknown)}; loaded are {', '.join(state.configs)}")
        if len(adapter_names) == 0:
            raise UserError("adapter_names is empty; give one name for each item of the batch")
        if self.base_model.training and any(map(_forgets_batches, self.base_model.modules())):
            raise UserError(
                "adapter_names with activation checkpointing needs PeftModel.activation_checkpointing_enable() without "
                "use_reentrant, so that recomputed layers see the same adapters; call it on this model"
            )
        owners = sorted(state.biases.keys() & {*adapter_names, *state.active.names})
        if owners:
            raise UserError(
                f"adapter_names: {owners[0]!r} has biases of its own, which all rows of a mixed batch would get; "
                "use it alone with set_adapter, and mix others while it is not active"
            )
        facts = current_batch()
        lengths, dropout = (None, None) if facts is None else (facts.lengths, facts.dropout)
        with batch(Batch(lengths=lengths, adapters=tuple(adapter_names), dropout=dropout)):
            yield


def _forgets_batches(module: nn.Module) -> bool:
    """Whether the module's checkpointing runs its forward again without the facts about the batch."""
    run = getattr(module, "_gradient_checkpointing_func", None)
    is_on = getattr(module, "gradient_checkpointing", False) and module.training
    return is_on and "context_fn" not in getattr(run, "keywords", {})
