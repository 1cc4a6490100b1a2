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
    """Whether the first line of ``answer`` is the same JSON object as ``wanted``: spacing and order don't count.

    Only the first line counts: talking on is neither rewarded nor punished.
    """
    found = parsed(answer)
    return found is not None and found == parsed(wanted)


def parsed(answer: str) -> dict[str, Any] | None:
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
