"""``adapter_names``: each item of a batch with its own adapter, for one forward of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..errors import UserError
from ..nn.batch import BASE, Batch, batch, current_batch
from ..nn.state import state_of


@contextmanager
def rows(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """Inside, item i of a batch goes through adapter i (``"__base__"``: none); None leaves it to what is active.

    Raises ``UserError`` for names that the model doesn't have, for an adapter with biases of its own, and for
    activation checkpointing that would forget the names when it runs a layer again.
    """
    if adapter_names is None:
        yield
        return
    state = state_of(model)
    unknown = sorted({*adapter_names} - {BASE, *state.configs})
    if unknown:
        raise UserError(f"adapter_names: no adapter {', '.join(unknown)}; loaded are {', '.join(state.configs)}")
    if len(adapter_names) == 0:
        raise UserError("adapter_names is empty; give one name for each item of the batch")
    if model.training and any(map(_forgets_batches, model.modules())):
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
