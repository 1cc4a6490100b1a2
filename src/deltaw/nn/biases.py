"""Trained biases (``bias="all"`` or ``"lora_only"``): parameters of the base that belong to one adapter.

A bias is trained in place, since it is the base's own parameter; the base's values are kept beside it. While the
adapter is active its values stand in the model, otherwise the base's do, so that a base without adapters is always
exactly the base. One adapter at a time can own the biases, as in PEFT.
"""

from __future__ import annotations

from torch import Tensor, nn


class TrainedBiases:
    """The biases of one adapter, and the base's values while the adapter's stand in the model."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        """Biases by their name in the model without adapters."""
        self._other = {name: p.detach().clone() for name, p in parameters.items()}
        self.is_in_place = True

    def switch(self, *, on: bool) -> None:
        """Put the adapter's values (on) or the base's (off) into the model; the others are kept here."""
        if on == self.is_in_place:
            return
        mine = {name: p.detach().clone() for name, p in self.parameters.items()}  # all first: two may be one (tied)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self._other[name])
        self._other, self.is_in_place = mine, on

    def train(self, trainable: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(trainable)

    def values(self) -> dict[str, Tensor]:
        """The adapter's biases, wherever they are."""
        return {n: p.detach() if self.is_in_place else self._other[n] for n, p in self.parameters.items()}
