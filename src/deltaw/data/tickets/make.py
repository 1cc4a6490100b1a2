"""Tickets of a split, balanced and reproducible, and the messages that mean them.

A ticket is drawn fields first: problems in turn, and for each problem every pair of wish and urgency in turn,
so that no class predicts another (only ``_wishes_for`` leaves a pair out). Then its message is put together
from sentences, which come from decks too: a few hundred messages show every phrasing of the bank. All
randomness comes from one ``random.Random`` seeded with a string, which gives the same tickets in every
process and on every Python from 3.11 on. Fewer tickets of the same seed are the first of more.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar, get_args

from ...errors import UserError
from .heldout import HELDOUT
from .train import TRAIN
from .wording import PROBLEMS, URGENCIES, WISHES, Wording

T = TypeVar("T")
Split = Literal["train", "heldout"]
Message = dict[str, str]
Example = dict[str, list[Message]]

FIELDS: Final = ("product", "order", "problem", "wish", "urgency")
SYSTEM_PROMPT: Final = "Ticket as JSON."
COMPACT: Final = (",", ":")
"""Separators of the answers' JSON: without spaces it is a fifth shorter to train on and to decode."""

# How often a message has each of these; the splits differ in their phrases, not in their manners.
ORDERS_IN_TWENTY: Final = 15
BRACKETED: Final = 0.5
GREETED: Final = 0.2
SIGNED: Final = 0.2
LOWER_CASE: Final = 0.1

# P: the problem, N: the order number, W: the wish, U: the urgency.
LAYOUTS: Final = ("PNWU", "PWNU", "NPWU", "PWUN", "PNUW", "UPNW", "WPNU", "PUWN", "WPUN", "NPUW")
_LETTERS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, as real order numbers are

_BANKS: Final[dict[str, Wording]] = {"train": TRAIN, "heldout": HELDOUT}


def make_tickets(split: Split, count: int, seed: int = 0) -> list[Example]:
    """``count`` chat examples of ``split``, all different: system, customer's message, JSON answer.

    Raises ``UserError`` for a split that does not exist or a negative count.
    """
    if split not in _BANKS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(get_args(Split))}")
    if count < 0:
        raise UserError(f"count is {count}; expected 0 or more tickets")
    return list(islice(_examples(_BANKS[split], random.Random(f"{split}:{seed}")), count))


def write_tickets(path: str | Path, split: Split, count: int, seed: int = 0) -> Path:
    """Write ``make_tickets(split, count, seed)`` to ``path``, one JSON object a line; return the path."""
    path = Path(path)
    examples = make_tickets(split, count, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    return path


@dataclass(frozen=True, kw_only=True)
class _Ticket:
    """What a message means: the ``FIELDS``."""

    product: str
    order: str | None
    problem: str
    wish: str
    urgency: str

    def answer(self) -> str:
        """One line of JSON, without spaces."""
        fields = {field: getattr(self, field) for field in FIELDS}
        return json.dumps(fields, ensure_ascii=False, separators=COMPACT)


class _Deck(Generic[T]):
    """Deals its items in random order, every one once before any comes again."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items = tuple(items)
        self._rng = rng
        self._left: list[T] = []

    def draw(self) -> T:
        """The next item, after shuffling anew where all have been dealt."""
        if not self._left:
            self._left = list(self._items)
            self._rng.shuffle(self._left)
        return self._left.pop()


class _Composer:
    """Writes messages out of one bank, with one source of randomness."""

    def __init__(self, wording: Wording, rng: random.Random) -> None:
        def decks(banks: Mapping[str, tuple[str, ...]]) -> dict[str, _Deck[str]]:
            return {name: _Deck(bank, rng) for name, bank in banks.items()}

        self._rng = rng
        self._problems = decks(wording.problems)
        self._wishes = decks(wording.wishes)
        self._urgent = _Deck(wording.urgent, rng)
        self._brackets = _Deck(wording.brackets, rng)
        self._number_sentences = _Deck(wording.number_sentences, rng)
        self._greetings = _Deck(wording.greetings, rng)
        self._sign_offs = _Deck(wording.sign_offs, rng)
        self._layouts = _Deck(LAYOUTS, rng)

    def message(self, ticket: _Ticket) -> str:
        """A message that states every field of ``ticket``, and nothing that would change one."""
        problem, number = self._problems[ticket.problem].draw(), ""
        if ticket.order is not None:
            if self._happens(BRACKETED):
                problem = problem.replace("{product}", "{product} " + self._brackets.draw())
            else:
                number = self._number_sentences.draw()
        sentences = {
            "P": problem,
            "N": number,
            "W": self._wishes[ticket.wish].draw(),
            "U": self._urgent.draw() if ticket.urgency == "high" else "",
        }
        parts = [sentences[part] for part in self._layouts.draw()]
        if self._happens(GREETED):
            parts.insert(0, self._greetings.draw())
        if self._happens(SIGNED):
            parts.append(self._sign_offs.draw())
        text = " ".join(part for part in parts if part)
        if self._happens(LOWER_CASE):
            text = text.lower()  # the slots are still open, so that the copied fields keep their capitals
        return text.format(product=ticket.product, order=ticket.order)

    def _happens(self, probability: float) -> bool:
        return self._rng.random() < probability


def _examples(wording: Wording, rng: random.Random) -> Iterator[Example]:
    """Endless examples, no message twice."""
    composer = _Composer(wording, rng)
    seen: set[str] = set()
    for ticket in _tickets(wording, rng):
        message = composer.message(ticket)
        while message in seen:
            message = composer.message(ticket)
        seen.add(message)
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": message},
                {"role": "assistant", "content": ticket.answer()},
            ]
        }


def _tickets(wording: Wording, rng: random.Random) -> Iterator[_Ticket]:
    """Endless tickets: what the next customer has bought, suffered and wants."""
    brands, things = _Deck(wording.brands, rng), _Deck(wording.things, rng)
    formats = _Deck(wording.numbers, rng)
    is_numbered = _Deck([place < ORDERS_IN_TWENTY for place in range(20)], rng)
    problems = _Deck(PROBLEMS, rng)
    cells = {problem: _Deck(list(product(_wishes_for(problem), URGENCIES)), rng) for problem in PROBLEMS}
    while True:
        problem = problems.draw()
        wish, urgency = cells[problem].draw()
        yield _Ticket(
            product=f"{brands.draw()} {things.draw()}",
            order=_number(formats.draw(), rng) if is_numbered.draw() else None,
            problem=problem,
            wish=wish,
            urgency=urgency,
        )


def _wishes_for(problem: str) -> tuple[str, ...]:
    """The wishes that make sense: nobody asks for a new product because of a wrong bill."""
    return tuple(wish for wish in WISHES if problem != "billing" or wish != "replacement")


def _number(pattern: str, rng: random.Random) -> str:
    """An order number in the format ``pattern`` (see ``Wording.numbers``)."""
    draw = {"9": "0123456789", "@": _LETTERS}
    return "".join(rng.choice(draw.get(sign, sign)) for sign in pattern)
