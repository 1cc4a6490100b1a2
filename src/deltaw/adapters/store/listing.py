"""What lies in a store, with a one-line diagnosis of everything that isn't as publishing leaves it.

People copy, link, rename and edit in such folders. Whatever they did, the other entries are listed all the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .names import check_name, shown
from .state import STATE_NAME, read_state
from .versions import Version, is_laid_by_hand, laid_by_hand, read_version, versions_on_disk


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of a store, or something else that lies there."""

    name: str
    version: Version | None = None
    """The current one, where there is one and it is sound."""
    num_versions: int = 0
    problems: tuple[str, ...] = ()
    """What is wrong, a line each."""


def describe_entries(store: Path, check: Callable[[Version], None] | None = None) -> list[Entry]:
    """An entry for everything in the store but hidden files; ``check`` looks closer at every version that is sound."""
    paths = sorted(path for path in store.iterdir() if not path.name.startswith(".")) if store.is_dir() else []
    folded = Counter(path.name.casefold() for path in paths)
    out = []
    for path in paths:
        entry = describe_entry(path, check)
        if folded[path.name.casefold()] > 1:
            problem = f"{path.name}: another name differs from it in case alone; rename one"
            entry = dataclasses.replace(entry, problems=(*entry.problems, problem))
        out.append(entry)
    return out


def describe_entry(path: Path, check: Callable[[Version], None] | None = None) -> Entry:
    """One entry; whatever is wrong with it is said, not raised."""
    try:
        return _describe(path, check)
    except (UserError, OSError) as error:
        return Entry(name=path.name, problems=(str(error),))


def _describe(home: Path, check: Callable[[Version], None] | None) -> Entry:
    if home.is_symlink():
        raise UserError(f"{home}: a link to {os.readlink(home)}; a store follows none. Copy the folder here")
    if not home.is_dir():
        raise UserError(f"{home}: a file; a store holds folders. Move it away")
    check_name(home.name)
    if not os.path.lexists(home / STATE_NAME):
        if is_laid_by_hand(home):
            return Entry(name=home.name, version=laid_by_hand(home), num_versions=1)
        if versions_on_disk(home):
            raise UserError(
                f"{home.name}: its first publishing was cut off; publish again, or clean up with adapter gc"
            )
        what = "no adapter in it (no adapter_config.json)" if any(home.iterdir()) else "an empty folder"
        raise UserError(f"{home}: {what}; remove it, or put an adapter's files into it")
    try:
        state = read_state(home)
    except UserError as error:
        there = ", ".join(shown(path.name) for path in versions_on_disk(home)) or "none"
        remedy = f"adapter rollback {home.name} --to VERSION writes it anew (there are {there})"
        raise UserError(f"{error}; {remedy}") from None
    current, problems = None, []
    for sha256 in state.versions:
        is_current = sha256 == state.current
        try:
            version = read_version(home / sha256, home.name, is_current=is_current, tags=state.tags_of(sha256))
            if check is not None:
                check(version)
            current = version if is_current else current
        except (UserError, OSError) as error:
            remedy = "publish it again or roll back" if is_current else "publish it again or remove it"
            problems.append(f"{home.name}@{shown(sha256)}: {error}; {remedy}")
    orphans = [path.name for path in versions_on_disk(home) if path.name not in state.versions]
    if orphans:
        problems.append(f"{home.name}: {len(orphans)} folders of unfinished publishing; adapter gc removes them")
    if is_laid_by_hand(home):
        problems.append(
            f"{home}: has files of a plain adapter beside its versions, which nothing reads; move them away"
        )
    return Entry(name=home.name, version=current, num_versions=len(state.versions), problems=tuple(problems))
