"""``deltaw adapter merge``: an adapter becomes part of its base, a plain transformers checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..options import parse
from ..reading import BaseOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Put an adapter into its base's weights: deltaw adapter merge runs/first --out merged

    What is written is a plain transformers checkpoint that needs nothing of deltaw: weights in shards, config,
    generation config, tokenizer and chat template. W + ΔW is computed in float32 and cast once, layer by layer. A base
    in 4 or 8 bits becomes a dense one; --requantize keeps one in 4 bits so, which loses most of a small adapter.

    The checkpoint is then loaded anew and compared with base and adapter held apart, on real text. If it says
    something else, nothing is kept. The figures are printed, and written beside the weights (parity.json).
    """

    adapter: tyro.conf.Positional[str]
    """The adapter: its folder, a hub id, or a name in the store (NAME, NAME@VERSION)."""
    out: Path
    """Folder for the checkpoint; it must not exist yet."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the checkpoint; auto: the base's own."""
    shard_size: str = "5GB"
    """Largest file of weights."""
    tokens: int = 512
    """Tokens of text to compare on; more than the text has means all of it."""
    requantize: bool = False
    """Quantise what was merged anew, as the base is, instead of writing it dense."""
    allow_loss: bool = False
    """Keep the checkpoint even if it differs from its source by more than is tolerated."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: expected at least 2")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter merge", args)
    from ..program import command
    from ..screen import duration, out, print_json, quiet_libraries, size

    quiet_libraries()
    result = merge_to_folder(options)
    if options.json:
        print_json(result)
        return 0
    files = f"{result['files']} file{'s' if result['files'] > 1 else ''} of weights"
    facts = f"{size(result['bytes'])} in {result['dtype']}, {files}, {duration(result['seconds'])}"
    out.print(f"{options.adapter} in {result['base']} → {options.out} ({facts})", markup=False, soft_wrap=True)
    out.print(f"against base and adapter apart: {result['text']}", markup=False, soft_wrap=True)
    if not result["passed"]:
        out.print("kept although that is more than is tolerated (--allow-loss)", style="yellow", soft_wrap=True)
    out.print(f"Next: {command('chat', '--model', options.out)}", markup=False, soft_wrap=True)
    return 0


def merge_to_folder(options: Options) -> dict[str, Any]:
    """Merge, write, load again, compare, keep; plain JSON values."""
    from ...adapters import parity
    from ...adapters.merge import merge_and_unload
    from ...adapters.merge_loss import MergeLoss
    from ...adapters.peft_format import read_adapter
    from ...adapters.plain import save_plain, shard_bytes
    from ...adapters.store import locate_adapter
    from ...files import new_folder
    from ...nn.inject import activate
    from ...nn.load import base_info
    from ..models import base_of, load_model
    from ..screen import err

    started, shard_size = time.perf_counter(), shard_bytes(options.shard_size)
    _check_free(options.out)
    stored = read_adapter(locate_adapter(options.adapter, options.store))
    base = options.model or base_of(stored)
    computed, wanted = _dtypes(base, options.dtype)
    network, tokenizer = load_model(
        base,
        stored,
        dtype=str(computed).removeprefix("torch."),
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    info = base_info(network)
    ids = parity.reference_ids(tokenizer, options.tokens)
    with err.status("base and adapter apart, on text"):
        source_TV = parity.reference_logits(network, ids)
        activate(network, [])
        base_TS = parity.sampled_logits(network, ids)
        activate(network, ["adapter"])
    with new_folder(options.out) as scratch:
        with err.status("merging and writing"):
            loss = MergeLoss()
            merge_and_unload(network, requantize=options.requantize, loss=loss).to(wanted)
            save_plain(network, tokenizer, scratch, base=info, adapter=stored.path, shard_size=shard_size)
            del network  # one model at a time
        with err.status("the checkpoint, on the same text"):
            result = _load_again(scratch, wanted, options.device)
            found = parity.parity_of(source_TV, parity.window_logits(result, ids), base_TS=base_TS, dtype=wanted)
            del result
        tolerance = parity.LOSSY if options.requantize else parity.tolerance_for(computed, wanted)
        parity.require(found, tolerance, allow=options.allow_loss, what="merge")
        report = parity.report(
            found,
            tolerance,
            step="merge",
            base=base,
            base_sha256=None if info is None else info.sha256,
            adapter=str(options.adapter),
            adapter_sha256=_hash(stored.path),
            rounding=loss.figures(),
        )
        parity.write_report(scratch, report)
        weights = [path.stat().st_size for path in scratch.glob("*.safetensors")]
    return report | {
        "text": str(found),
        "out": str(options.out),
        "dtype": str(wanted).removeprefix("torch."),
        "files": len(weights),
        "bytes": sum(weights),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _check_free(out: Path) -> None:
    """``UserError`` before anything is loaded, not after everything is done."""
    from ...errors import UserError

    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; give a new folder, or remove that one")


def _dtypes(base: str, asked: str) -> tuple[torch.dtype, torch.dtype]:
    """(dtype to load the base and to compute in, dtype to write).

    The base's own, and what was asked for at the end: a base that was cast before adding would be rounded twice.
    float16 is computed in float32, since not every processor knows it.
    """
    import torch

    from ...nn.load import DTYPES, load_tokenizer
    from ...nn.locate import locate

    info = locate(base, weights=False)
    own = torch.bfloat16 if info.gguf is not None else load_tokenizer(base)[1].dtype
    own = own if isinstance(own, torch.dtype) else torch.float32
    wanted = own if asked == "auto" else DTYPES[asked]
    computed = torch.promote_types(own, wanted)
    return (torch.float32 if computed == torch.float16 else computed), wanted


def _load_again(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The checkpoint as anybody would load it: what is compared is what lies on disk."""
    import torch

    from ...nn.load import load_base

    network, _ = load_base(folder, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)
    return network


def _hash(folder: Path) -> str:
    from ...adapters.store.content import content_hash

    return content_hash(folder)
