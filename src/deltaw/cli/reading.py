"""Flags of the verbs that read a base and perhaps adapters, and change neither: chat, eval, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..settings import Quantization

if TYPE_CHECKING:
    from ..data.formats import Example


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """Which base, in which numbers, where."""

    model: str | None = None
    """Base model; by default the one that the adapter names."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base."""
    quantization: Quantization = "none"
    """Storage of the base's linear layers: nf4 (QLoRA's 4 bits) …; a base that is in 4 bits already needs no flag."""
    device: str = "auto"
    """cpu, cuda …; auto: CUDA where there is one."""
    allow_other_base: bool = False
    """Take an adapter that was trained on other weights than the base's, where the shapes fit."""
    store: Path | None = None
    """Folder of adapters that names are looked up in; else $DELTAW_STORE, ~/.local/share/deltaw/adapters."""


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions(BaseOptions):
    """A base, and held-out data to try it on."""

    data: str
    """Held-out data: a file or a hub data set (owner/name, or owner/name:config)."""
    data_split: str | None = None
    """Split of a hub data set, or a part of one (test[:100]); test where none is given."""
    data_format: Literal["auto", "chat", "prompt", "instruction", "text"] = "auto"
    """How to read the examples, where their keys don't say it."""
    max_new_tokens: int = 256
    """Longest answer."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        from ..errors import UserError

        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")

    def examples(self) -> list[Example]:
        """The data, read. Raises ``UserError`` where they can't be."""
        from ..data.formats import load_examples
        from ..data.records import split_of

        split = split_of(self.data, self.data_split, default="test", flag="--data-split")
        return load_examples(self.data, data_format=self.data_format, split=split)
