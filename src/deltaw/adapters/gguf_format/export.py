"""Export an adapter, alone or merged, and prove it: nothing is kept before its logits were compared with its source's.

The figures come from llama.cpp itself where ``llama-cpp-python`` is installed; else from the file's numbers, read back
into the model, which shows that they are all there and in place, but not that llama.cpp computes the same with them.
The report says which of the two was done.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, Keys
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UserError
from ...files import replace_files
from ...nn.inject import activate, restore
from ...nn.load import base_info
from ..merge import merge_and_unload
from ..parity import (
    CAST,
    LOSSY,
    Parity,
    Tolerance,
    parity_of,
    reference_ids,
    reference_logits,
    report,
    require,
    sampled_logits,
    tolerance_for,
    window_logits,
)
from ..peft_format import load_adapter
from .adapter import factors_of, read_adapter_gguf, stored_of, with_one_alpha, write_adapter_gguf
from .check import has_llama, run
from .layout import Layout, family_of
from .merged import read_model_gguf, write_model_gguf
from .modelfile import modelfile
from .tensors import Outtype, open_gguf, value_of
from .vocabulary import cut_name

Progress = Callable[[int, int], None]
_OUTTYPES: dict[torch.dtype, Outtype] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What holds the numbers of a base in memory exactly."""
_READ_BACK = "the file, read back"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to write, and how strict to be."""

    out: Path
    """The GGUF file."""
    outtype: Outtype = "f32"
    modelfile: bool = False
    """Write an Ollama Modelfile beside it."""
    allow_loss: bool = False
    """Keep the file whatever the comparison says."""
    name: str = "adapter"
    """Which adapter of the model."""
    rescale: bool = False
    """Multiply B where modules have different scalings (adapter alone)."""
    with_base: bool = False
    """Write the base as a GGUF file too, in the dtype that it is in (adapter alone)."""

    @property
    def base_out(self) -> Path:
        return self.out.with_name(f"{self.out.stem}-base.gguf")

    @property
    def modelfile_out(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.Modelfile")

    @property
    def parity_out(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.parity.json")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how it compares."""

    files: tuple[Path, ...]
    parity: Parity
    tolerance: Tolerance
    by: str
    """How the figures were found: by which llama.cpp, or by reading the file back."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """What the adapted model says, before anything is done to it."""

    ids_T: Tensor
    logits_TV: Tensor
    base_TS: Tensor


def export_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress | None = None
) -> Export:
    """Write the model's adapter as a GGUF LoRA adapter. The model is as it was afterwards.

    Raises ``UserError``, with nothing written, for what such a file can't hold, and beyond the tolerance.
    """
    layout = Layout(model)
    factors, alpha, num_rescaled = with_one_alpha(factors_of(model, plan.name, layout), rescale=plan.rescale)
    source = _source(model, tokenizer, plan.name)
    with _scratch(plan) as folder:
        file, base = folder / plan.out.name, folder / plan.base_out.name
        describe = _describe(model, plan)
        write_adapter_gguf(file, factors, alpha, layout, outtype=plan.outtype, describe=describe, progress=progress)
        can_run, by = _write_base(model, tokenizer, plan, base, progress)
        logits = _read_back(model, file, layout, plan, source.ids_T)
        if can_run:
            logits = run(base, source.ids_T, tokenizer if plan.with_base else None, lora=file)
        parity = _compare(source, logits, model)
        facts: dict[str, Any] = {"by": by, "alpha": alpha, "modules": len(factors), "rescaled_modules": num_rescaled}
        text, remark = _modelfile(model, tokenizer, plan)
        facts |= {"remark": remark} if plan.modelfile and remark else {}
        return _kept(plan, [file, *([base] if plan.with_base else [])], parity, _tolerance(model, plan), facts, text)


def export_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress | None = None
) -> Export:
    """Merge the adapter into the model, and write it whole. The model is merged, and as the file says, afterwards.

    Raises ``UserError``, with nothing written, for what llama.cpp can't compute, and beyond the tolerance.
    """
    Layout(model)
    source = _source(model, tokenizer, plan.name)
    merge_and_unload(model, [plan.name])
    with _scratch(plan) as folder:
        file = folder / plan.out.name
        describe = _describe(model, plan)
        write_model_gguf(file, model, tokenizer, outtype=plan.outtype, describe=describe, progress=progress)
        if has_llama():
            parity = _compare(source, run(file, source.ids_T, tokenizer), model)
        else:
            read_model_gguf(file, model)
            parity = _compare(source, window_logits(model, source.ids_T), model)
        text = modelfile(tokenizer, base=f"./{plan.out.name}", adapter=None)
        return _kept(
            plan, [file], parity, _tolerance(model, plan), {"by": _by_llama() if has_llama() else _READ_BACK}, text
        )


def _source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> _Source:
    ids_T = reference_ids(tokenizer)
    activate(model, ())
    base_TS = sampled_logits(model, ids_T)
    activate(model, (name,))
    return _Source(ids_T, reference_logits(model, ids_T), base_TS)


def _compare(source: _Source, logits: Iterator[Tensor], model: PreTrainedModel) -> Parity:
    return parity_of(source.logits_TV, logits, base_TS=source.base_TS, dtype=model.dtype)


def _read_back(model: PreTrainedModel, path: Path, layout: Layout, plan: Plan, ids_T: Tensor) -> Iterator[Tensor]:
    """Logits with the file's own factors in place of those that it was made from."""
    again = f"{plan.name}-exported"
    load_adapter(model, stored_of(path, read_adapter_gguf(path, layout)), again)
    try:
        yield from window_logits(model, ids_T)
    finally:
        restore(model, again)
        activate(model, (plan.name,))


def _tolerance(model: PreTrainedModel, plan: Plan) -> Tolerance:
    if plan.outtype != "f32":
        return LOSSY if plan.outtype == "q8_0" else CAST
    # ggml looks GELU up in a table of float16 numbers, whatever the weights are in.
    is_exact = family_of(model.config).activations == ("silu",) or not has_llama()
    return tolerance_for(model.dtype) if is_exact else CAST


def _by_llama() -> str:
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"


def _write_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, path: Path, progress: Progress | None
) -> tuple[bool, str]:
    """(whether llama.cpp can run the adapter, how the figures are found), the base being written where it is needed.

    A base that GGUF has no words for, such as its tokenizer, is no fault of the adapter's file unless it was asked for.
    """
    if not (plan.with_base or has_llama()):
        return False, _READ_BACK
    try:
        own = _OUTTYPES[model.dtype]
        write_model_gguf(path, model, tokenizer, outtype=own, base_only=True, progress=progress)
    except UserError as error:
        if plan.with_base:
            raise
        return False, f"{_READ_BACK} (not by llama.cpp: {error})"
    return has_llama(), _by_llama() if has_llama() else _READ_BACK


def _modelfile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> tuple[str, str]:
    """(Modelfile of an adapter's export, what to know about it)."""
    own = _own_file(model)
    remark = ""
    if plan.with_base:
        base = f"./{plan.base_out.name}"
    elif own is not None:
        base, remark = own, _other_cut(Path(own), tokenizer)
    else:
        base, remark = "./base.gguf", "base.gguf stands for the GGUF file of the base"
    return modelfile(tokenizer, base=base, adapter=f"./{plan.out.name}", note=remark), remark


def _own_file(model: PreTrainedModel) -> str | None:
    """The GGUF file that the base was loaded from, if it was one."""
    info = base_info(model)
    return None if info is None or info.gguf is None else str(info.gguf.absolute())


def _other_cut(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to know where a base's own file cuts text otherwise than the tokenizer here; else nothing."""
    with open_gguf(path) as reader:
        theirs = value_of(reader, Keys.Tokenizer.PRE)
    try:
        ours = cut_name(tokenizer)
    except UserError:
        return ""  # nothing to compare
    if theirs in (None, ours):
        return ""
    return (
        f"{path.name} cuts text as {theirs!r}, the tokenizer here as {ours!r}: some texts (numbers, mostly) become "
        "other tokens there than those that the adapter was trained on; --with-base writes a file that agrees"
    )


@contextmanager
def _scratch(plan: Plan) -> Iterator[Path]:
    """A folder beside the result, gone at the end."""
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.out.parent, prefix=f".{plan.out.name}.") as folder:
        yield Path(folder)


def _kept(
    plan: Plan, files: list[Path], parity: Parity, tolerance: Tolerance, facts: dict[str, Any], text: str
) -> Export:
    """Put everything in its place, if the figures allow it."""
    require(parity, tolerance, allow=plan.allow_loss, what="export")
    facts |= {"step": "export", "outtype": plan.outtype}
    told = json.dumps(report(parity, tolerance, **facts), indent=2, allow_nan=False) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        file.name: lambda scratch, file=file: os.replace(file, scratch)  # type: ignore[misc]
        for file in files
    }
    writers[plan.parity_out.name] = lambda scratch: scratch.write_text(told, encoding="utf-8")
    if plan.modelfile:
        writers[plan.modelfile_out.name] = lambda scratch: scratch.write_text(text, encoding="utf-8")
    replace_files(plan.out.parent, writers)
    written = tuple(plan.out.parent / name for name in writers)
    return Export(files=written, parity=parity, tolerance=tolerance, by=facts["by"], facts=facts)


def _describe(model: PreTrainedModel, plan: Plan) -> Callable[[GGUFWriter], None]:
    info = base_info(model)

    def describe(writer: GGUFWriter) -> None:
        writer.add_name(plan.out.stem)
        if info is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, Path(info.name).name)
        if plan.outtype == "q8_0":
            writer.add_quantization_version(GGML_QUANT_VERSION)

    return describe
