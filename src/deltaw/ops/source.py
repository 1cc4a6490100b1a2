"""What projections read: a tensor as it is, or one that is computed again in backward instead of being kept.

A norm's output and a gated activation's are each as large as their input and a pass over memory away from it, which
next to the products costs nothing. So backward gets h and r instead of norm(h), and g and u instead of act(g)∘u.

Each source is three functions: x and what must be kept; x again, bit for bit; and dx turned into its inputs' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .gate import Activation, gate, gate_backward, gate_reference
from .norm import RmsNorm, rms_norm_reference


class Source(Protocol):
    """How x [T, K] comes from some tensors."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x, and what is kept beside the inputs."""
        ...

    def again(self, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """x once more."""
        ...

    def backward(self, dx_TK: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of each input."""
        ...

    def reference(self, inputs: Sequence[Tensor]) -> Tensor:
        """The plain twin, with autograd's derivative."""
        ...


class Itself:
    """x is the input."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return inputs[0], []

    def again(self, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        return inputs[0]

    def backward(self, dx_TK: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (dx_TK,)

    def reference(self, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0]


@dataclass(frozen=True, slots=True)
class Normed:
    """x = norm(h)."""

    norm: RmsNorm

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x_TK, r_T = self.norm.forward(inputs[0])
        return x_TK, [r_T]

    def again(self, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        return self.norm.forward(inputs[0])[0]

    def backward(self, dx_TK: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.norm.backward(dx_TK, inputs[0], kept[0]),)

    def reference(self, inputs: Sequence[Tensor]) -> Tensor:
        return rms_norm_reference(inputs[0], self.norm)


@dataclass(frozen=True, slots=True)
class Gated:
    """x = act(g)∘u."""

    activation: Activation

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return gate(inputs[0], inputs[1], self.activation), []

    def again(self, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        return gate(inputs[0], inputs[1], self.activation)

    def backward(self, dx_TK: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return gate_backward(dx_TK, inputs[0], inputs[1], self.activation)

    def reference(self, inputs: Sequence[Tensor]) -> Tensor:
        return gate_reference(inputs[0], inputs[1], self.activation)
