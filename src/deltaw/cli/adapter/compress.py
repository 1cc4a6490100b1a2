"""``deltaw adapter compress``: the same adapter at a smaller rank, with what that costs."""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..options import parse
from ..reading import BaseOptions

if TYPE_CHECKING:
    from ...adapters.compress import Compressed, Ranks
    from ...adapters.parity import Parity, Tolerance
    from ...adapters.peft_format import StoredAdapter


MAX_LOST_EFFECT = 0.3
"""How far from 1 the share of the adapter's effect on the logits may be that the result still has."""


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Cut an adapter to a smaller rank: deltaw adapter compress runs/first --energy 0.99 --out smaller

    Every module's s·B·A keeps its largest singular values: the best approximation there is of that rank. With --rank
    all modules get one rank; with --energy each gets the least rank that keeps that share of ‖ΔW‖², and the config
    says which (rank_pattern). Scalings stay as they are. `deltaw adapter inspect` shows what to expect.

    Base and adapter are then compared with base and result on real text. Where the result says something else, nothing
    is kept. The figures are printed, and written beside the result (parity.json). A DoRA adapter keeps its magnitudes.
    """

    adapter: tyro.conf.Positional[str]
    """The adapter: its folder, a hub id, or a name in the store (NAME, NAME@VERSION)."""
    out: Path
    """Folder for the result; it must not exist yet."""
    rank: int | None = None
    """Rank of every module (those that have less keep it)."""
    energy: float | None = None
    """Share of its ‖ΔW‖² that every module keeps, such as 0.99."""
    rank_pattern: str = ""
    """Ranks of single modules, before the other two: 'q_proj=4,layers.0.mlp.up_proj=8', by PEFT's rules."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format to compare in. float32 leaves rounding out of the figures; auto, the base's own, may take half the
    memory."""
    tokens: int = 512
    """Tokens of text to compare on; more than the text has means all of it."""
    max_kl: float = 0.1
    """Mean KL divergence, in nats a token, beyond which the result is refused."""
    allow_loss: bool = False
    """Keep the result even if it differs from its source by more than is tolerated."""
    skip_parity: bool = False
    """Compare nothing, and load no base: for adapters whose base is not on this machine."""
    json: bool = False
    """Print one JSON object, with every module's rank and energy."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: expected at least 2")
        if not self.max_kl > 0:
            raise UserError(f"--max-kl {self.max_kl}: expected nats over 0, such as 0.1")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter compress", args)
    from ..screen import print_json, quiet_libraries

    quiet_libraries()
    result = compress_to_folder(options)
    if options.json:
        print_json(result)
    else:
        show(result, options)
    return 0


def compress_to_folder(options: Options) -> dict[str, Any]:
    """Cut, write, load, compare, keep; plain JSON values."""
    from ...adapters.compress import compress
    from ...adapters.parity import without, write_report
    from ...adapters.peft_format import read_adapter, write_adapter
    from ...adapters.store import locate_adapter
    from ...errors import UserError
    from ...files import new_folder
    from ..screen import counted

    started, ranks = time.perf_counter(), wanted_ranks(options)
    if options.out.exists() or options.out.is_symlink():
        raise UserError(f"--out {options.out}: exists already; give a new folder, or remove that one")
    stored = read_adapter(locate_adapter(options.adapter, options.store))
    with counted("singular values") as progress:
        done = compress(stored, ranks, skeleton=_skeleton(stored, options), progress=progress)
    result, facts = dataclasses.replace(done.adapter, provenance=_provenance(stored, options)), _facts(done, options)
    with new_folder(options.out) as scratch:
        write_adapter(result, scratch)
        written = read_adapter(scratch)
        if options.skip_parity:
            report, text = without(**facts), None
        else:
            parity, tolerance = _compare(stored, written, options)
            report, text = _judge(parity, tolerance, facts, options), str(parity)
        write_report(scratch, report)
    sizes = {"bytes_before": stored.num_bytes, "bytes": written.num_bytes}
    return report | sizes | {"out": str(options.out), "text": text, "seconds": round(time.perf_counter() - started, 3)}


def wanted_ranks(options: Options) -> Ranks:
    """The three flags together. Raises ``UserError`` for a pattern that can't be read."""
    from ...adapters.compress import Ranks
    from ...errors import UserError

    pattern: dict[str, int] = {}
    rest = options.rank_pattern.strip()
    while rest:
        # A name may be an expression with commas or equal signs in it: it ends before "=" and a number.
        match = re.match(r"\s*(\S+?)\s*=\s*(\d{1,5})\s*(?:,|$)", rest)
        if match is None:
            raise UserError(f"--rank-pattern {rest!r}: expected names and ranks, such as 'q_proj=4,down_proj=8'")
        pattern[match[1]] = int(match[2])
        rest = rest[match.end() :]
    return Ranks(rank=options.rank, energy=options.energy, pattern=pattern)


def _skeleton(stored: StoredAdapter, options: Options) -> Any:
    """The base's architecture, for an adapter on bare parameters, whose names stand in it alone."""
    if not stored.config.target_parameters:
        return None
    from ...nn.load import skeleton
    from ..models import base_of

    return skeleton(options.model or base_of(stored))


def _provenance(stored: StoredAdapter, options: Options) -> Any:
    from ...adapters.store.content import content_hash

    wishes = {"--rank": options.rank, "--energy": options.energy, "--rank-pattern": options.rank_pattern or None}
    said = " ".join(f"{flag} {value}" for flag, value in wishes.items() if value is not None)
    return stored.provenance.after(f"compress {said} of {content_hash(stored.path)[:16]}")


def _facts(done: Compressed, options: Options) -> dict[str, Any]:
    return {
        "step": "compress",
        "adapter": str(options.adapter),
        "rank": options.rank,
        "asked_energy": options.energy,
        "rank_pattern": options.rank_pattern or None,
        "energy": done.energy,
        "parameters_before": done.parameters_before,
        "parameters": done.parameters,
        "modules": [dataclasses.asdict(module) for module in done.modules],
    }


def _compare(stored: StoredAdapter, written: StoredAdapter, options: Options) -> tuple[Parity, Tolerance]:
    """The base with the source, and with what was written, on the same text."""
    from ...adapters import parity
    from ...adapters.peft_format import load_adapter
    from ...nn.inject import activate, restore
    from ..models import load_model
    from ..screen import err

    network, tokenizer = load_model(
        options.model,
        stored,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    ids = parity.reference_ids(tokenizer, options.tokens)
    with err.status("the adapter, on text"):
        source_TV = parity.reference_logits(network, ids)
        activate(network, [])
        base_TS = parity.sampled_logits(network, ids)
    with err.status("the result, on the same text"):
        restore(network, "adapter")  # of adapters with trained biases, a model holds one
        load_adapter(network, written, "result", allow_other_base=options.allow_other_base)
        result = parity.window_logits(network, ids)
        found = parity.parity_of(source_TV, result, base_TS=base_TS, dtype=network.dtype)
    return found, dataclasses.replace(parity.LOSSY, mean_kl=options.max_kl, lost_effect=MAX_LOST_EFFECT)


def _judge(parity: Parity, tolerance: Tolerance, facts: dict[str, Any], options: Options) -> dict[str, Any]:
    from ...adapters.parity import report, require

    require(parity, tolerance, allow=options.allow_loss, what="compress")
    return report(parity, tolerance, **facts)


def show(result: dict[str, Any], options: Options) -> None:
    """A row for each kind of module, and the sums."""
    from rich.table import Table
    from rich.text import Text

    from ..program import command
    from ..screen import out, size, visible

    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in result["modules"]:
        kinds.setdefault(module["name"].rpartition(".")[2], []).append(module)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("", "modules", "r before", "r", "least energy kept"):
        table.add_column(title, justify="right" if title else "left")
    for kind, modules in kinds.items():
        before, after = ([m[key] for m in modules] for key in ("rank_before", "rank"))
        least = min(m["energy"] for m in modules)
        table.add_row(Text(visible(kind)), str(len(modules)), _range(before), _range(after), f"{100 * least:.2f} %")
    out.print(table)
    share = 100 * result["parameters"] / result["parameters_before"]
    lines = [
        f"{options.adapter} → {options.out}: {result['parameters']:,} of {result['parameters_before']:,} parameters "
        f"({share:.0f} %), {size(result['bytes'])} instead of {size(result['bytes_before'])}; "
        f"{100 * result['energy']:.2f} % of ‖ΔW‖² kept"
    ]
    if result["text"] is None:
        lines.append("nothing was compared (--skip-parity)")
    else:
        lines.append(f"against the adapter as it was: {result['text']}")
        if (dtype := result["parity"]["dtype"]) != "float32":
            lines.append(f"(computed in {dtype}, whose rounding is in these figures; --dtype float32 leaves that out)")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    if result["passed"] is False:
        out.print("kept although that is more than is tolerated (--allow-loss)", style="yellow", soft_wrap=True)
    out.print(f"Next: {command('chat', '--adapter', options.out)}", markup=False, soft_wrap=True)


def _range(ranks: list[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
