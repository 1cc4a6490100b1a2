"""What of a store nobody needs: remains of killed processes, and versions that no name knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ...files import left_over
from .locks import WORK_NAME, is_abandoned
from .names import is_name, is_version, shown
from .state import STATE_NAME, State, read_state
from .versions import is_laid_by_hand, versions_on_disk


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Something that can go."""

    path: Path
    what: str
    num_bytes: int
    is_expired: bool = False
    """Whether it is a version that a name knows, and shall forget."""


def find_garbage(store: Path, keep: int | None) -> Iterator[Garbage]:
    """All of it, under the store's lock. What is damaged or was laid there by hand is nobody's garbage."""
    work = store / WORK_NAME
    for path in sorted(work.iterdir()) if work.is_dir() else ():
        if is_abandoned(path):
            yield _garbage(path, "left by a process that was killed")
    for home in sorted(store.iterdir()):
        if is_name(home.name) and home.is_dir() and not home.is_symlink() and not is_laid_by_hand(home):
            yield from _of_name(home, keep)


def _of_name(home: Path, keep: int | None) -> Iterator[Garbage]:
    if all(is_version(path.name) or path.name.startswith(f".{STATE_NAME}.") for path in home.iterdir()):
        yield _garbage(home, f"{home.name}: its first publishing was cut off, or the folder is empty")
        return
    for path in left_over(home / STATE_NAME):
        yield _garbage(path, f"{home.name}: half-written state")
    try:
        state = read_state(home) if os.path.lexists(home / STATE_NAME) else None
    except UserError:
        return
    expired = set() if state is None or keep is None else _expired(state, keep)
    for path in versions_on_disk(home):
        if path.name in expired:
            yield _garbage(path, f"{home.name}@{shown(path.name)}: not among the newest {keep}", is_expired=True)
        elif state is None or path.name not in state.versions:
            yield _garbage(path, f"{home.name}@{shown(path.name)}: its publishing was cut off")


def _expired(state: State, keep: int) -> set[str]:
    needed = {*state.versions[-keep:], state.current, *state.tags.values()}
    return {*state.versions} - needed


def _garbage(path: Path, what: str, *, is_expired: bool = False) -> Garbage:
    files = [path] if path.is_file() else path.rglob("*")
    size = sum(file.lstat().st_size for file in files if not file.is_dir())
    return Garbage(path=path, what=what, num_bytes=size, is_expired=is_expired)
