"""The one exception that is a user's mistake and not ours."""

from enum import StrEnum


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was given, what was expected, what to do.

    The command line prints the message on one line and exits with 2; from Python it is an ordinary ``ValueError``.
    """


def short(value: object, limit: int = 80) -> str:
    """``repr`` for a message, bounded; enums as their value."""
    try:
        text = repr(str(value)) if isinstance(value, StrEnum) else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
