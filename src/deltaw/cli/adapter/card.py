"""``deltaw adapter card``: a README.md that says what an adapter is, what it learnt and what it forgot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..options import parse
from ..reading import BaseOptions

if TYPE_CHECKING:
    from ...adapters.card import Measured
    from ...adapters.peft_format import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Write an adapter's card: deltaw adapter card runs/first --eval-data heldout.jsonl

    README.md beside the adapter, where PEFT has it and the hub reads it: what was trained, on what, with which figures
    (from summary.json beside it, where a run left one), hashes, versions, how to load it.

    Measured anew are the loss on general text with and without the adapter, which is what the model has forgotten, and,
    with --eval-data, the loss on held-out data of the task.
    """

    adapter: tyro.conf.Positional[str]
    """The adapter: its folder, a hub id, or a name in the store."""
    out: Path | None = None
    """File to write; README.md beside the adapter where none is given."""
    name: str | None = None
    """Title; the folder's name where none is given."""
    eval_data: str | None = None
    """Held-out data of the task: a file or a hub data set (owner/name, or owner/name:config)."""
    data_split: str | None = None
    """Split of a hub data set, or a part of one (test[:100]); test where none is given."""
    data_format: Literal["auto", "chat", "prompt", "instruction", "text"] = "auto"
    """How to read the examples, where their keys don't say it."""
    max_length: int = 1024
    """Tokens of one example beyond which it is cut."""
    tokens: int = 512
    """Tokens of general text to measure on; more than the text has means all of it."""
    skip_measuring: bool = False
    """Measure nothing, and load no base."""
    overwrite: bool = False
    """Replace a card that somebody else has written."""
    json: bool = False
    """Print one JSON object with the figures and the card's text."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.tokens < 2:
            raise UserError(f"--tokens {self.tokens}: expected at least 2")
        if self.max_length < 2:
            raise UserError(f"--max-length {self.max_length}: expected at least 2")
        if self.skip_measuring and self.eval_data is not None:
            raise UserError("--skip-measuring with --eval-data: leave one out")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter card", args)
    from ...adapters.card import CARD_NAME, card, license_of, may_write, read_summary, write_card
    from ...adapters.peft_format import read_adapter
    from ...adapters.store import locate_adapter
    from ...errors import UserError
    from ...files import replace_text
    from ..models import base_of
    from ..screen import out, print_json, quiet_libraries

    quiet_libraries()
    stored = read_adapter(locate_adapter(options.adapter, options.store))
    path = options.out or stored.path / CARD_NAME
    if path.is_dir():
        raise UserError(f"--out {path}: a folder; expected a file, such as {path / CARD_NAME}")
    if path.name == CARD_NAME and not (options.overwrite or may_write(path.parent)):
        raise UserError(f"{path}: was written by somebody else; add --overwrite to replace it, or give another --out")
    base = options.model or base_of(stored)
    measured = None if options.skip_measuring else measure(stored, base, options)
    text = card(
        stored,
        name=options.name or stored.path.resolve().name,
        summary=read_summary(stored.path),
        measured=measured,
        license_name=_license(base, license_of),
    )
    if path.name == CARD_NAME:
        write_card(path.parent, text, overwrite=options.overwrite)
    else:
        replace_text(path, text)
    if options.json:
        print_json({"out": str(path), "measured": _as_json(measured), "card": text})
        return 0
    if measured is not None:
        out.print(_line("general text", measured.text, measured.text_tokens), markup=False, soft_wrap=True)
        if measured.task is not None:
            out.print(_line(measured.task_name, measured.task, measured.task_tokens), markup=False, soft_wrap=True)
    out.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


def measure(stored: StoredAdapter, base: str, options: Options) -> Measured:
    """Losses of the base and of the base with the adapter."""
    from ...adapters import parity
    from ...adapters.card import Measured
    from ...data.formats import load_examples
    from ...data.records import split_of
    from ...data.render import render_all
    from ...nn.inject import activate
    from ...train.evaluate import mean_loss
    from ...train.forward import examine
    from ...train.prepare import check_length
    from ..models import load_model
    from ..screen import counted, err

    examples = None
    if options.eval_data is not None:
        split = split_of(options.eval_data, options.data_split, default="test", flag="--data-split")
        examples = load_examples(options.eval_data, data_format=options.data_format, split=split)
    network, tokenizer = load_model(
        base,
        stored,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    ids = parity.reference_ids(tokenizer, options.tokens)
    rendered = None
    if examples is not None:
        check_length(network.config, options.max_length)
        with counted("data → tokens") as progress:
            rendered = render_all(
                examples, tokenizer, loss_on="assistant", max_length=options.max_length, progress=progress
            )
    text, task, supervised = [], [], 0
    for what, names in (("base", []), ("base with the adapter", ["adapter"])):
        activate(network, names)
        with err.status(f"{what}, on general text"):
            text.append(parity.text_loss(parity.window_logits(network, ids), ids))
        if rendered is not None:
            with counted(f"{what}, on held-out data") as progress:
                loss, supervised = mean_loss(examine(network), rendered.examples, 2048, progress)
                task.append(loss)
    return Measured(
        text=(text[0], text[1]),
        text_tokens=len(ids),
        task=(task[0], task[1]) if task else None,
        task_tokens=supervised,
        task_name=Path(options.eval_data or "").name,
    )


def _license(base: str, license_of: Any) -> str | None:
    from ...errors import UserError
    from ...nn.locate import locate

    try:
        found: str | None = license_of(locate(base, weights=False))
        return found
    except UserError:  # a base that isn't on this machine
        return None


def _line(what: str, losses: tuple[float, float], tokens: int) -> str:
    before, after = losses
    return f"{what}: loss {before:.4f} → {after:.4f} ({after - before:+.4f}) over {tokens:,} tokens"


def _as_json(measured: Measured | None) -> dict[str, Any] | None:
    import dataclasses

    return None if measured is None else dataclasses.asdict(measured)
