"""Asking a model that was never trained, fairly, and judging any model's answer.

Answers are compared as JSON objects, so that spacing and the order of keys never count against a model. Only
the first line counts: it is what was asked for, and talking on is neither rewarded nor punished. An answer is
untrusted text: whatever it holds, it is read in bounded time and is right or wrong, never an error.
"""

import json
from functools import cache
from typing import Any, Final

from deltaw.data.tickets.make import FIELDS, Example, Message, make_tickets
from deltaw.data.tickets.wording import PROBLEMS, URGENCIES, WISHES

MAX_ANSWER_CHARS: Final = 4_000

INSTRUCTIONS: Final = f"""\
You read messages from customers of a web shop and fill in support tickets. Answer with one line of JSON, \
nothing else. The keys are:
"product": the product that was ordered, copied exactly from the message, without "my" or "the".
"order": the order number, copied exactly with all its signs; null if the message has none.
"problem": what went wrong, one of {json.dumps(PROBLEMS)}.
"wish": what the customer asks for, one of {json.dumps(WISHES)}.
"urgency": one of {json.dumps(URGENCIES)}: "high" if the message says that it is urgent, "normal" otherwise."""


def fair_prompt(example: Example) -> list[Message]:
    """The chat that asks a model without training for the ticket of ``example``'s message.

    It gets what training would have taught: the keys, every allowed value, and three worked examples.
    """
    turns = [turn for worked in _worked_examples() for turn in worked["messages"][1:]]
    turns.append(example["messages"][1])
    return [{"role": "system", "content": INSTRUCTIONS}, *(dict(turn) for turn in turns)]


def is_match(wanted: str, answer: str) -> bool:
    """Whether the first line of ``answer`` is the same JSON object as ``wanted``."""
    found = _parsed(answer)
    return found is not None and found == _parsed(wanted)


def field_matches(wanted: str, answer: str) -> dict[str, bool]:
    """For each of ``FIELDS``, whether ``answer`` has it right; all False where it is not a JSON object."""
    expected, found = json.loads(wanted), _parsed(answer)
    return {field: found is not None and field in found and found[field] == expected[field] for field in FIELDS}


@cache
def _worked_examples() -> tuple[Example, ...]:
    """Three fixed training examples of three problems and wishes; the first has no order number."""
    fresh = ("product", "order", "problem", "wish")
    chosen: list[tuple[Example, dict[str, Any]]] = []
    for example in make_tickets("train", 200, seed=1):
        answer = json.loads(example["messages"][2]["content"])
        is_new = all(answer[field] != other[field] for _, other in chosen for field in fresh)
        if is_new and (chosen or answer["order"] is None):
            chosen.append((example, answer))
    return tuple(example for example, _ in chosen[:3])


def _parsed(answer: str) -> dict[str, Any] | None:
    """The object on the first line of ``answer``, or None where there is none that may be trusted."""
    lines = answer.strip().splitlines()
    if not lines or len(lines[0]) > MAX_ANSWER_CHARS:
        return None
    try:
        found = json.loads(lines[0], parse_constant=_refuse, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found
