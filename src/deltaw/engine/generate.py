"""Generation by ``transformers``' own ``generate``: many prompts at once, or one as a stream of tokens.

Prompts of a batch are laid as [shared prefix][padding][rest], so that a prefix that all of them have (instructions,
worked examples) is computed once; positions are counted by the attention mask, which leaves the padding out. Where
attention looks back only so far (sliding windows, recurrent layers), padding inside would count: there, all padding
stands on the left.
Token ids only: text belongs to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from itertools import takewhile
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError

MAX_BATCH_TOKENS = 1 << 14
"""Tokens, prompts and answers together, whose keys and values are held at a time."""

MIN_SHARED_PREFIX = 32
"""Tokens below which a shared prefix is not worth a forward of its own."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature={self.temperature}, top_p={self.top_p}: expected ≥ 0, and within (0, 1]")


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt; returns the new tokens of each (without the end token), in the prompts' order.

    A batch has at most ``batch_size`` prompts, and as many as ``MAX_BATCH_TOKENS`` of cache hold.
    ``progress(done, total)`` is called after each batch. Raises ``UserError`` for an empty prompt or one that leaves
    no room for ``max_new_tokens`` in the model's context.
    """
    for i, prompt in enumerate(prompts):
        _check_prompt(model, prompt, sampling, f"prompt {i}")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours need the least padding
    answers: dict[int, list[int]] = {}
    while len(answers) < len(prompts):
        waiting = by_length[len(answers) :]
        fits = (len(prompts[i]) + sampling.max_new_tokens for i in waiting)
        rows = sum(1 for count, width in enumerate(fits, 1) if count * width <= MAX_BATCH_TOKENS)
        indices = waiting[: max(1, min(rows, batch_size))]
        answers |= zip(indices, _generate_batch(model, [list(prompts[i]) for i in indices], sampling), strict=True)
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def stream(model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling) -> Generator[int]:
    """Continue one prompt, a token at a time; closing the iterator stops the computation."""
    _check_prompt(model, prompt, sampling, "the prompt")
    tokens, stop = SimpleQueue[int | BaseException | None](), Flag()

    class Streamer(BaseStreamer):
        skipped_prompt = False

        def put(self, value: Tensor) -> None:
            if self.skipped_prompt:
                tokens.put(int(value))
            self.skipped_prompt = True

        def end(self) -> None:
            pass

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), stop.is_set())

    num_threads = torch.get_num_threads()  # torch counts them anew in a new thread

    def work() -> None:
        torch.set_num_threads(num_threads)
        try:
            ids = torch.tensor([list(prompt)], device=model.device)
            _run(model, ids, torch.ones_like(ids), sampling, streamer=Streamer(), stopping_criteria=[Stop()])
            tokens.put(None)
        except BaseException as error:  # handed over to the caller's thread, and raised there
            tokens.put(error)

    # A new thread starts without context: give it the caller's, which may say which adapters the batch has.
    thread = Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token not in _end_tokens(model):
                yield token
    finally:
        stop.set()
        thread.join()


def _generate_batch(model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    cache = DynamicCache(config=model.config)
    shared = _shared_prefix(prompts) if _sees_everything(model, cache) else 0
    width = max(len(prompt) for prompt in prompts)
    pad = _pad_token(model)
    ids = torch.tensor([p[:shared] + [pad] * (width - len(p)) + p[shared:] for p in prompts], device=model.device)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, shared : shared + width - len(prompt)] = 0
    kwargs: dict[str, Any] = {}
    if shared:
        with torch.no_grad():
            model.base_model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        kwargs["past_key_values"] = cache
    new = _run(model, ids, mask, sampling, **kwargs)[:, width:]
    ends = _end_tokens(model)
    return [_until(row.tolist(), ends) for row in new]


def _run(model: PreTrainedModel, ids: Tensor, mask: Tensor, sampling: Sampling, **kwargs: Any) -> Tensor:
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        kwargs |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    else:
        kwargs |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad(), _contiguous_at_head(model):
        return model.generate(  # type: ignore[no-any-return, operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=_pad_token(model),
            **kwargs,
        )


@contextmanager
def _contiguous_at_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the output head contiguous rows inside.

    ``generate`` cuts the last token of each prompt out of a prefill; torch multiplies such a strided batch by as many
    copies of the whole head as there are prompts: gigabytes, and most of the prefill's time.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _shared_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with; 0 where too few to matter. The last token of a prompt is never shared."""
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    shared = min(shared, min(len(prompt) for prompt in prompts) - 1)
    return shared if len(prompts) > 1 and shared >= MIN_SHARED_PREFIX else 0


def _sees_everything(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether every layer attends to all that came before, so that where padding lies doesn't matter."""
    has_windows = getattr(model.config, "window_size", None) is not None  # GPT-Neo's, which its cache doesn't know
    return not has_windows and all(type(layer) is DynamicLayer for layer in cache.layers)


def _check_prompt(model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling, what: str) -> None:
    if not prompt:
        raise UserError(f"{what} is empty; give at least one token")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and len(prompt) + sampling.max_new_tokens > longest:
        raise UserError(
            f"{what} has {len(prompt)} tokens, with {sampling.max_new_tokens} new ones more than the model's "
            f"{longest}; shorten it, or ask for fewer new tokens"
        )


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    end = None if model.generation_config is None else model.generation_config.eos_token_id
    end = model.config.get_text_config().eos_token_id if end is None else end
    return frozenset(() if end is None else [end] if isinstance(end, int) else end)


def _pad_token(model: PreTrainedModel) -> int:
    pad = model.config.get_text_config().pad_token_id
    return pad if pad is not None else next(iter(_end_tokens(model)), 0)


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
