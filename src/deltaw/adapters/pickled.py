"""``adapter_model.bin``, what PEFT wrote before safetensors, read as data: no unpickler runs.

The file is a zip: ``data.pkl`` says which tensors there are, ``data/0``, ``data/1`` … are their bytes. torch's
weights-only unpickler calls nothing dangerous, but a hundred bytes can still make it ask for all memory
(``bytearray(10**10)``) or hash nested tuples until tomorrow. Here the few instructions that a dict of tensors needs are
read from ``pickletools`` and all others are refused; a global is no more than its name, and the bytes are mapped from
the file, never unpacked.

    {key: _rebuild_tensor_v2(storage, offset, size, stride, …)}, storage = ("storage", FloatStorage, "0", "cpu", numel)

Left out: files of torch before 1.6, which are no zips; PEFT is younger.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, short

MAX_PICKLE_BYTES = 2**19
"""Two thousand tensors take as much."""

_MAX_DIRECTORY_BYTES = 2**21
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Strange(Exception):
    """What a dict of tensors has no need of."""


class _Bounded(io.FileIO):
    """A file whose single reads are small: ``zipfile`` reads a zip's whole directory in one."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(_MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else size)
        if len(data) > _MAX_DIRECTORY_BYTES:
            raise _Strange("a directory of more files than any adapter has")
        return data


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors by their keys, mapped from the file.

    Raises ``UserError`` that names the file for all that is not just a dict of tensors, or damaged.
    """
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise _Strange("compressed files, which torch never writes")
            if "data.pkl" not in members or members["data.pkl"].file_size > MAX_PICKLE_BYTES:
                raise _Strange(f"no data.pkl of at most {MAX_PICKLE_BYTES:,} bytes")
            pickle = archive.read(members["data.pkl"])
            order = members.get("byteorder")  # not in old files, which are little-endian
            if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
                raise _Strange("bytes in big-endian order")
            places = {name: (_start(file, info), info.file_size) for name, info in members.items()}
            num_bytes = file.seek(0, io.SEEK_END)
        mapped = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
        return _run(pickle, mapped, places)
    except _Strange as error:
        reason = str(error)
    except Exception as error:  # zips and pickles raise whatever a damaged byte leads them to
        reason = short(str(error) or type(error).__name__, 200)
    raise UserError(f"{path}: not readable as tensors only: {reason}; get a sound copy, or one in safetensors")


def _start(file: io.FileIO, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header of 30 bytes, name and padding."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _run(pickle: bytes, mapped: Tensor, places: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """What the instructions put together; ``places`` are (first byte, bytes) of the zip's members."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(pickle):
        match code.name:
            case "PROTO":
                pass
            case "GLOBAL" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[code.name])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                first = marks.pop() if code.name == "TUPLE" else len(stack) - _TUPLES[code.name]
                stack[first:] = [_flat(stack[first:])]
            case "BINPERSID":
                stack.append(_storage(stack.pop(), mapped, places))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_build(stack.pop(), arguments))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                first = marks.pop() if code.name == "SETITEMS" else len(stack) - 2
                keys, values = stack[first::2], stack[first + 1 :: 2]
                del stack[first:]
                if not all(isinstance(key, str) for key in keys):
                    raise _Strange("keys that are no texts")
                stack[-1].update(zip(keys, values, strict=True))
            case "STOP":
                break
            case _:
                raise _Strange(f"an instruction {code.name}")
    (tensors,) = stack
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise _Strange(f"expected a dict of tensors, found {type(tensors).__name__}")
    return tensors


def _flat(items: list[Any]) -> tuple[Any, ...]:
    """A tuple as tensors need them: short, and of plain things or tuples of such; deeper ones take for ever to show."""
    if len(items) > 8 or any(isinstance(part, tuple) for item in items if isinstance(item, tuple) for part in item):
        raise _Strange("long or nested tuples")
    return tuple(items)


def _storage(identity: Any, mapped: Tensor, places: dict[str, tuple[int, int]]) -> Tensor:
    """A storage's elements [numel], a view of the file."""
    word, kind, name, _device, numel = identity
    if word != "storage" or kind not in _DTYPES:
        raise _Strange(f"a storage of {short(kind)}")
    start, num_bytes = places[f"data/{name}"]
    dtype = _DTYPES[kind]
    if numel * dtype.itemsize != num_bytes or start + num_bytes > len(mapped):
        raise _Strange(f"a storage of {short(numel)} elements in {num_bytes:,} bytes")
    view = mapped[start : start + num_bytes]
    return (view if start % dtype.itemsize == 0 else view.clone()).view(dtype)


def _build(function: Any, arguments: Any) -> Any:
    """What a call would make: three functions are known by their names, and none is called."""
    match function, arguments:
        case "collections OrderedDict", ():
            return {}
        case "torch._utils _rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case "torch._utils _rebuild_tensor_v2", (Tensor() as values, int(offset), tuple(size), tuple(stride), *_):
            if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
                raise _Strange(f"a tensor {short(size)} with strides {short(stride)}")
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if last >= len(values) + (0 in size) or math.prod(size) > len(values):  # a stride of 0 repeats for nothing
                raise _Strange(f"a tensor {short(size)} in {len(values):,} elements")
            return values.as_strided(size, stride, values.storage_offset() + offset)
    raise _Strange(f"a call of {short(function)}")
