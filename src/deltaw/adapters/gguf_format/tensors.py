"""Write and read the tensors of a GGUF file one at a time: nothing but the one at hand is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from torch import Tensor

from ...errors import UserError

Outtype = Literal["f32", "f16", "bf16", "q8_0"]
_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its shape is known, its values [float32] are made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_gguf(
    path: Path,
    arch: str,
    outtype: Outtype,
    describe: Callable[[GGUFWriter], None],
    entries: Sequence[Entry],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write metadata (by ``describe``) and tensors. Vectors stay float32; rows that are no whole blocks, float16.

    Raises ``UserError`` for a value that is not finite or that the number format can't hold, naming the tensor.
    """
    writer = GGUFWriter(path, arch)
    try:
        describe(writer)
        writer.add_file_type(_TYPES[outtype][1])
        types = [_type_of(entry, outtype) for entry in entries]
        for entry, kind in zip(entries, types, strict=True):
            num_bytes = prod(quant_shape_to_byte_shape(entry.shape, kind))
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (entry, kind) in enumerate(zip(entries, types, strict=True)):
            writer.write_tensor_data(_encoded(entry, kind))
            if progress is not None:
                progress(done + 1, len(entries))
    finally:
        writer.close()


@contextmanager
def open_gguf(path: Path) -> Iterator[GGUFReader]:
    """The file's reader, mapped; ``UserError`` for a file that is none."""
    try:
        yield GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as GGUF ({error}); get a complete copy") from None


def value_of(reader: GGUFReader, key: str) -> Any:
    """A value of the metadata, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def decoded(tensor: Any) -> Tensor:
    """A tensor of a reader in float32, in torch's order of dimensions, copied."""
    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(tensor.shape[::-1].tolist()))


def _type_of(entry: Entry, outtype: Outtype) -> GGMLQuantizationType:
    kind = _TYPES[outtype][0]
    if len(entry.shape) < 2:
        return GGMLQuantizationType.F32
    return kind if entry.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _encoded(entry: Entry, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = entry.make().contiguous().cpu().numpy()
    assert values.shape == entry.shape and values.dtype == np.float32, (entry.name, values.shape, values.dtype)
    limit = 65504.0 if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0) else np.inf
    # A block of Q8_0 has a float16 scale of its largest value over 127.
    limit = 127 * limit if kind == GGMLQuantizationType.Q8_0 else limit
    if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > limit:
        raise UserError(
            f"{entry.name} has values that are not finite, or too large for {kind.name}; choose f32 or bf16, or leave "
            "out the adapter that is damaged there"
        )
    return quantize(values, kind)
