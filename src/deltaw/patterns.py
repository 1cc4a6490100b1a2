"""Names of modules and expressions over them, compared in bounded time.

A config may come from anyone, and ``re`` takes until tomorrow for an expression like ``(a+)+b``. ``regex`` reads the
same language and can be stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator

from .errors import UserError, short

MAX_PATTERN_CHARS = 10_000
"""A regular expression over module names that is longer than this was not written by a person."""

MAX_EXPRESSIONS = 100
"""Regular expressions in a config; plain names, of which a file may well have one a module, don't count."""

MAX_PATTERNS = 50_000
"""Names in a config: more than the modules of any model."""

MAX_UNROLLED_SIZE = 50_000
"""Parts of an expression with its repetitions written out: ``(a{1000}){1000}`` has a million."""

_MATCH_SECONDS = 0.3
"""CPU time that a config's expressions may take beyond the usual, all its matches together."""

_USUAL_SECONDS = 20e-6
"""What one match may always take; ordinary expressions need a tenth of it."""

_PLAIN = re.compile(r"\^?[\w.-]+")


class Matcher:
    """Matches one config's expressions; all matches share one allowance of time."""

    def __init__(self) -> None:
        self._seconds_left = _MATCH_SECONDS
        self._indexed: dict[int, tuple[object, object, list[str]]] = {}

    def fullmatch(self, expression: str, module: str) -> re.Match[str] | None:
        """``re.fullmatch`` in bounded time. Raises ``UserError`` when the time is up."""
        import regex  # type: ignore[import-untyped]

        started = time.thread_time()
        try:
            found: re.Match[str] | None = regex.fullmatch(expression, module, timeout=max(self._seconds_left, 1e-3))
        except (TimeoutError, regex.error, RecursionError, MemoryError) as error:
            self._seconds_left = 0.0
            reason = "takes too long to match" if isinstance(error, TimeoutError) else f"can't be matched: {error}"
            raise UserError(f"regular expression {short(expression)} {reason}; write it more simply") from None
        # Only what goes beyond the usual is counted: a config may be asked any number of times.
        self._seconds_left -= max(0.0, time.thread_time() - started - _USUAL_SECONDS)
        return found

    def key_for(self, patterns: Collection[str], module: str) -> str | None:
        """The first key that names ``module``, as PEFT matches it: a whole name, a dotted suffix, or an expression."""
        if not patterns:
            return None
        expressions = self._expressions(patterns)
        wanted = {tail for tail in (*tails_of(module), f"^{module}") if tail in patterns}
        if not expressions and len(wanted) < 2:  # no order to be looked up among (maybe very many) names
            return next(iter(wanted), None)
        if not wanted:
            return next((key for key in expressions if self._names(key, module)), None)
        tried = wanted.union(expressions)
        for key in patterns:
            if key in tried and (key in wanted or self._names(key, module)):
                return key
        return None

    def _names(self, expression: str, module: str) -> bool:
        return self.fullmatch(rf"(.*\.)?({expression})$", module) is not None

    def _expressions(self, patterns: Collection[str]) -> list[str]:
        """Those that are no mere names; looked for once in a dict, and again when it has changed."""
        if not isinstance(patterns, dict):
            return [key for key in patterns if not is_plain(key)]
        state = (len(patterns), next(reversed(patterns)))
        known = self._indexed.get(id(patterns))
        if known is None or known[0] is not patterns or known[1] != state:
            known = (patterns, state, [key for key in patterns if not is_plain(key)])
            self._indexed[id(patterns)] = known
        return known[2]


def tails_of(module: str) -> Iterator[str]:
    """A module's name and its dotted suffixes: every way in which a list can name it."""
    yield module
    while (dot := module.find(".")) >= 0:
        module = module[dot + 1 :]
        yield module


def is_plain(key: str) -> bool:
    """Whether a pattern is a mere name (``^`` before a whole one), which needs no expression to be compared."""
    return _PLAIN.fullmatch(key) is not None


def check_pattern(field_name: str, pattern: str, *, is_suffix: bool) -> None:
    """Raises ``UserError`` for what no expression is; ``is_suffix``: it will stand for the end of a name."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise UserError(f"{field_name}: a pattern of {len(pattern):,} characters (at most {MAX_PATTERN_CHARS:,})")
    try:
        re.compile(rf"(.*\.)?({pattern})$" if is_suffix else pattern)
        size = _unrolled_size(re._parser.parse(pattern))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{field_name}={short(pattern)} is not a regular expression: {error}") from None
    if size > MAX_UNROLLED_SIZE:
        raise UserError(f"{field_name}={short(pattern)} repeats repetitions too often; write it more simply")


def _unrolled_size(tree: object) -> int:
    """Parts of a parsed expression with repetitions written out, which is what ``regex`` does to some of them."""
    if isinstance(tree, re._parser.SubPattern):  # type: ignore[attr-defined]
        return sum(map(_unrolled_size, tree.data))
    if not isinstance(tree, tuple | list):
        return 0
    size = 1 + sum(map(_unrolled_size, tree))
    match tree:
        case (_, (int(least), _, re._parser.SubPattern())):  # type: ignore[attr-defined]
            return (least + 2) * size
    return size
