"""``deltaw quantize``: write a model in 4 bits, in bitsandbytes' layout, without ever holding it dense."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .options import parse
from .program import command


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in 4 bits: deltaw quantize MODEL --out FOLDER

    Every linear layer's weight becomes 4-bit codes with a scale for each block of 64; nf4 quantises the scales as well
    (4.127 bits a weight in all). Embedding and head stay dense unless --include-head asks. Tokenizer, chat template and
    generation settings come along. What is written loads in seconds, wherever a model is named, without a flag;
    transformers with bitsandbytes reads it, too (not int4, and not with a head that is tied to the embedding).
    """

    model: str
    """Base model: smollm2-135m, a folder, a .gguf file or a hub id."""
    out: Path
    """Folder to write; it must not hold anything yet."""
    method: Literal["nf4", "nf4-single", "fp4", "int4"] = "nf4"
    """nf4: QLoRA's, with double quantisation; nf4-single: without; fp4 and int4 to compare with."""
    block_size: int = 64
    """Weights that share a scale: a power of two from 32 to 4096."""
    include_head: bool = False
    """Quantise the output head as well, and the embedding where both are one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of what stays dense, and from which the rest is quantised; auto: the checkpoint's own."""
    shard_size: str = "2GB"
    """Largest file to write."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        import re

        from ..errors import UserError

        if not re.fullmatch(r"[1-9]\d{0,5}(KB|MB|GB)", self.shard_size):
            raise UserError(f"--shard-size {self.shard_size}: expected a number with KB, MB or GB, such as 2GB")


def main(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    options = parse(Options, "quantize", args)
    from .screen import duration, out, print_json, quiet_libraries, size

    quiet_libraries()
    result = quantize(options)
    if options.json:
        print_json(result)
        return 0
    out.print(
        f"{result['quantized_weights']:,} weights in {result['bits_per_quantized_weight']:.3f} bits each; "
        f"the whole model, {result['weights']:,} weights, in {result['bits_per_weight']:.3f}",
        soft_wrap=True,
    )
    out.print(
        f"{size(result['bytes'])} instead of {size(result['dense_bytes'])}, written in {duration(result['seconds'])} "
        f"to {options.out}",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"Next: {command('chat', '--model', options.out)}", markup=False, soft_wrap=True)
    return 0


def quantize(options: Options) -> dict[str, Any]:
    """Quantise, write, and return the figures as plain JSON values."""
    import dataclasses

    from ..nn.load import base_bytes, base_info, load_base
    from ..nn.quantized import num_quantized, quantized_bytes
    from ..nn.save_quantized import save_quantized
    from ..nn.walk import parameter_counts
    from ..ops.quantized import METHODS
    from .screen import counted

    started = time.perf_counter()
    check_out(options.out)
    method = dataclasses.replace(METHODS[options.method], block_size=options.block_size)
    with counted("quantising") as progress:
        model, tokenizer = load_base(
            options.model,
            quantization=method,
            quantize_head=options.include_head,
            dtype=options.dtype,
            device="cpu",
            progress=progress,
        )
    save_quantized(model, tokenizer, options.out, shard_size=options.shard_size)
    num_codes, (_, num_weights) = num_quantized(model), parameter_counts(model)
    num_bytes, code_bytes = base_bytes(model), quantized_bytes(model)
    info = base_info(model)
    assert info is not None
    return {
        "model": options.model,
        "base_sha256": info.sha256,
        "out": str(options.out),
        "method": options.method,
        "block_size": options.block_size,
        "quantized_weights": num_codes,
        "quantized_bytes": code_bytes,
        "bits_per_quantized_weight": 8 * code_bytes / num_codes,
        "weights": num_weights,
        "bytes": num_bytes,
        "bits_per_weight": 8 * num_bytes / num_weights,
        "dense_bytes": num_bytes - code_bytes + num_codes * model.dtype.itemsize,
        "files": sorted(path.name for path in options.out.iterdir()),
        "seconds": time.perf_counter() - started,
    }


def check_out(out: Path) -> None:
    """Raises ``UserError`` for a place that holds something already."""
    from ..errors import UserError

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "a file" if out.is_file() else "not empty"
        raise UserError(f"--out {out}: {what}; expected a folder that isn't there yet, or is empty")
