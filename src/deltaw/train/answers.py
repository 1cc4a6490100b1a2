"""Answers to held-out examples, judged against what was wanted: the base of ``eval``, ``compare`` and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.formats import Example
from ..data.match import canonical, json_match, text_match
from ..data.render import prompt_ids
from ..engine.generate import Sampling, generate
from ..errors import UserError

MATCHES: dict[str, Callable[[str, str], bool]] = {"text": text_match, "json": json_match}
Match = Literal["text", "json"]


@dataclass(frozen=True)
class Answer:
    """One held-out example and what a model made of it."""

    prompt: str
    """The last thing the user said, for people to read."""
    wanted: str
    got: str
    is_match: bool


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    match: Match = "text",
    max_new_tokens: int = 256,
    shown: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Let the model, as its adapters now stand, answer every example greedily.

    ``shown`` are the prompts for people to read, where they are not the examples' own last user turns.
    Raises ``UserError`` for examples without an answer to compare with (plain text, or no JSON object for "json").
    """
    asked = [prompt_ids(example, tokenizer) for example in examples]
    if match == "json":
        _check_json(examples, [wanted for _, wanted in asked])
    found = generate(model, [ids for ids, _ in asked], Sampling(max_new_tokens=max_new_tokens), progress=progress)
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in found]
    is_match = MATCHES[match]
    return [
        Answer(readable(example) if shown is None else shown[i], wanted.strip(), text, is_match(wanted, text))
        for i, (example, (_, wanted), text) in enumerate(zip(examples, asked, texts, strict=True))
    ]


def _check_json(examples: Sequence[Example], wanted: Sequence[str]) -> None:
    """An answer that could never match would make a count of zero look like the model's fault."""
    bad = [example.origin for example, text in zip(examples, wanted, strict=True) if canonical(text) is None]
    if bad:
        raise UserError(
            f"match json: {len(bad)} of {len(wanted)} wanted answers are no JSON object (first: {bad[0]}); "
            "compare as text, or repair the data"
        )


def exact_match(found: Sequence[Answer]) -> float:
    """Share of answers that match."""
    return sum(answer.is_match for answer in found) / max(1, len(found))


def readable(example: Example) -> str:
    """What the user said last, or the prompt of a completion."""
    messages = getattr(example, "messages", None)
    if messages is None:
        return str(getattr(example, "prompt", ""))
    return next((str(m.get("content") or "") for m in reversed(messages) if m["role"] == "user"), "")
