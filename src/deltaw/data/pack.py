"""From the examples of one optimiser step to micro-batches without padding.

Job: lay examples end to end, in order, greedily, in rows of at most ``max_tokens``. The loss of a step is
Σ loss(target) / Σ num_supervised over its micro-batches, so where their borders fall changes nothing:

    hidden state at t  →  predicts token t+1     only if both lie in the same example and t+1 is supervised

An example's first token is therefore never a target, and no label crosses a boundary. Attention is kept from
crossing one by ``lengths`` (variable-length kernels) or ``position_ids_T`` (a 0 marks each start).

Shapes: T tokens of the micro-batch, S supervised tokens in it.

Left out: sorting by length (it would change the order a seed stands for), splitting an example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError
from .render import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One micro-batch. All tensors are int64 and on the CPU."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    """Restart at 0 with each example."""
    lengths: tuple[int, ...]
    """Tokens of each example, in order; they add up to T."""
    target_rows_S: torch.Tensor
    """The rows t whose hidden state predicts a supervised token; increasing."""
    targets_S: torch.Tensor
    """That token's id: ``input_ids_T[target_rows_S + 1]``."""
    row_offset: int
    """Index of this micro-batch's first token within the step. Dropout masks are keyed by row_offset + t, so
    that the numbers do not depend on how the step is cut up."""

    @property
    def num_supervised(self) -> int:
        """S; may be 0."""
        return len(self.targets_S)


def pack(examples: Sequence[Tokens], max_tokens: int) -> list[Packed]:
    """Micro-batches of at most ``max_tokens`` tokens; a longer example has one to itself."""
    if max_tokens < 1:
        raise UserError(f"--micro-batch-tokens {max_tokens} holds no example; expected at least 1")
    batches: list[Packed] = []
    row_offset = 0
    for group in _groups(examples, max_tokens):
        batches.append(_lay(group, row_offset))
        row_offset += len(batches[-1].input_ids_T)
    return batches


def _groups(examples: Sequence[Tokens], max_tokens: int) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    num_tokens = 0
    for example in examples:
        length = len(example.input_ids)
        assert length, f"{example.origin} has no tokens; render_all leaves such examples out"
        if group and num_tokens + length > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(example)
        num_tokens += length
    if group:
        yield group


def _lay(group: list[Tokens], row_offset: int) -> Packed:
    lengths = tuple(len(example.input_ids) for example in group)
    input_ids_T = torch.tensor([token for example in group for token in example.input_ids])
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    supervised_T = torch.tensor([flag for example in group for flag in example.supervised])
    target_rows_S = torch.nonzero(supervised_T & (position_ids_T > 0)).squeeze(1) - 1
    return Packed(
        input_ids_T=input_ids_T,
        position_ids_T=position_ids_T,
        lengths=lengths,
        target_rows_S=target_rows_S,
        targets_S=input_ids_T[target_rows_S + 1],
        row_offset=row_offset,
    )
