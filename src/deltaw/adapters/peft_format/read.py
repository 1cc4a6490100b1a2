"""Read an adapter's files without any model: its config, and its tensors sorted by module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ...config import CONFIG_NAME, LoraConfig, read_config
from ...errors import UserError
from ...files import left_over
from ...hub import MAX_CONFIG_BYTES, resolve_file
from ..tensors import read_tensors
from .keys import PICKLED_NAME, PREFIX, WEIGHTS_NAME, is_double, is_embedding_key, split_key
from .provenance import Provenance, provenance_of


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: read, sorted by module, not yet matched with any model."""

    path: Path
    config: LoraConfig
    factors: dict[str, dict[str, Tensor]]
    """module → {A, B, magnitude} under the names of ``LowRank``'s parameters."""
    others: dict[str, Tensor]
    """Everything else (biases, modules_to_save), by name in the model without adapters."""
    provenance: Provenance
    num_bytes: int
    """Size of the file with the tensors."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """``{module}.{part}`` of factors, and names of the others → key in the file."""

    def is_embedding(self, module: str) -> bool:
        """Whether its factors are an embedding's, which have A [r, vocabulary] and B [hidden, r]."""
        return is_embedding_key(self.keys.get(f"{module}.lora_A", ""))


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter's files (a folder or hub id) without any model.

    Raises ``UserError`` naming the file and the reason for whatever is missing, damaged, hostile or not LoRA.
    """
    config_path = resolve_file(folder, CONFIG_NAME)
    config = read_config(config_path)
    path = _weights_file(folder)
    tensors, texts = read_tensors(path)
    provenance = provenance_of(texts)
    _check_one_save(path, config_path, provenance)
    strange = [key for key in tensors if not key.startswith(PREFIX)]
    if strange:
        raise UserError(f"{path}: keys must start with {PREFIX!r}; found {', '.join(strange[:3])}")
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        if is_double(key):
            continue
        module, name = split_key(key)
        place = others if module is None else factors.setdefault(module, {})
        if name in place:
            raise UserError(f"{path}: {key} stands for the same tensor as another key; get a sound copy")
        place[name] = tensor
        keys[name if module is None else f"{module}.{name}"] = key
    return StoredAdapter(config_path.parent, config, factors, others, provenance, path.stat().st_size, keys)


def _weights_file(folder: str | Path) -> Path:
    try:
        return resolve_file(folder, WEIGHTS_NAME)
    except UserError:
        try:
            return resolve_file(folder, PICKLED_NAME)
        except UserError:
            pass
        raise


def _check_one_save(path: Path, config_path: Path, came: Provenance) -> None:
    """``UserError`` where a save was cut off between its two renames: the weights' own config still waits beside.

    A config that merely differs was edited since, and may be.
    """

    def is_own(file: Path) -> bool:
        return hashlib.sha256(file.read_bytes()).hexdigest() == came.config_sha256

    if came.config_sha256 is not None and not is_own(config_path):
        for other in left_over(config_path):
            if other.stat().st_size <= MAX_CONFIG_BYTES and is_own(other):
                raise UserError(
                    f"{path}: its config is {other.name}, whose save was cut off before it became {CONFIG_NAME}; "
                    "rename it so, or save the adapter again"
                )
