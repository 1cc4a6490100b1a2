"""What merging into a quantised base loses, in figures.

    Ŵ = stored(W'),  W' = W_q + ΔW        weight error ‖Ŵ − W'‖ / ‖W'‖        change error ‖Ŵ − W'‖ / ‖ΔW‖

Frobenius norms, pooled over the layers that were quantised and were merged into. The change error is the one to look
at: it says how much of what the adapter learnt goes under in rounding. That depends on how far the adapter went: a
dense bfloat16 result moves W' by about 0.16 %; quantised anew, a weight that ΔW moved by less than half a step of the
codebook goes back to where it was, and a small ΔW is lost nearly whole.

What it means for a model's answers is ``parity.py``'s to say. What quantising the base itself once lost is no loss of
merging, and in neither figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class LayerLoss(NamedTuple):
    """Squared norms of one layer."""

    lost: float
    """‖Ŵ − W'‖²."""
    weight: float
    """‖W'‖²."""
    change: float
    """‖ΔW‖²."""


@dataclass
class MergeLoss:
    """Filled by ``merge_and_unload``; empty where nothing that was quantised was merged into."""

    storage: str = ""
    """What W' was put into: a dtype, or a quantisation."""
    layers: dict[str, LayerLoss] = field(default_factory=dict)

    def add(self, name: str, *, before: Tensor, exact: Tensor, stored: Tensor) -> None:
        """One layer's W_q, W' and Ŵ, in one layout."""
        parts = (stored - exact, exact, exact - before)
        lost, weight, change = (torch.linalg.vector_norm(part.float()).item() ** 2 for part in parts)
        self.layers[name] = LayerLoss(lost, weight, change)

    @property
    def weight_error(self) -> float:
        """‖Ŵ − W'‖ / ‖W'‖ over all layers."""
        return _ratio(sum(layer.lost for layer in self.layers.values()), sum(x.weight for x in self.layers.values()))

    @property
    def change_error(self) -> float:
        """‖Ŵ − W'‖ / ‖ΔW‖ over all layers; over 1, rounding moves the weights further than the adapter does."""
        return _ratio(sum(layer.lost for layer in self.layers.values()), sum(x.change for x in self.layers.values()))

    @property
    def worst(self) -> str:
        """The layer of which the largest part of its change was lost."""
        return max(self.layers, key=lambda name: _ratio(self.layers[name].lost, self.layers[name].change))

    def figures(self) -> dict[str, float | str | None] | None:
        """As plain JSON values; None where nothing that was quantised was merged into."""
        if not self.layers:
            return None
        change = self.change_error if math.isfinite(self.change_error) else None
        return {"storage": self.storage, "weight_error": self.weight_error, "change_error": change}

    def __str__(self) -> str:
        if not self.layers:
            return "nothing that was quantised was merged into"
        drowned = "; rounding moves the weights further than the adapter did" if self.change_error > 1 else ""
        return (
            f"merged into {len(self.layers)} quantised layers, kept as {self.storage}: rounding moves the weights by "
            f"{self.weight_error:.2%}, which is {self.change_error:.1%} of what the adapter changed (most at "
            f"{self.worst}){drowned}"
        )


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0 if part == 0 else math.inf
