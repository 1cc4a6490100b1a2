"""What the layers must know about the batch that is going through: said once a forward, read by whoever needs it.

How tokens lie (examples end to end), which adapter each row belongs to, and where dropout masks come from are facts
about a batch, not about a model. They stand in a context variable, so that no model's signature changes and no hook
is needed.

Gradient checkpointing runs a layer's forward a second time during backward, when the context may have ended:
``checkpoint_context`` is the ``context_fn`` that carries the batch of the first forward into the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from ..ops.dropout import DropoutKey

BASE = "__base__"
"""The adapter name that stands for no adapter (PEFT's word)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Facts about one forward."""

    lengths: tuple[int, ...] | None = None
    """Lengths of examples laid end to end in one row; None for an ordinary batch of rows."""
    adapters: tuple[str, ...] | None = None
    """One adapter name for each item of the batch (``BASE`` for none); None: whatever is active."""
    dropout: DropoutKey | None = None
    """Where dropout masks come from; None: a fresh key from torch's generator at each layer."""
    counts_changes: bool = False
    """Whether whoever trains counts every change of a weight (in torch's ``_version``), which fused optimisers do not
    by themselves: then what was derived from weights may be kept from one forward to the next."""

    def runs(self, num_rows: int) -> Iterator[tuple[slice, str]]:
        """(rows, adapter) for neighbours with one adapter, base included, where a layer sees ``num_rows`` rows.

        A layer sees all tokens of all items, so an item has ``num_rows / items`` rows there (beams included); of
        examples laid end to end each has its own length.
        """
        assert self.adapters is not None
        sizes = self.lengths or (num_rows // max(len(self.adapters), 1),) * len(self.adapters)
        if len(sizes) != len(self.adapters) or sum(sizes) != num_rows:
            raise ValueError(
                f"adapter_names has {len(self.adapters)} names, which {num_rows} rows can't be shared out to; "
                "give one name for each item of the batch"
            )
        start = 0
        for name, group in groupby(zip(self.adapters, sizes, strict=True), key=itemgetter(0)):
            stop = start + sum(size for _, size in group)
            yield slice(start, stop), name
            start = stop


_current: ContextVar[Batch | None] = ContextVar("deltaw_batch", default=None)


def current_batch() -> Batch | None:
    """The batch whose forward is running, if it said anything."""
    return _current.get()


@contextmanager
def batch(facts: Batch | None) -> Iterator[None]:
    """Run a forward with these facts about its batch."""
    token = _current.set(facts)
    try:
        yield
    finally:
        _current.reset(token)


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` for ``torch.utils.checkpoint``: the recomputation sees the batch that the forward saw."""
    return nullcontext(), batch(current_batch())
