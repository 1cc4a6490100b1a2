"""Files of tensors, read as data: whatever stands in one, the answer comes at once and asks for no memory.

Tensors are mapped from the file and copied by nobody who only uses them. ``safetensors`` checks that they lie in the
file, side by side; what it lets through, and is refused here, are headers that keep it busy, names that would garble
a message, and types that nothing computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError, short
from .pickled import read_pickled

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
"""As many as an adapter on every expert of the largest models has."""

MAX_KEY_CHARS = 500

_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_DTYPES |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """(tensors by their keys, the header's texts) of a safetensors file, or of a ``.bin``, which has no texts.

    Raises ``UserError`` that names the file and the reason.
    """
    tensors, texts = (read_pickled(path), {}) if path.suffix == ".bin" else _read_safetensors(path)
    for key, tensor in tensors.items():
        if len(key) > MAX_KEY_CHARS or not key.isprintable():
            raise UserError(f"{path}: {short(key)} is no tensor's name; get a sound copy")
        if tensor.dtype not in _DTYPES or tensor.dim() > 8:
            kind = f"{tensor.dtype} with {tensor.dim()} dimensions"
            raise UserError(f"{path}: {short(key)} is {kind}; expected float32, float16 or bfloat16, as PEFT writes")
    return tensors, texts


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            is_header = length <= min(MAX_HEADER_BYTES, path.stat().st_size)
            num_named = file.read(length).count(b'"data_offsets"') if is_header else 0
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if not is_header:
        raise UserError(f"{path}: not a safetensors file (its header claims {length:,} bytes); get a complete copy")
    if num_named > MAX_TENSORS:
        raise UserError(f"{path}: {num_named:,} tensors (at most {MAX_TENSORS:,}); get a sound copy")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            # A name that comes twice would silently mean the last one.
            tensors = {name: file.get_tensor(name) for name in names} if len(names) == num_named else None
            texts = file.metadata() or {}
    except Exception as error:  # safetensors' own, and torch's for shapes that it can't have
        reason = short(str(error), 200)
        raise UserError(f"{path}: not a readable safetensors file ({reason}); get a complete copy") from None
    if tensors is None:
        raise UserError(f"{path}: {num_named} tensors under {len(names)} names; get a sound copy")
    return tensors, texts
