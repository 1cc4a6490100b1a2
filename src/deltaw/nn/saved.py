"""``modules_to_save``: a module of the base trained whole, one copy an adapter, beside the frozen original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BASE, current_batch
from .lowrank import Active, Named


class SavedModule(nn.Module):
    """Passes to the active adapter's copy; to the original where no active adapter has one."""

    def __init__(self, base_layer: nn.Module, name: str, active: Active) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.name = name
        self.active = active
        self.copies = Named()

    @property
    def weight(self) -> Tensor:
        """The weight in use, for code that looks (tied embeddings, chunked losses)."""
        return self.in_use().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.in_use(), "bias", None)

    def fresh_copy(self) -> nn.Module:
        """A copy of the original for one adapter, cut loose from whatever the original is tied to."""
        return copy.deepcopy(self.base_layer)

    def in_use(self) -> nn.Module:
        """The last active adapter's copy; the original where none has one."""
        name = next((name for name in reversed(self.active.names) if name in self.copies), None)
        return self.base_layer if name is None else self.copies[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        facts = current_batch()
        if facts is None or facts.adapters is None:
            return self.in_use()(x, *args, **kwargs)
        along = 0 if facts.lengths is None else 1  # examples that lie end to end are one row of tokens
        parts = []
        for rows, name in facts.runs(x.shape[along]):
            module = self.copies[name] if name != BASE and name in self.copies else self.base_layer
            parts.append(module(x.narrow(along, rows.start, rows.stop - rows.start), *args, **kwargs))
        return torch.cat(parts, along)
