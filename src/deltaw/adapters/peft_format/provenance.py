"""What this project adds to PEFT's files: where an adapter comes from.

It stands in the safetensors header, where every reader ignores what it doesn't know.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_KEY = "deltaw"
_MAX_NOTE_CHARS = 10_000
"""Under that key stand a few names, hashes and versions."""


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; empty for files of other tools."""

    base_name: str | None = None
    base_sha256: str | None = None
    data_sha256: str | None = None
    config_sha256: str | None = None
    """The config that was saved with these weights."""
    versions: dict[str, str] = field(default_factory=dict)


def header_of(provenance: Provenance) -> dict[str, str]:
    """The note as texts for the header."""
    return {_KEY: json.dumps(dataclasses.asdict(provenance))}


def provenance_of(texts: Mapping[str, str]) -> Provenance:
    """The inverse of ``header_of``, for any file's header; a note that isn't ours, or damaged, is no note."""
    note = texts.get(_KEY, "")
    try:
        raw: Any = json.loads(note) if len(note) <= _MAX_NOTE_CHARS else {}
        known = {f.name for f in dataclasses.fields(Provenance)}
        given = {k: v for k, v in raw.items() if k in known}
        versions = given.pop("versions", {})
        are_texts = all(isinstance(text, str | None) for text in [*given.values(), *versions.values()])
        return Provenance(**given, versions=versions) if are_texts else Provenance()
    except (json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        return Provenance()


@cache  # finding them takes longer than writing a small adapter
def versions_in_use() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("deltaw", "torch", "transformers")}
