"""What the subverbs of a store share: which store, and how a version is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...adapters.store import Store, Version


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store, and how to say what was done."""

    store: Path | None = None
    """Folder of the store; by default $DELTAW_STORE, else ~/.local/share/deltaw/adapters."""
    json: bool = False
    """Print one JSON object."""

    def open(self) -> Store:
        """The store; it needn't be there yet."""
        from ...adapters.store import Store, default_store

        return Store(default_store() if self.store is None else self.store)

    def words(self, *words: object) -> str:
        """A command to type next, in the same store."""
        from ..program import command

        return command(*words, *(() if self.store is None else ("--store", self.store)))


def as_json(version: Version) -> dict[str, Any]:
    """A version as plain JSON values."""
    import dataclasses

    values = dataclasses.asdict(version)
    return {**values, "path": str(version.path), "tags": list(version.tags)}


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Rows under titles on standard output; names may hold anything, so nothing in them is markup."""
    from rich.table import Table
    from rich.text import Text

    from ..screen import out

    shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in titles:
        shown.add_column(title, justify="right" if title in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    out.print(shown)


def when(version: Version) -> str:
    """The time of publishing, in the reader's time zone."""
    from datetime import datetime

    if version.published_at is None:
        return "by hand"
    try:
        return f"{datetime.fromisoformat(version.published_at).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:  # edited by somebody
        return "?"


def base(version: Version) -> str:
    """The base, by the last part of its name or path."""
    return (version.about.base_name or "?").rstrip("/").rpartition("/")[2][:40]
