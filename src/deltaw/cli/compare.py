"""``deltaw compare``: the base and an adapter answer the same held-out examples, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .options import parse
from .reading import HeldOutOptions

if TYPE_CHECKING:
    from ..train.answers import Answer


@dataclass(frozen=True, kw_only=True)
class Options(HeldOutOptions):
    """Show what an adapter changed: held-out prompts, the wanted answer, the base's and the adapter's.

    Answers are greedy. The counts below the table are over the examples shown.
    """

    adapter: str
    """Adapter to compare with its base: its folder, or its name in a store."""
    n: int = 5
    """Examples to show, evenly spread over the data."""
    match: Literal["text", "json"] = "text"
    """How answers are judged: as text, or as JSON objects."""
    max_new_tokens: int = 128
    """Longest answer."""

    def __post_init__(self) -> None:
        from ..errors import UserError

        super().__post_init__()
        if self.n < 1:
            raise UserError(f"--n {self.n}: expected at least 1")


def main(args: list[str]) -> int:
    options = parse(Options, "compare", args)
    from .screen import out, print_json, quiet_libraries, size

    quiet_libraries()
    result, base, adapted = compare(options)
    if options.json:
        print_json(result)
        return 0
    show(base, adapted)
    out.print(
        f"exact answers: base {result['base_matches']} of {result['examples']}, "
        f"with the adapter {result['adapter_matches']} of {result['examples']}.  "
        f"Adapter {size(result['adapter_bytes'])}, base {size(result['base_bytes'])} "
        f"({result['base_bytes'] / result['adapter_bytes']:.0f} times as much)"
    )
    return 0


def compare(options: Options) -> tuple[dict[str, Any], list[Answer], list[Answer]]:
    """(plain JSON values, the base's answers, the adapter's)."""
    from ..adapters.peft_format import read_adapter
    from ..adapters.store import locate_adapter
    from ..nn.inject import activate, restore
    from ..nn.load import base_bytes
    from ..train.answers import answers
    from .models import load_model
    from .screen import counted

    everything = options.examples()
    count = min(options.n, len(everything))
    examples = [everything[i * len(everything) // count] for i in range(count)]
    stored = read_adapter(locate_adapter(options.adapter, options.store))
    model, tokenizer = load_model(
        options.model,
        stored,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        allow_other_base=options.allow_other_base,
    )
    found: dict[str, list[Answer]] = {}
    for who, names in (("base", []), ("adapter", ["adapter"])):
        activate(model, names, trainable=False)
        with counted(f"{who} answers") as progress:
            found[who] = answers(
                model,
                tokenizer,
                examples,
                match=options.match,
                max_new_tokens=options.max_new_tokens,
                progress=progress,
            )
    restore(model)
    result = {
        "examples": count,
        "base_matches": sum(a.is_match for a in found["base"]),
        "adapter_matches": sum(a.is_match for a in found["adapter"]),
        "adapter_bytes": stored.num_bytes,
        "base_bytes": base_bytes(model),
        "compared": side_by_side(found["base"], found["adapter"]),
    }
    return result, found["base"], found["adapter"]


def side_by_side(base: Sequence[Answer], adapted: Sequence[Answer]) -> list[dict[str, Any]]:
    """Both answers to each example, as plain JSON values."""
    return [
        {
            "prompt": b.prompt,
            "wanted": b.wanted,
            "base": b.got,
            "base_is_match": b.is_match,
            "adapter": a.got,
            "adapter_is_match": a.is_match,
        }
        for b, a in zip(base, adapted, strict=True)
    ]


def show(base: Sequence[Answer], adapted: Sequence[Answer]) -> None:
    """One block an example: prompt, wanted, base, adapter, with marks."""
    from rich.table import Table
    from rich.text import Text

    from .screen import out, visible

    for b, a in zip(base, adapted, strict=True):
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text, mark in (
            ("prompt", b.prompt, ""),
            ("wanted", b.wanted, ""),
            ("base", b.got, _mark(b.is_match)),
            ("adapter", a.got, _mark(a.is_match)),
        ):
            table.add_row(label, Text(f"{mark}{visible(_short(text))}", style=_STYLES[mark]))
        out.print(table)
        out.print()


def _mark(is_match: bool) -> str:
    return "✓ " if is_match else "✗ "


_STYLES = {"✓ ": "green", "✗ ": "red", "": ""}


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else text[:limit] + " …"
