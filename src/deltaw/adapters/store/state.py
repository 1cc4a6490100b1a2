"""What a name means now: its versions, the one that is current and those that were before it, its tags.

All of it stands in one small file beside the versions, ``NAME/current.json``, and changes by one rename:

    versions   every version that was published, in that order
    line       the current version last, before it what was current before it; rollback goes back along this line
    tags       tag → version
    generation one more with every change

A version that was rolled back is no longer in the line, but stays until it is removed: one can go forward again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import replace_text
from ...hub import read_object
from ...settings import is_whole
from .names import CURRENT, is_name, is_part_of_version, is_version, shown

STATE_NAME = "current.json"
MAX_VERSIONS = 10_000
MAX_TAGS = 1000
_MAX_LINE = 1000
"""Steps back that are remembered."""

_FORMAT = 1


@dataclass(frozen=True)
class State:
    """One name's state; every change is a new one."""

    versions: tuple[str, ...] = ()
    line: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    generation: int = 0

    @property
    def current(self) -> str:
        """The version that the name means."""
        return self.line[-1]

    def find(self, wanted: str | None) -> list[str]:
        """The versions that a tag, a version or its beginning may mean: one, or what to choose from, or none."""
        if wanted in (None, CURRENT):
            return [self.current]
        assert wanted is not None
        if wanted in self.tags:
            return [self.tags[wanted]]
        return [sha for sha in self.versions if is_part_of_version(wanted) and sha.startswith(wanted)]

    def tags_of(self, sha256: str) -> tuple[str, ...]:
        """The tags of one version, sorted."""
        return tuple(sorted(tag for tag, version in self.tags.items() if version == sha256))

    def made_current(self, sha256: str) -> State:
        """With a version that is new or known as the current one."""
        versions = self.versions if sha256 in self.versions else (*self.versions, sha256)
        if len(versions) > MAX_VERSIONS:
            raise UserError(f"a name has at most {MAX_VERSIONS:,} versions; free some with gc --keep")
        line = self.line if self.line[-1:] == (sha256,) else (*self.line, sha256)[-_MAX_LINE:]
        return self._changed(versions=versions, line=line)

    def rolled_back(self, to: str | None = None) -> State:
        """One step back along the line, or to a version: back to it where it lies behind, else forward."""
        if to is None:
            if len(self.line) < 2:
                others = ", ".join(shown(sha) for sha in self.versions if sha != self.current)
                raise UserError(
                    f"{shown(self.current)} is current, and none was before it"
                    + (f"; say which of {others} to go to" if others else "")
                )
            return self._changed(line=self.line[:-1])
        if to not in self.line:
            return self.made_current(to)
        last = len(self.line) - 1 - self.line[::-1].index(to)
        return self._changed(line=self.line[: last + 1])

    def tagged(self, tag: str, sha256: str) -> State:
        """With a tag on a version, and on no other."""
        tags = self.tags | {tag: sha256}
        if len(tags) > MAX_TAGS:
            raise UserError(f"a name has at most {MAX_TAGS:,} tags; take some away first")
        return self._changed(tags=tags)

    def untagged(self, tag: str) -> State:
        """Without a tag."""
        return self._changed(tags={other: sha for other, sha in self.tags.items() if other != tag})

    def without(self, gone: Sequence[str]) -> State:
        """Without some versions, none of which is current or has a tag."""
        assert self.current not in gone and not {*gone} & {*self.tags.values()}
        left = [sha for sha in self.line if sha not in gone]
        return self._changed(
            versions=tuple(sha for sha in self.versions if sha not in gone),
            line=tuple(sha for sha, _ in groupby(left)),  # a step back from a version to itself would be none
        )

    def _changed(self, **changes: Any) -> State:
        changed = dataclasses.replace(self, **changes)
        return self if changed == self else dataclasses.replace(changed, generation=self.generation + 1)


def write_state(home: Path, state: State) -> None:
    """Put the state in the place of the one before, in one step."""
    replace_text(home / STATE_NAME, json.dumps({"format": _FORMAT, **dataclasses.asdict(state)}, indent=1) + "\n")


def read_state(home: Path) -> State:
    """The state of one name. Raises ``UserError`` that names the file and what is wrong with it."""
    path = home / STATE_NAME
    raw = read_object(path)
    if is_whole(raw.get("format")) and raw["format"] > _FORMAT:
        raise UserError(f"{path}: written by a newer deltaw (format {raw['format']}); upgrade to read it")
    versions: Any
    line: Any
    tags: Any
    versions, line, tags, generation = (raw.get(key) for key in ("versions", "line", "tags", "generation"))
    if not (_are_versions(versions) and 0 < len(versions) == len({*versions})):
        raise UserError(f"{path}: its versions are none, or not each a SHA-256, once")
    if not (_are_versions(line) and line and {*line} <= {*versions}):
        raise UserError(f"{path}: its line of current versions is empty, or has some that it doesn't know")
    if not (isinstance(tags, dict) and all(map(is_name, tags)) and all(sha in versions for sha in tags.values())):
        raise UserError(f"{path}: its tags are none, or of versions that it doesn't know")
    if not is_whole(generation):
        raise UserError(f"{path}: its generation is no whole number")
    return State(tuple(versions), tuple(line), dict(tags), int(str(generation)))


def _are_versions(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_version, value))
