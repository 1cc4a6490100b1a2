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

from ...nn.state import QuantizedBase

_KEY = "deltaw"
_MAX_NOTE_CHARS = 10_000
"""Under that key stand a few names, hashes and versions."""

_MAX_STEPS, _MAX_STEP_CHARS = 20, 200
"""Of the history, so that a note never outgrows what is read."""


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from; empty for files of other tools."""

    base_name: str | None = None
    base_sha256: str | None = None
    data_sha256: str | None = None
    config_sha256: str | None = None
    """The config that was saved with these weights."""
    quantized_sha256: str | None = None
    """Of the quantised base that the adapter makes good the loss of, and fits no other than (LoftQ)."""
    quantization: str | None = None
    """How that base is quantised, as ``--quantization`` names it."""
    versions: dict[str, str] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    """What was done to the weights after training, a line a step, the latest last: ``compress --rank 4 of …``."""

    @property
    def quantized_base(self) -> QuantizedBase | None:
        """The one quantised base that the adapter belongs to, where it does."""
        if self.quantized_sha256 is None:
            return None
        return QuantizedBase(self.quantized_sha256, self.quantization or "unknown")

    def after(self, step: str) -> Provenance:
        """The same origin, one step later."""
        history = (*self.history, step[:_MAX_STEP_CHARS])[-_MAX_STEPS:]
        return dataclasses.replace(self, history=history, versions=versions_in_use())


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
        versions, history = given.pop("versions", {}), tuple(given.pop("history", ()))
        are_texts = all(isinstance(text, str | None) for text in [*given.values(), *versions.values()])
        are_texts &= all(isinstance(step, str) for step in history)
        return Provenance(**given, versions=versions, history=history) if are_texts else Provenance()
    except (json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        return Provenance()


@cache  # finding them takes longer than writing a small adapter
def versions_in_use() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("deltaw", "torch", "transformers")}
