"""Asking a model that was never trained, fairly. (Answers are judged by ``data.match``.)"""

import json
from functools import cache
from typing import Any, Final

from .make import Example, Message, make_tickets
from .wording import PROBLEMS, URGENCIES, WISHES

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
