"""From an example to token ids, and which of them are targets.

Job: render an example to one text, tokenise that text once, and mark the tokens the model is to predict.

- Chat: the tokenizer's own chat template. It writes BOS if the model wants one, so none is added. Targets are
  the assistant's turns (but those of weight 0) up to and including the token that ends them, never the scaffolding
  behind it.
- Chat without a template (base models): "### System:", "### User:", "### Assistant:" and "### Tool:", each on
  a line above its text, an empty line between turns, EOS straight after every assistant text.
- Completion: prompt + completion + EOS; completion and EOS are targets.
- Text: text + EOS, all targets. Completion and Text get BOS if the tokenizer adds one, and never twice.

A token that straddles the border of a target text is a target: it carries the answer's first characters,
which nothing else would teach. At inference the prompt is tokenised alone and such a token cannot come up, so
a prompt should not end in a space, nor an answer begin with a line break.

Where the assistant's turns lie in a conversation is ``conversation``'s business.

Left out: packing and padding (see ``pack``), truncation other than keeping the beginning, images, special
tokens written out in a user's text (the tokenizer takes them for real).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import UserError
from .conversation import Span, chat_text, check_tools, end_of_text, turn_spans
from .formats import Chat, Completion, Example, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LossOn: TypeAlias = Literal["assistant", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One example as the model sees it; ``supervised[i]`` says that token i is a target to be predicted."""

    input_ids: list[int]
    supervised: list[bool]
    origin: str
    num_truncated: int = 0
    """Tokens cut off the end to keep to the maximum length."""

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.supervised)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A rendered data set, and what became of it."""

    examples: list[Tokens]
    """Those with at least one target, in order."""
    num_examples: int
    """All that were given."""
    num_truncated: int
    truncated_tokens: int
    num_unsupervised_after_truncation: int
    """Left out of ``examples``: nothing in them is a target, mostly because truncation cut the answer off."""
    first_unsupervised: str | None
    """Origin of the first of those."""


def render_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """Render every example; ``progress(done, total)`` is called after each.

    Raises UserError if no example has a target left.
    """
    kept: list[Tokens] = []
    unsupervised: list[Tokens] = []
    for done, example in enumerate(examples, 1):
        tokens = render(example, tokenizer, loss_on=loss_on, max_length=max_length)
        (kept if any(tokens.supervised) else unsupervised).append(tokens)
        if progress is not None:
            progress(done, len(examples))
    if not kept:
        first = unsupervised[0].origin if unsupervised else "an empty list"
        raise UserError(
            f"nothing is supervised: none of {len(examples)} examples has a part of an answer within --max-length "
            f"{max_length} (first: {first}); raise it, or count all tokens with --loss-on all"
        )
    everything = [*kept, *unsupervised]
    return Rendered(
        examples=kept,
        num_examples=len(examples),
        num_truncated=sum(tokens.num_truncated > 0 for tokens in everything),
        truncated_tokens=sum(tokens.num_truncated for tokens in everything),
        num_unsupervised_after_truncation=len(unsupervised),
        first_unsupervised=unsupervised[0].origin if unsupervised else None,
    )


def render(
    example: Example,
    tokenizer: Tokenizer,
    *,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Tokens:
    """The tokens of one example. "all" makes every token a target but the first, which nothing predicts."""
    if loss_on not in ("assistant", "all"):
        raise UserError(f"--loss-on {loss_on!r} is unknown; expected assistant or all")
    if max_length is not None and max_length < 2:
        raise UserError(f"--max-length {max_length} leaves nothing to predict; expected at least 2")
    text, spans = _layout(example, tokenizer, loss_on)
    ids, offsets = _tokenise(text, tokenizer, example.origin, is_templated=_is_templated(example, tokenizer))
    supervised = [True] * len(ids) if loss_on == "all" else _overlaps(offsets, spans)
    supervised[:1] = [False] * len(ids[:1])
    kept = len(ids) if max_length is None else max_length
    return Tokens(
        input_ids=ids[:kept],
        supervised=supervised[:kept],
        origin=example.origin,
        num_truncated=max(0, len(ids) - kept),
    )


def prompt_ids(example: Example, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """For evaluation by generation: the ids up to the last answer that is to be learnt, and the text wanted there."""
    match example:
        case Text():
            raise UserError(f"{example.origin}: a text has no prompt to generate from; use a chat or prompt format")
        case Completion():
            text, wanted = example.prompt, example.completion
        case Chat():
            turns = (i for i, message in enumerate(example.messages) if message["role"] == "assistant")
            last = max(i for i in turns if i not in example.unsupervised)
            text = chat_text(example, tokenizer, last, is_prompt=True)
            wanted = example.messages[last].get("content") or ""
    ids, _ = _tokenise(text, tokenizer, example.origin, is_templated=_is_templated(example, tokenizer))
    if not ids:
        raise UserError(f"{example.origin}: the prompt is empty and the tokenizer has no BOS to start from")
    return ids, wanted


def preview(tokens: Tokens, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Runs of (text, supervised), for a person to check what will be learnt."""
    runs: list[tuple[list[int], bool]] = []
    for token, is_target in zip(tokens.input_ids, tokens.supervised, strict=True):
        if not runs or runs[-1][1] != is_target:
            runs.append(([], is_target))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), flag) for ids, flag in runs]


def _layout(example: Example, tokenizer: Tokenizer, loss_on: LossOn) -> tuple[str, list[Span]]:
    """The full text, and the spans of it that are targets (unused where everything is)."""
    match example:
        case Text():
            text = example.text + end_of_text(tokenizer)
            return text, [(0, len(text))]
        case Completion():
            text = example.prompt + example.completion + end_of_text(tokenizer)
            return text, [(len(example.prompt), len(text))]
        case Chat():
            text = chat_text(example, tokenizer, len(example.messages))
            check_tools(example, tokenizer)
            return text, [] if loss_on == "all" else turn_spans(example, tokenizer, text)


def _is_templated(example: Example, tokenizer: Tokenizer) -> bool:
    return isinstance(example, Chat) and tokenizer.chat_template is not None


def _tokenise(text: str, tokenizer: Tokenizer, origin: str, *, is_templated: bool) -> tuple[list[int], list[Span]]:
    """Ids and character offsets. The tokenizer's BOS is kept unless the text has it; its EOS is dropped."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer")
    has_bos = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    try:
        encoding: Any = tokenizer(
            text,
            add_special_tokens=not (is_templated or has_bos),
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,  # "longer than the model's maximum" is answered by max_length, and counted
        )
    except TypeError as error:
        raise UserError(f"{origin}: holds half a surrogate pair, which is no text; repair the \\u escape") from error
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    while ids and offsets[-1] == (0, 0) and ids[-1] != tokenizer.bos_token_id:  # EOS or SEP: the text has its own
        ids.pop()
        offsets.pop()
    return ids, offsets


def _overlaps(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token shares a character with a span; both lists are in order."""
    flags = []
    remaining = iter([*spans, (sys.maxsize, sys.maxsize)])
    start, stop = next(remaining)
    for begin, end in offsets:
        # Byte-level tokenizers may trim spaces off a token; one of spaces alone is then empty, at its end.
        first = min(begin, end - 1)
        while stop <= first:
            start, stop = next(remaining)
        flags.append(first < stop and end > start)
    return flags
