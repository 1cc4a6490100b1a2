"""What an adapter says, and its hash: the same adapter has the same one, however its files are laid out.

    sha256({config: its fields beside their defaults, tensors: {key: dtype, shape, sha256}, files: {name: sha256}})

The hash covers what changes answers: config, tensors, and an own tokenizer or chat template beside them. It leaves out
what doesn't: the version of PEFT that wrote the config, the order of tensors in the file, the card.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import CONFIG_NAME, LoraConfig
from ...errors import UserError
from ..peft_format import PICKLED_NAME, WEIGHTS_NAME, StoredAdapter, read_adapter
from ..tensors import read_tensors
from .versions import MANIFEST_NAME, About

MAX_WEIGHT_BYTES = 64 * 2**30
MAX_BESIDE_BYTES = 128 * 2**20
"""The largest tokenizer has a quarter of it."""

_MAX_DOCUMENT_BYTES = 2**20
_MAX_DOCUMENTS = 50

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
"""Files beside an adapter that change what it answers."""

_NO_MATTER = ("peft_version", "inference_mode", "auto_mapping")
"""Fields of the config that say who wrote it."""


def whole_adapter(folder: str | Path) -> tuple[StoredAdapter, Path]:
    """(an adapter's files, read strictly; the file with its tensors). Raises ``UserError`` for half of an adapter."""
    stored = read_adapter(folder)
    weights = next(stored.path / n for n in (WEIGHTS_NAME, PICKLED_NAME) if (stored.path / n).is_file())
    if stored.num_bytes > MAX_WEIGHT_BYTES:
        raise UserError(f"{weights}: {stored.num_bytes:,} bytes are no adapter (at most {MAX_WEIGHT_BYTES:,})")
    if not stored.factors and not stored.others:
        raise UserError(f"{weights}: no tensors in it; save the adapter again")
    for module, parts in stored.factors.items():
        a, b = parts.get("lora_A"), parts.get("lora_B")
        if a is None or b is None:
            raise UserError(f"{weights}: {module} has lora_{'B' if a is None else 'A'} alone; save the adapter again")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = f"A {list(a.shape)}, B {list(b.shape)}"
            raise UserError(f"{weights}: {module}: {shapes} are no factors of one rank; save the adapter again")
    return stored, weights


def about(stored: StoredAdapter) -> About:
    """A summary; reads no more than the file's header."""
    factors = [tensor for parts in stored.factors.values() for tensor in parts.values()]
    came = stored.provenance
    return About(
        base_name=came.base_name or stored.config.base_model_name_or_path,
        base_sha256=came.base_sha256,
        data_sha256=came.data_sha256,
        r=max((parts["lora_A"].shape[0] for parts in stored.factors.values() if "lora_A" in parts), default=0),
        num_modules=len(stored.factors),
        num_parameters=sum(tensor.numel() for tensor in [*factors, *stored.others.values()]),
        num_bytes=stored.num_bytes,
    )


def content_hash(folder: Path) -> str:
    """The SHA-256 of what the adapter in ``folder`` says. Raises ``UserError`` for what is no whole adapter.

    Reads every byte, so it also finds what headers don't tell: numbers that are none.
    """
    stored, weights = whole_adapter(folder)
    tensors, _ = read_tensors(weights)
    said: dict[str, Any] = {
        "config": _canonical(stored.config),
        "tensors": {
            key: [str(tensor.dtype), list(tensor.shape), _tensor_hash(weights, key, tensor)]
            for key, tensor in sorted(tensors.items())
        },
        "files": {path.name: _file_hash(path) for path in beside(folder)},
    }
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def beside(folder: Path) -> list[Path]:
    """The files beside an adapter's two that change what it answers, sorted. ``UserError`` for one that is no file."""
    found = [folder / name for name in sorted(BESIDE) if os.path.lexists(folder / name)]
    for path in found:
        if not path.is_file() or path.stat().st_size > MAX_BESIDE_BYTES:
            raise UserError(f"{path}: expected a file of at most {MAX_BESIDE_BYTES:,} bytes; move it away")
    return found


def documents(folder: Path) -> list[Path]:
    """Small texts beside an adapter that say something of it: its card, its figures, its licence."""
    known = {CONFIG_NAME, MANIFEST_NAME, *BESIDE}

    def is_one(path: Path) -> bool:
        is_text = path.suffix in (".md", ".txt", ".json") or path.name in ("LICENSE", "NOTICE")
        is_visible = path.name not in known and not path.name.startswith(".")
        return is_text and is_visible and path.is_file() and path.stat().st_size <= _MAX_DOCUMENT_BYTES

    return sorted(path for path in folder.iterdir() if is_one(path))[:_MAX_DOCUMENTS]


def copy_adapter(source: Path, target: Path) -> list[str]:
    """Copy an adapter's files and what is beside them; returns the names of those that the hash covers.

    Raises ``UserError`` where somebody writes to them meanwhile: old and new files make no adapter.
    """
    _, weights = whole_adapter(source)
    essential = [source / CONFIG_NAME, weights, *beside(source)]
    before = [path.stat() for path in essential]
    for path in [*essential, *documents(source)]:
        shutil.copyfile(path, target / path.name)
    for path, was in zip(essential, before, strict=True):
        now = path.stat()
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (was.st_ino, was.st_size, was.st_mtime_ns):
            raise UserError(f"{path}: somebody wrote to it while it was copied; publish again when they are done")
    return [path.name for path in essential]


def _canonical(config: LoraConfig) -> dict[str, Any]:
    """The fields that say something, in order of their names; patterns in their own, since the first match counts."""
    plain = LoraConfig().to_dict()
    said = {name: value for name, value in sorted(config.to_dict().items()) if value != plain[name]}
    return {
        name: sorted(value) if isinstance(value, list) and name.endswith(("modules", "_to_save")) else value
        for name, value in said.items()
        if name not in _NO_MATTER
    }


def _tensor_hash(file: Path, key: str, tensor: Tensor) -> str:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{file}: {key} has values that are no numbers (nan or inf); train again, or take out the step")
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
