"""Which examples a step sees: a pure function of the step, so resuming needs no state but its number.

Epoch e visits all N examples in the order of a permutation drawn from (seed, e). A step takes the next
``examples_per_step`` (G) of them; the last step of an epoch takes what is left and never reaches into the
next epoch. It is smaller; as a step's loss is normalised by its own supervised tokens, nothing else changes:

    steps_per_epoch = ⌈N / G⌉        step s is in epoch ⌊s / steps_per_epoch⌋

With several ranks each takes every ``num_shards``-th example of the step, from its own number on: the shares
are disjoint, together they are the step, and a rank may get none (it then adds nothing to the sum, but must
still take part in the reduction).

Left out: reading (``formats``), tokenising (``render``), laying out (``pack``), grouping by length.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import UserError


@dataclass(frozen=True, slots=True)
class StepSampler:
    """Indices of each step's examples. Training ends at ``epochs`` or ``max_steps``, whichever is first."""

    num_examples: int
    examples_per_step: int
    """Over all ranks: batch size times gradient accumulation."""
    seed: int
    epochs: int | None = None
    max_steps: int | None = None
    shard: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 1), ("examples_per_step", 1), ("seed", 0), ("num_shards", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}, expected at least {least}")
        if not 0 <= self.shard < self.num_shards:
            raise UserError(f"shard is {self.shard}, expected 0 to {self.num_shards - 1}")
        limits = {"epochs": self.epochs, "max_steps": self.max_steps}
        if self.epochs is None and self.max_steps is None:
            raise UserError("neither epochs nor max_steps is given, so training would never end; give one")
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise UserError(f"{name} is {limit}, expected at least 1")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.examples_per_step)

    @property
    def num_steps(self) -> int:
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            limits.append(self.epochs * self.steps_per_epoch)
        return min(limits)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that ``step`` belongs to."""
        self._check(step)
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """This shard's examples of ``step``, in the order in which they are laid out."""
        start = step % self.steps_per_epoch * self.examples_per_step
        order = _permutation(self.num_examples, self.seed, self.epoch_of(step))
        return [int(index) for index in order[start : start + self.examples_per_step][self.shard :: self.num_shards]]

    def _check(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside of 0 to {self.num_steps - 1}")


@lru_cache(maxsize=2)  # a cache only: steps come in order, so an epoch is shuffled once
def _permutation(num_examples: int, seed: int, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_examples)
