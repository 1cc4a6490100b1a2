"""Names, tags and versions as they are written: ``name``, ``name@version``, ``name@tag``, ``name@current``.

Names are folders of the store, model names of the server and words of a shell, so they have letters, digits, dots,
dashes and underscores only. A version is the SHA-256 of what an adapter says (``content.py``), or its beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, short

MAX_NAME_CHARS = 64
CURRENT = "current"
"""``name@current`` is what ``name`` means; it says that the store's is meant where a folder has the same name."""

_RESERVED = ("__base__",)
"""What requests call the base without any adapter."""

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME_CHARS - 1}}}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{4,64}")
"""The beginning of a version; four digits are the fewest that are taken for one."""


@dataclass(frozen=True)
class Reference:
    """A name, and the version or tag that was asked for; none: the current one."""

    name: str
    wanted: str | None = None

    def __str__(self) -> str:
        return self.name if self.wanted is None else f"{self.name}@{self.wanted}"


def parse_reference(text: str) -> Reference | None:
    """``name`` or ``name@wanted`` taken apart; None for a text that is neither."""
    name, at, wanted = text.partition("@")
    if not is_name(name) or (at and not _NAME.fullmatch(wanted)):
        return None
    return Reference(name, wanted if at else None)


def is_name(name: str) -> bool:
    """Whether an adapter may be called so."""
    return _NAME.fullmatch(name) is not None and name not in _RESERVED


def check_name(name: str) -> None:
    """Raises ``UserError`` for what no adapter may be called."""
    if not is_name(name):
        why = "that is the base" if name in _RESERVED else f"1 to {MAX_NAME_CHARS} letters, digits, '.', '_' and '-'"
        raise UserError(f"{short(name)} is no name for an adapter ({why}); give another, such as tickets or tickets-v2")


def check_tag(tag: str) -> None:
    """Raises ``UserError`` for what no tag may be called."""
    if not is_name(tag) or tag == CURRENT:
        why = "the current version has it always" if tag == CURRENT else "letters, digits, '.', '_' and '-'"
        raise UserError(f"{short(tag)} is no tag ({why}); give another, such as prod")
    if _PART.fullmatch(tag):
        raise UserError(f"tag {tag!r} reads like the beginning of a version; give another, such as prod")


def is_version(text: object) -> bool:
    """Whether a text is a whole version."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_part_of_version(text: str) -> bool:
    """Whether a text may be the beginning of a version."""
    return _PART.fullmatch(text) is not None


def shown(sha256: str) -> str:
    """A version as it is shown to people, and taken from them."""
    return sha256[:12]


def label_of(folder: str | Path) -> str:
    """What to call an adapter before people: its folder's name; of a version in a store, ``name@version``."""
    path = Path(folder)
    return f"{path.parent.name}@{shown(path.name)}" if is_version(path.name) else path.name
