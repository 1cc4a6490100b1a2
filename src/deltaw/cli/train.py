"""``deltaw train``: train an adapter; also the preview of the data and the learning-rate range test."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

from ..train.options import TrainOptions
from .options import parse, yaml_args
from .program import command

if TYPE_CHECKING:
    from ..train.events import Event


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Train an adapter on your data: deltaw train [CONFIG.yaml] --data FILE …

    The data are JSONL, CSV or Parquet files, or a hub data set: chat (messages), prompt/completion,
    instruction/output, or text. What comes out is PEFT's two files, readable by every tool that speaks PEFT.
    A YAML file may hold any of the flags as keys; flags on the command line overrule it. Ctrl-C saves.
    """

    publish_as: Annotated[str | None, tyro.conf.arg(aliases=["--as"])] = None
    """Name to publish the trained adapter under (--as tickets)."""
    json: bool = False
    """Print the summary as one JSON object."""


def main(args: list[str]) -> int:
    if args and args[0].endswith((".yaml", ".yml")):
        args = yaml_args(Options, Path(args[0])) + args[1:]
    given = parse(Options, "train", args, negatable=True)
    options = TrainOptions(**{f.name: getattr(given, f.name) for f in dataclasses.fields(TrainOptions)})

    from .screen import err, quiet_libraries

    quiet_libraries()
    if options.preview:
        return _preview(options, as_json=given.json)
    if options.find_lr:
        return _find_lr(options, as_json=given.json)
    summary = train_with_bar(options)
    _report(summary, options, as_json=given.json)
    if summary["status"] == "interrupted":
        err.print(f"Saved. Go on with the same command and --resume (--out {options.out}).", markup=False)
        return 130
    return 2 if "error" in summary.get("published", {}) else 0  # the run is whole, but not where it was asked for


def train_with_bar(options: TrainOptions) -> dict[str, Any]:
    """Train under a progress bar; Ctrl-C finishes the step and saves."""
    from ..train.run import run_training
    from .progress import ProgressBar
    from .screen import counted

    with ProgressBar() as bar, Interrupts() as interrupts:
        return run_training(options, [interrupts, bar], interrupts.should_stop, counted)


class Interrupts:
    """What Ctrl-C does: before training it interrupts at once; then it asks to stop, and at once if said again."""

    def __init__(self) -> None:
        self._is_training = self._is_asked = False

    def __call__(self, event: Event) -> None:
        self._is_training |= event.kind == "started"

    def should_stop(self) -> bool:
        return self._is_asked

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._is_asked or not self._is_training:
            raise KeyboardInterrupt
        self._is_asked = True
        # Straight to the terminal: the bar's own thread may be in the middle of a line.
        os.write(2, b"\nStopping after this step, then saving; Ctrl-C again to stop at once.\n")


def _report(summary: dict[str, Any], options: TrainOptions, *, as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from .screen import duration, out, print_json, size

    if as_json:
        print_json(summary)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if before is not None and after is not None:
        table.add_row("held-out loss", f"{before:.4f} → {after:.4f} (step {summary['best_step']})")
    table.add_row("steps", f"{summary['steps']:,} in {duration(summary['train_seconds'])}")
    table.add_row("speed", f"{summary['tokens_per_second']:,.0f} tokens/s")
    table.add_row("peak memory", size(summary["peak_rss_bytes"]))
    sizes = f"{size(summary['adapter_bytes'])}; base {size(summary['base_bytes'])}"
    table.add_row("written", escape(f"{options.out} ({sizes})"))
    out.print(table)
    published = summary.get("published", {})
    if "version" in published:
        said = f"{published['name']}@{published['version'][:12]} in {published['store']}"
        out.print(f"published as {said}", markup=False, soft_wrap=True)
    if summary["status"] != "interrupted" and not options.full:
        same = () if options.quantization == "none" else ("--quantization", options.quantization)
        out.print(f"Next: {command('chat', '--adapter', options.out, *same)}", markup=False, soft_wrap=True)


def _preview(options: TrainOptions, *, as_json: bool) -> int:
    """Show examples as the model will see them: what is learnt is marked."""
    from rich.text import Text

    from ..data.render import preview
    from ..train.prepare import data_warnings, prepare_data
    from .screen import counted, out, print_json, visible

    data = prepare_data(options, counted)
    examples = data.train.examples
    shown = [(tokens, preview(tokens, data.tokenizer)) for tokens in examples[: options.preview]]
    if as_json:
        previews = [{**dataclasses.asdict(tokens), "pieces": pieces} for tokens, pieces in shown]
        print_json({"examples": previews, "warnings": data_warnings(data)})
        return 0
    for tokens, pieces in shown:
        cut = f", {tokens.num_truncated} cut off" if tokens.num_truncated else ""
        title = f"{tokens.origin}: {len(tokens.input_ids)} tokens, {sum(tokens.supervised)} supervised{cut}"
        out.rule()
        out.print(title, style="bold", markup=False, soft_wrap=True)
        text = Text()
        for piece, is_supervised in pieces:
            shown_piece = visible(piece)
            text.append(f"⟦{shown_piece}⟧" if is_supervised else shown_piece, style="green" if is_supervised else "dim")
        out.print(text, soft_wrap=True)
    lengths = sorted(len(tokens.input_ids) for tokens in examples)
    supervised = sum(sum(tokens.supervised) for tokens in examples)
    out.rule()
    out.print(
        f"{len(examples):,} examples, {sum(lengths):,} tokens, of which {supervised:,} are learnt (marked ⟦ ⟧). "
        f"Lengths: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}.",
        markup=False,
    )
    for message in data_warnings(data):
        out.print(message, style="yellow", markup=False)
    return 0


def _find_lr(options: TrainOptions, *, as_json: bool) -> int:
    from ..train.find_lr import find_learning_rate
    from .screen import counted, out, print_json

    found = find_learning_rate(options, counted)
    if as_json:
        print_json(dataclasses.asdict(found))
        return 0
    losses = [loss for _, loss in found.curve]
    best, spread = min(losses), (max(losses) - min(losses)) or 1.0
    for rate, loss in found.curve:
        out.print(f"{rate:9.2e}  {loss:7.4f}  {'█' * (1 + round(39 * (loss - best) / spread))}", markup=False)
    out.print(f"Suggested: --learning-rate {found.suggestion:.1e} ({found.reason})", markup=False)
    return 0
