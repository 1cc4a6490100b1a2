"""The one exception that is a user's mistake and not ours."""

from enum import StrEnum
from reprlib import Repr


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was given, what was expected, what to do.

    The command line prints the message on one line and exits with 2; from Python it is an ordinary ``ValueError``.
    """

    def __init__(self, message: str) -> None:
        """Names of files and tensors may hold anything: what would garble a terminal is escaped."""
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


_REPR = Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 1000
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 30


def short(value: object, limit: int = 80) -> str:
    """``repr`` for a message, bounded however large the value; enums as their value."""
    text = _REPR.repr(str(value) if isinstance(value, StrEnum) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
