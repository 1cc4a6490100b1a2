"""A quantised weight as tensors in a file: bitsandbytes' own serialised layout, so that either reads the other's.

    X.weight                                  uint8 [⌈n/2⌉, 1]   codes, the first of two in the upper half
    X.weight.absmax                           float32 [S], or uint8 [S] under double quantisation
    X.weight.quant_map                        float32 [16]       the codebook
    X.weight.nested_absmax, .nested_quant_map float32 [⌈S/256⌉], [256]
    X.weight.quant_state.bitsandbytes__nf4    uint8: JSON with the kind, block size, dtype, shape, mean of the scales

``transformers`` learns from ``quantization_config`` in config.json that such tensors are to be expected, and by which
library. INT4 isn't bitsandbytes': its key ends in ``deltaw__int4``, and the config names this project.

What is read may be anybody's. Every size follows from the shape of the model's own layer, and is compared before a
tensor is read; codebooks must be ours to the bit, since codes mean nothing under others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, short
from ..ops import nf4
from ..ops.nf4 import Quantized, QuantizedScales

_MAX_FACTS = 4096
"""Bytes of JSON beside a weight; bitsandbytes writes about 200."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OURS = ("int4",)
"""Kinds that bitsandbytes has not."""

_CPU = torch.device("cpu")
_PART = re.compile(
    r"(?P<weight>.+\.weight)(?P<part>\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))"
)


def serialize(q: Quantized) -> dict[str, Tensor]:
    """Tensors by what their names add to the weight's own."""
    device = q.packed.device
    facts: dict[str, Any] = {
        "quant_type": q.kind,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    out = {"": q.packed.view(-1, 1), ".quant_map": nf4.levels_of(q.kind, device).clone()}
    if isinstance(q.scales, QuantizedScales):
        facts |= {"nested_blocksize": nf4.SCALE_BLOCK, "nested_dtype": "float32"}
        facts |= {"nested_offset": 0.0 if device.type == "meta" else q.scales.offset.item()}
        out |= {".absmax": q.scales.codes, ".nested_absmax": q.scales.absmax}
        out |= {".nested_quant_map": nf4.dynamic_map(device).clone()}
    else:
        out |= {".absmax": q.scales}
    owner = "deltaw" if q.kind in _OURS else "bitsandbytes"
    encoded = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=device)
    return out | {f".quant_state.{owner}__{q.kind}": encoded}


def deserialize(name: str, parts: Mapping[str, Any], shape: Sequence[int]) -> Quantized:
    """The weight of a layer W ``shape`` out of its parts: tensors, or slices of a safetensors file.

    Raises ``UserError`` that names the tensor for whatever does not fit, before it is read.
    """
    keys = [key for key in parts if key.startswith(".quant_state.")]
    if len(keys) != 1:
        raise UserError(f"{name}: codes with {len(keys)} quant_state tensors; expected one. Get a sound copy")
    facts = _facts(name, keys[0], parts[keys[0]])
    if facts["shape"] != tuple(shape):
        raise UserError(f"{name}: the file's is {list(facts['shape'])}, the model's layer {list(shape)}; another model")
    n, kind = math.prod(shape), facts["kind"]
    num_blocks = math.ceil(n / facts["block_size"])
    is_nested = ".nested_absmax" in parts
    sizes = {"": (n + 1) // 2, ".quant_map": 4 * 16, ".absmax": num_blocks * (1 if is_nested else 4)}
    if is_nested:
        sizes |= {".nested_quant_map": 4 * 256, ".nested_absmax": 4 * math.ceil(num_blocks / nf4.SCALE_BLOCK)}
    _check_parts(name, parts, sizes | {keys[0]: None})
    read = {part: parts[part][...].reshape(-1).view(torch.uint8) for part in sizes}
    read |= {
        part: read[part].view(torch.float32) for part in sizes if part != "" and (part != ".absmax" or not is_nested)
    }
    levels = {".quant_map": nf4.levels_of(kind, _CPU), ".nested_quant_map": nf4.dynamic_map(_CPU)}
    for part in sizes.keys() & levels.keys():
        if not torch.allclose(read[part], levels[part], rtol=0, atol=1e-6):
            raise UserError(f"{name}{part}: not the levels that bitsandbytes gives {kind}; the codes can't be read")
    for part in sizes:
        if read[part].is_floating_point() and not read[part].isfinite().all():
            raise UserError(f"{name}{part}: holds infinities or nans; get a sound copy")
    scales: Tensor | QuantizedScales = read[".absmax"]
    if is_nested:
        offset = torch.tensor(facts["offset"])
        scales = QuantizedScales(codes=read[".absmax"], absmax=read[".nested_absmax"], offset=offset)
    return Quantized(
        packed=read[""],
        scales=scales,
        shape=torch.Size(shape),
        dtype=facts["dtype"],
        kind=kind,
        block_size=facts["block_size"],
    )


def grouped(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(plain tensors, parts of quantised weights) by the weights' names."""
    plain, parts = dict(tensors), dict[str, dict[str, Any]]()
    for key in tensors:
        found = _PART.fullmatch(key)
        if found and found["weight"] in tensors:
            parts.setdefault(found["weight"], {})[found["part"]] = plain.pop(key)
    for name in parts:
        parts[name][""] = plain.pop(name)
    return plain, parts


def config_of(q: Quantized, dense: Sequence[str], *, is_foreign: bool = False) -> dict[str, Any]:
    """``quantization_config`` for config.json; ``dense``: linear layers that aren't quantised; ``is_foreign``: whether
    the model has quantised parts that bitsandbytes couldn't read."""
    is_double = isinstance(q.scales, QuantizedScales)
    if is_foreign or q.kind in _OURS:
        facts = {"kind": q.kind, "block_size": q.block_size, "double": is_double}
        return {"quant_method": "deltaw", **facts, "modules_to_not_convert": list(dense)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": q.kind,
        "bnb_4bit_use_double_quant": is_double,
        "bnb_4bit_compute_dtype": "bfloat16" if q.dtype == torch.float16 else str(q.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }


def is_stored(name: str, declared: object) -> str | None:
    """Whose 4 bits a checkpoint is in, "bitsandbytes" or "deltaw", by its ``quantization_config``; None: it is dense.

    bitsandbytes' 8 bits are no 4 bits, and left to transformers. Raises ``UserError`` for any other quantisation.
    """
    if declared is None:
        return None
    given: dict[str, Any] = declared if isinstance(declared, dict) else {}
    method = given.get("quant_method", "bitsandbytes" if "load_in_4bit" in given else None)
    if method == "bitsandbytes":
        return None if given.get("load_in_8bit") is True else "bitsandbytes"
    if method == "deltaw":
        return "deltaw"
    raise UserError(
        f"{name}: quantised by {short(method)}, which isn't read here; expected dense weights or bitsandbytes' 4 bits: "
        "give the checkpoint that it was made from (quantization='nf4' makes it small)"
    )


def _check_parts(name: str, parts: Mapping[str, Any], sizes: Mapping[str, int | None]) -> None:
    """Whether these are the parts, of these many bytes; nothing is read."""
    missing, unknown = sorted(sizes.keys() - parts.keys()), sorted(parts.keys() - sizes.keys())
    if missing or unknown:
        names = ", ".join(short(f"{name}{part}") for part in [*missing, *unknown][:4])
        raise UserError(f"{name}: not bitsandbytes' layout (missing or unknown: {names}); get a sound copy")
    for part, size in sizes.items():
        has = _num_bytes(parts[part])
        if size is not None and has != size:
            raise UserError(f"{name}{part}: {has:,} bytes, where a weight of this shape has {size:,}; get a sound copy")


def _facts(name: str, key: str, part: Any) -> dict[str, Any]:
    """Kind, block size, dtype, shape and mean of the scales, out of the JSON beside a weight."""
    kind = key.rpartition("__")[2]
    try:
        if _num_bytes(part) > _MAX_FACTS:
            raise ValueError(f"{_num_bytes(part):,} bytes")
        given = json.loads(bytes(part[...].reshape(-1).view(torch.uint8).tolist()))
        shape = tuple(given["shape"])
        if kind not in ("nf4", "fp4", *_OURS) or given["quant_type"] != kind:
            raise ValueError(f"quantised as {short(given['quant_type'])}")
        block_size = given["blocksize"]
        if type(block_size) is not int or block_size not in nf4.BLOCK_SIZES:
            raise ValueError(f"blocks of {short(block_size)} weights")
        if given.get("nested_blocksize", nf4.SCALE_BLOCK) != nf4.SCALE_BLOCK:
            raise ValueError(f"blocks of {short(given['nested_blocksize'])} scales")
        if not all(type(size) is int and 0 <= size < 2**40 for size in shape) or len(shape) != 2:
            raise ValueError(f"shape {short(shape)}")
        offset = float(given.get("nested_offset", 0.0))
        if not abs(offset) <= torch.finfo(torch.float32).max:
            raise ValueError(f"nested_offset {offset}")
        dtype = _DTYPES[given["dtype"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        where, reason = short(name + key, 200), short(str(error), 200)
        raise UserError(f"{where}: not what bitsandbytes writes ({reason}); get a sound copy") from None
    return {"kind": kind, "block_size": block_size, "dtype": dtype, "shape": shape, "offset": offset}


def _num_bytes(part: Any) -> int:
    """Of a tensor, or of a slice of a safetensors file."""
    if isinstance(part, Tensor):
        return part.nbytes
    bits = int(re.sub(r"\D*(\d+).*", r"\1", part.get_dtype()))  # "U8", "BF16", "F8_E4M3"
    return math.prod(part.get_shape()) * bits // 8 if part.get_dtype() != "BOOL" else math.prod(part.get_shape())
