"""The training data as batches that an EVA start looks at (``nn/eva.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data.loader import StepSampler
from ..data.pack import Packed
from ..data.render import Tokens
from ..nn.eva_state import EvaBatch
from .forward import LanguageModel
from .options import TrainOptions


@dataclass(frozen=True)
class EvaBatches:
    """Examples in the order and the micro-batches of training's first epoch; may be gone through again."""

    language_model: LanguageModel
    examples: Sequence[Tokens]
    options: TrainOptions

    def __iter__(self) -> Iterator[EvaBatch]:
        options = self.options
        sampler = StepSampler(len(self.examples), options.examples_per_step, options.seed, epochs=1)
        for step in range(sampler.num_steps):
            chosen = [self.examples[i] for i in sampler.indices(step)]
            for packed in self.language_model.pack(chosen, options.micro_batch_tokens):
                yield EvaBatch(partial(self.language_model.loss, packed), _supervised(packed))


def _supervised(packed: Packed) -> Tensor:
    """Which tokens have a label, bool [T]: those that are themselves to be predicted, as in PEFT."""
    counts_T = torch.zeros(len(packed.input_ids_T), dtype=torch.bool)
    counts_T[packed.target_rows_S + 1] = True
    return counts_T
