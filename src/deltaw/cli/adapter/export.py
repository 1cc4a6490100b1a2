"""``deltaw adapter export``: GGUF files for llama.cpp and Ollama."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..options import parse
from ..reading import BaseOptions

if TYPE_CHECKING:
    from ...adapters.gguf_format import Export, Plan
    from ...adapters.gguf_format.tensors import Outtype


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Write an adapter for llama.cpp and Ollama: deltaw adapter export runs/first --out first.gguf

    gguf-adapter writes the adapter alone, to go with a GGUF file of its base (--with-base writes that, too).
    gguf-merged writes the whole model with the adapter in its weights: one file, and whatever an adapter's file can't
    hold (DoRA, biases, modules_to_save, single tokens, a tied head) is in it.

    For the families Llama (SmolLM2, Mistral), Qwen2, Qwen3 and Gemma 1 to 3. The file's logits are compared with its
    source's on real text, by llama.cpp itself where llama-cpp-python is installed, and nothing is kept where they
    differ. The figures are printed, and written beside the file (NAME.parity.json).
    """

    adapter: tyro.conf.Positional[str]
    """The adapter: its folder, a hub id, or a name in the store (NAME, NAME@VERSION)."""
    out: Path
    """The file to write, ending in .gguf."""
    format: Literal["gguf-adapter", "gguf-merged"] = "gguf-adapter"
    """The adapter alone, or a whole model."""
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """Number format of the file's matrices; auto: f32 for an adapter, f16 for a model. q8_0 has 8 bits and a scale for
    every 32 numbers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format in which the base is loaded and merged; auto: the base's own, in less memory."""
    modelfile: bool = False
    """Write an Ollama Modelfile beside it."""
    rescale: bool = False
    """Where modules have different scalings, multiply B so that the file's one alpha serves all (gguf-adapter)."""
    with_base: bool = False
    """Write the base as NAME-base.gguf, too, in the number format that it is loaded in (gguf-adapter)."""
    allow_loss: bool = False
    """Keep the file even if it differs from its source by more than is tolerated."""
    overwrite: bool = False
    """Replace a file that is there already."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.out.suffix != ".gguf":
            raise UserError(f"--out {self.out}: expected the name of a .gguf file")
        if self.format == "gguf-merged" and (self.rescale or self.with_base):
            flag = "--rescale" if self.rescale else "--with-base"
            raise UserError(f"{flag} is for --format gguf-adapter: a merged file has neither alpha nor base")
        if self.format == "gguf-adapter" and self.quantization != "none":
            raise UserError(
                f"--quantization {self.quantization} with --format gguf-adapter: an adapter's file doesn't depend on "
                "how its base is stored; leave it out, or use --format gguf-merged"
            )


def main(args: list[str]) -> int:
    options = parse(Options, "adapter export", args)
    from ..screen import out, print_json, quiet_libraries, size

    quiet_libraries()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    result = export(options)
    if options.json:
        print_json(_as_json(result))
        return 0
    for file in result.files:
        out.print(f"{file}   {size(file.stat().st_size)}", markup=False, soft_wrap=True)
    for line in _remarks(result):
        out.print(line, markup=False, soft_wrap=True)
    return 0


def export(options: Options) -> Export:
    """Load, write, compare, keep."""
    from ...adapters.gguf_format import export_adapter, export_merged
    from ...errors import UserError
    from ..models import load_model
    from ..screen import counted, err

    plan = _plan(options)
    files = [plan.out, plan.parity_out, *([plan.base_out] if plan.with_base else [])]
    files += [plan.modelfile_out] if plan.modelfile else []
    if not options.overwrite and (there := [file for file in files if file.exists()]):
        raise UserError(f"--out: {there[0]} exists already; give another name, or --overwrite")
    model, tokenizer = load_model(
        options.model,
        options.adapter,
        store=options.store,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    write = export_merged if options.format == "gguf-merged" else export_adapter
    with err.status("comparing on text"), counted("tensors") as progress:
        return write(model, tokenizer, plan, progress)


def _plan(options: Options) -> Plan:
    from ...adapters.gguf_format import Plan

    default: Outtype = "f16" if options.format == "gguf-merged" else "f32"
    return Plan(
        out=options.out,
        outtype=default if options.outtype == "auto" else options.outtype,
        modelfile=options.modelfile,
        allow_loss=options.allow_loss,
        rescale=options.rescale,
        with_base=options.with_base,
    )


def _remarks(result: Export) -> list[str]:
    lines = []
    if count := result.facts.get("rescaled_modules"):
        lines.append(f"B of {count} modules was multiplied, so that alpha {result.facts['alpha']:g} serves all")
    lines.append(f"by {result.by}: {result.parity}")
    if "remark" in result.facts:
        lines.append(result.facts["remark"])
    if result.tolerance.violations(result.parity):
        lines.append("kept although that is more than is tolerated (--allow-loss)")
    return lines


def _as_json(result: Export) -> dict[str, Any]:
    from ...adapters.parity import report

    told = report(result.parity, result.tolerance, **result.facts)
    return told | {"files": {file.name: file.stat().st_size for file in result.files}}
