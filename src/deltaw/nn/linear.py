"""A linear layer of the base with named adapters beside it, held apart from its storage.

``forward`` is pure: it changes no weight and unmerges nothing. With no adapter active it is the base layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..ops.adapted import Projection, Segment, adapted_group
from ..ops.dropout import DropoutKey, DropoutMask
from ..ops.frozen import FrozenWeight
from ..ops.source import Itself
from .batch import current_batch
from .lowrank import LowRankBeside, runs
from .merged import dense_weight, merged_weight, with_weight
from .storage import frozen_weight


class AdaptedLinear(LowRankBeside):
    """y = x·Wᵀ + b, plus the active adapters' parts, for ``nn.Linear`` and transformers' ``Conv1D``."""

    @property
    def storage(self) -> FrozenWeight:
        return frozen_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.storage.in_features

    @property
    def out_features(self) -> int:
        return self.storage.out_features

    def merged_layer(self, base: nn.Module, names: Sequence[str]) -> nn.Module:
        """A plain layer that computes what ``base`` and these adapters do together; at least one must be here."""
        adapters = [self.adapter(name) for name in names if name in self.adapters]
        return with_weight(base, merged_weight(dense_weight(base), adapters))

    def forward(self, x: Tensor) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        projection = self.projection(x_TK.shape[0])
        if not projection.segments:
            return self.base_layer(x)  # type: ignore[no-any-return]
        (y_TN,) = adapted_group([x_TK], Itself(), [projection])
        return y_TN.view(*x.shape[:-1], y_TN.shape[-1])

    def projection(self, num_rows: int) -> Projection:
        """What this layer does to ``num_rows`` rows of the batch that is going through."""
        return Projection(self.storage, tuple(self._segments(num_rows)), self.bias)

    def _segments(self, num_rows: int) -> Iterator[Segment]:
        for rows, name in runs(self.active, num_rows):
            if name in self.adapters:
                adapter = self.adapter(name)
                yield Segment(
                    rows=rows,
                    a_RK=adapter.lora_A,
                    b_NR=adapter.lora_B,
                    scaling=adapter.scaling,
                    column_scale_N=self.column_scale(name),
                    mask=self._mask(adapter.dropout, rows.start),
                    start=adapter.start,
                )

    def _mask(self, p: float, first_row: int) -> DropoutMask | None:
        if not self.training or p == 0:
            return None
        facts = current_batch()
        key = facts.dropout if facts is not None else None
        if key is None:
            # Outside our training loop torch's generator decides, so that torch.manual_seed means what it always does
            # and checkpointing, which restores that generator, draws the same mask again.
            key = DropoutKey(seed=int(torch.randint(2**62, ()).item()), step=0)
        return key.mask(p, self.name, first_row)

    def extra_repr(self) -> str:
        return f"active={list(self.active.names)}"
