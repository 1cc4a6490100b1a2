"""Token-weighted loss over held-out examples, by the same forward that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.render import Tokens
from .forward import LanguageModel, evaluation_mode


def mean_loss(
    language_model: LanguageModel,
    examples: Sequence[Tokens],
    micro_batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """(mean loss in nats over all supervised tokens, their number); perplexity is its exponential.

    ``progress(done, total)`` is called after each micro-batch.
    """
    total, supervised = 0.0, 0
    micro_batches = language_model.pack(examples, micro_batch_tokens)
    with evaluation_mode(language_model.model):
        for done, packed in enumerate(micro_batches, 1):
            total += language_model.loss(packed).item()
            supervised += packed.num_supervised
            if progress is not None:
                progress(done, len(micro_batches))
    return total / max(1, supervised), supervised
