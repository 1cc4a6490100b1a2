"""The classes of a ticket, and the shape of a phrase bank: everything that one split may say.

A bank holds sentences, not messages; ``make`` puts them together. Two slots: ``{product}`` in the sentences
that tell a problem, ``{order}`` in those that name the order number. A sentence states one field only: a
problem says nothing of a wish, a wish nothing of urgency. Left out on purpose: anything about which two
careful readers could disagree, and every noun that could be taken for the product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

PROBLEMS: Final = ("broken", "late", "wrong item", "billing")
WISHES: Final = ("refund", "replacement", "callback")
URGENCIES: Final = ("high", "normal")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """All that one split may say."""

    brands: tuple[str, ...]
    """First halves of product names, with a colour or a model number in some."""
    things: tuple[str, ...]
    """Second halves: singular, and able to break, to be sent and to be paid for."""
    numbers: tuple[str, ...]
    """Formats of order numbers: ``9`` stands for a digit, ``@`` for a capital letter, the rest for itself."""
    problems: Mapping[str, tuple[str, ...]]
    """Sentences for each of ``PROBLEMS``, with ``{product}``."""
    wishes: Mapping[str, tuple[str, ...]]
    """Sentences for each of ``WISHES`` that fit any problem."""
    urgent: tuple[str, ...]
    """Sentences for the urgency "high"; who says nothing about time is "normal"."""
    brackets: tuple[str, ...]
    """Mentions of ``{order}`` that directly follow the product."""
    number_sentences: tuple[str, ...]
    """Sentences of their own that name ``{order}``."""
    greetings: tuple[str, ...]
    sign_offs: tuple[str, ...]

    def classified(self) -> tuple[str, ...]:
        """Every sentence that decides a class."""
        banks = (*self.problems.values(), *self.wishes.values(), self.urgent)
        return tuple(sentence for bank in banks for sentence in bank)

    def sentences(self) -> tuple[str, ...]:
        """Every sentence of the bank, for checks that two banks share none."""
        frames = (*self.brackets, *self.number_sentences, *self.greetings, *self.sign_offs)
        return (*self.classified(), *frames)


def lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of ``text``, stripped: lets a bank be written as plain lines, one phrase each."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def items(text: str) -> tuple[str, ...]:
    """The items of ``text``, which commas separate."""
    return tuple(" ".join(item.split()) for item in text.split(","))
