"""Whether an answer is the wanted one: as text, or as JSON.

An answer is untrusted text: whatever it holds, it is read in bounded time and is right or wrong, never an error.
"""

from __future__ import annotations

import json
from typing import Any, Final

MAX_ANSWER_CHARS: Final = 4_000


def text_match(wanted: str, answer: str) -> bool:
    """Whether two texts are the same but for white space around them."""
    return wanted.strip() == answer.strip()


def json_match(wanted: str, answer: str) -> bool:
    """Whether ``answer`` is the same JSON object as ``wanted``: spacing and the order of keys don't count.

    The object may be all of the answer or its first line: talking on after it is neither rewarded nor punished.
    """
    expected = canonical(wanted)
    first_line = answer.strip().partition("\n")[0]
    return expected is not None and expected in (canonical(answer), canonical(first_line))


def canonical(text: str) -> str | None:
    """The JSON object that ``text`` is, in one spelling; None where it is none, or one that can't be trusted."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    try:
        found = json.loads(
            text, parse_constant=_refuse, parse_float=_number, parse_int=_number, object_pairs_hook=_without_repeats
        )
        # Compared as text: to Python, true is 1.
        return json.dumps(found, sort_keys=True, allow_nan=False) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def _number(digits: str) -> int | float:
    """A number as JSON means it: 1, 1.0 and 1e0 are one."""
    if digits.lstrip("-").isdecimal():
        return int(digits)
    value = float(digits)
    return int(value) if value.is_integer() else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found
