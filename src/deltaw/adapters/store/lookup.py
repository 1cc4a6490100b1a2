"""From what was asked for to what lies in the store; each way in which that can fail is one line with its remedy."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ...errors import UserError, short
from .names import CURRENT, Reference, is_version, parse_reference, shown
from .state import STATE_NAME, State, read_state
from .versions import Version, is_laid_by_hand, read_version, versions_on_disk


def is_published(home: Path) -> bool:
    """Whether a folder of the store has versions."""
    return not home.is_symlink() and os.path.lexists(home / STATE_NAME)


def is_home(home: Path) -> bool:
    """Whether a folder of the store is an adapter, published or laid there by hand."""
    return not home.is_symlink() and (is_published(home) or is_laid_by_hand(home))


def parsed(text: str) -> Reference:
    """A reference, as a user wrote it."""
    reference = parse_reference(text)
    if reference is None:
        raise UserError(f"{short(text)}: expected NAME, NAME@VERSION or NAME@TAG")
    return reference


def state_of(home: Path) -> State:
    """What a published name means now."""
    if not is_published(home):
        raise UserError(f"{home}: an adapter laid there by hand, which has no versions; publish it to have some")
    try:
        return read_state(home)
    except UserError as error:
        there = ", ".join(shown(path.name) for path in versions_on_disk(home)) or "none"
        remedy = f"to write it anew: deltaw adapter rollback {home.name} --to VERSION (there are {there})"
        raise UserError(f"{error}; {remedy}") from None


def check_home_is_free(home: Path) -> None:
    """Raises ``UserError`` where versions can't go into a folder that is there."""
    if is_published(home):
        state_of(home)
        return
    if home.is_symlink() or not home.is_dir():
        raise UserError(f"{home}: a link or a file, where a folder of versions must be; move it away")
    if is_laid_by_hand(home):
        raise UserError(f"{home}: an adapter laid there by hand; move it away, then publish it, or use another name")
    strange = [path.name for path in home.iterdir() if not (is_version(path.name) or path.name.startswith("."))]
    if strange:
        raise UserError(f"{home}: no adapter's folder (it has {strange[0]}); move it away, or use another name")


def only(state: State, asked: Reference) -> str:
    """The one version that was asked for."""
    found = state.find(asked.wanted)
    if len(found) == 1:
        return found[0]
    some = ", ".join([*(shown(sha) for sha in (found or state.versions)[-8:]), *sorted(state.tags)[:8]])
    what = "several versions begin so" if found else "no such version or tag"
    raise UserError(f"{asked}: {what} (there are {some})")


def version_of(home: Path, state: State, sha256: str) -> Version:
    """A version of a name, its files looked at."""
    try:
        is_current = sha256 == state.current
        return read_version(home / sha256, home.name, is_current=is_current, tags=state.tags_of(sha256))
    except UserError as error:
        name = f"{home.name}@{shown(sha256)}"
        others = ", ".join(shown(sha) for sha in reversed(state.versions) if sha != sha256)
        remedy = f"go to another version ({others})" if others else f"remove {home.name}"
        raise UserError(f"{name} can't be used ({error}); publish it again, or {remedy}") from None


def state_of_disk(home: Path) -> State:
    """All sound versions that lie in a folder, in the order of their publishing; the last is current."""
    found = []
    for path in versions_on_disk(home):
        with suppress(UserError):
            found.append(read_version(path, home.name))
    found.sort(key=lambda version: version.published_at or "")
    if not found:
        raise UserError(f"{home}: no sound version in it; remove it, then publish again")
    versions = tuple(version.sha256 for version in found)
    return State(versions, versions[-1:])


def check_removable(state: State, asked: Reference, sha256: str) -> None:
    """Raises ``UserError`` for a version that something still means."""
    if asked.wanted in (*state.tags, CURRENT):
        raise UserError(f"{asked}: a tag; name the version ({shown(sha256)}), or take the tag away with adapter tag")
    if sha256 == state.current:
        raise UserError(f"{asked} is the current version; roll back first, or remove {asked.name} whole")
    if tags := state.tags_of(sha256):
        raise UserError(f"{asked} has the tag {', '.join(tags)}; take it away first (adapter tag --delete)")
