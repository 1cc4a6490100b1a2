"""One version on disk: a folder with PEFT's two files, named by the hash of what it says, and a note beside them.

The note, ``version.json``, says when it was published and what it holds. Whoever reads a version is told in one line
where somebody has moved, cut off or linked away its files; that its bytes are the published ones, ``verify`` proves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...config import CONFIG_NAME
from ...errors import UserError
from ...hub import read_object
from .names import is_version, shown

MANIFEST_NAME = "version.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class About:
    """What is said of an adapter without opening its tensors."""

    base_name: str | None = None
    base_sha256: str | None = None
    data_sha256: str | None = None
    r: int = 0
    """Largest rank of its modules."""
    num_modules: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    """Size of the file with the tensors."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One adapter of a store; ``path`` is what every command and PEFT takes."""

    name: str
    sha256: str
    """Hash of what it says (``content.py``)."""
    path: Path
    published_at: str | None
    """UTC, ISO 8601; None for a folder that was laid into the store by hand."""
    is_current: bool
    tags: tuple[str, ...]
    about: About

    def __str__(self) -> str:
        return f"{self.name}@{shown(self.sha256)}"


def write_note(folder: Path, sha256: str, essential: Sequence[str]) -> None:
    """Write a new version's note into its folder, which nobody sees yet."""
    from .content import about, whole_adapter

    stored, _ = whole_adapter(folder)
    note = {
        "format": _FORMAT,
        "sha256": sha256,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: (folder / name).stat().st_size for name in essential},
        "about": dataclasses.asdict(about(stored)),
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def read_version(path: Path, name: str, *, is_current: bool = False, tags: tuple[str, ...] = ()) -> Version:
    """A published version, without opening its tensors. Raises ``UserError`` where its files aren't those of then."""
    if path.is_symlink():
        raise UserError(f"{path}: a link; versions are folders of the store. Publish what it points to")
    if not path.is_dir():
        raise UserError(f"{path}: its folder is missing")
    note = read_object(path / MANIFEST_NAME)
    files = note.get("files")
    if note.get("sha256") != path.name or not isinstance(files, dict) or not files:
        raise UserError(f"{path / MANIFEST_NAME}: not this version's note")
    for file, size in files.items():
        if "/" in file or (path / file).is_symlink() or not (path / file).is_file():
            raise UserError(f"{path / file}: missing, or no file")
        if (found := (path / file).stat().st_size) != size:
            raise UserError(f"{path / file}: {found:,} bytes, published were {size} bytes")
    return Version(
        name=name,
        sha256=path.name,
        path=path,
        published_at=note.get("published_at") if isinstance(note.get("published_at"), str) else None,
        is_current=is_current,
        tags=tags,
        about=_plain_about(note.get("about")),
    )


def verify(version: Version) -> None:
    """Read every byte. Raises ``UserError`` where a version doesn't say what was published."""
    from .content import content_hash

    found = content_hash(version.path)
    if version.published_at is not None and found != version.sha256:
        raise UserError(f"{version.path}: changed since it was published (it now is {shown(found)})")


def is_laid_by_hand(home: Path) -> bool:
    """Whether a folder of the store holds a plain adapter."""
    return (home / CONFIG_NAME).is_file()


def laid_by_hand(home: Path) -> Version:
    """A plain adapter's folder as a version. ``UserError`` where it is no whole adapter, or leads out of itself."""
    from .content import about, content_hash, whole_adapter

    for file in home.iterdir():
        if not file.resolve().is_relative_to(home.resolve()):
            raise UserError(f"{file}: a link out of its folder; copy the file there instead")
    stored, _ = whole_adapter(home)
    return Version(
        name=home.name,
        sha256=content_hash(home),
        path=home,
        published_at=None,
        is_current=True,
        tags=(),
        about=about(stored),
    )


def versions_on_disk(home: Path) -> list[Path]:
    """Folders of a name that are called as versions are."""
    return sorted(path for path in home.iterdir() if is_version(path.name))


def _plain_about(values: Any) -> About:
    """``About`` from JSON values; what isn't as expected is left out."""
    given = values if isinstance(values, dict) else {}
    kinds = {f.name: int if f.type == "int" else str for f in dataclasses.fields(About)}
    return About(**{name: given[name] for name, kind in kinds.items() if isinstance(given.get(name), kind)})
