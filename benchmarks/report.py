"""Write the tables in docs/ anew from benchmarks/results/*.json: no measured figure there is typed by hand.

    python benchmarks/report.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; --check writes nothing and fails if one is stale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from _common import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
ENOUGH = 5
"""Rounds that a figure should rest on."""


def train_step(result: dict) -> str:
    """Medians, spreads and ratios: one row a configuration, four columns a dtype."""
    dtypes = list(result["results"])
    titles = (f"{d}, s | {d}, least to most | {d}, against PEFT | {d}, peak" for d in dtypes)
    lines = ["| | " + " | ".join(titles) + " |", "|---" + "|---:" * 4 * len(dtypes) + "|"]
    for name in result["results"][dtypes[0]]:
        cells = []
        for dtype in dtypes:
            row = result["results"][dtype][name]
            peer = result["results"][dtype].get(_peer(name))
            ratio = "" if peer is None else f"{peer['seconds'] / row['seconds']:.2f}× the speed"
            spread = f"{min(row['seconds_all']):.2f} to {max(row['seconds_all']):.2f}"
            cells.append(f"{row['seconds']:.2f} | {spread} | {ratio} | {row['peak_rss_bytes'] / 1e9:.2f} GB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{_rounds(result)} {_first_losses(result)}", "", machine(result)])


def _rounds(result: dict) -> str:
    """How often was measured, and whether that is enough."""
    rounds = min(len(row["seconds_all"]) for rows in result["results"].values() for row in rows.values())
    few = "" if rounds >= ENOUGH else f" (fewer than {ENOUGH}: a first impression)"
    return f"Medians of {rounds} steps each, after a warm-up{few}."


def _first_losses(result: dict) -> str:
    """By how much both sides' losses differ before the first update: whether they compute the same thing."""
    found = []
    for dtype, rows in result["results"].items():
        pairs = [(row["first_loss"], rows[_peer(name)]["first_loss"]) for name, row in rows.items() if _peer(name)]
        found.append(f"{max(abs(ours / theirs - 1) for ours, theirs in pairs):.2g} in {dtype}")
    return f"The first step's losses agree with PEFT's to a relative {' and '.join(found)}."


def _peer(name: str) -> str:
    return name.replace("deltaw", "PEFT") if name.startswith("deltaw") else ""


def machine(result: dict) -> str:
    """One line: where, with what, by which command."""
    m = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    return (
        f"{m['processor']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB; Python {m['python']}, {versions}; "
        f"{m['day']}. `{m['command']}`"
    )


def python_docs(result: dict) -> str:
    """The exercise's figures, and its five answers."""
    run = result["summary"]
    flags = " ".join(f"{flag} {value}" for flag, value in result["setting"].items())
    epochs = run["config"]["epochs"]
    lines = [
        f"`deltaw train {flags}` on {round(run['examples'] / epochs):,} examples, {epochs:g} epochs:",
        "",
        "| | |",
        "|---|---|",
        f"| held-out loss | {run['eval_loss_before']:.4f} → {run['eval_loss_after']:.4f} |",
        f"| trained | {run['trainable_parameters']:,} of {run['total_parameters']:,} parameters |",
        f"| steps, tokens | {run['steps']:,}, {run['tokens']:,} ({run['supervised_tokens']:,} supervised) |",
        f"| time | {run['train_seconds']:.0f} s ({run['tokens_per_second']:.0f} tokens/s) |",
        f"| peak memory | {run['peak_rss_bytes'] / 1e9:.2f} GB |",
        f"| adapter file, base in memory | {run['adapter_bytes'] / 1e6:.2f} MB, {run['base_bytes'] / 1e6:.0f} MB |",
        "",
        "Five held-out questions, greedy answers of at most 64 tokens (cut here):",
        "",
        "| question | documentation | base | with the adapter |",
        "|---|---|---|---|",
    ]
    for row in result["compared"]:
        lines.append("| " + " | ".join(_cell(row[key]) for key in ("prompt", "wanted", "base", "adapter")) + " |")
    return "\n".join([*lines, "", machine(result)])


def _cell(text: str, limit: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= limit else text[:limit] + " …"


def adapters(result: dict) -> str:
    """Medians, spreads and ratios in milliseconds: one row an action."""
    lines = ["| | PEFT, ms | deltaw, ms | deltaw, least to most | against PEFT |", "|---|---:|---:|---:|---:|"]
    for name, by_library in result["results"].items():
        theirs, ours = (by_library[library] for library in ("PEFT", "deltaw"))
        spread = " to ".join(f"{1e3 * figure:.2f}" for figure in (min(ours["seconds_all"]), max(ours["seconds_all"])))
        ratio = f"{theirs['seconds'] / ours['seconds']:.0f}× the speed"
        lines.append(f"| {name} | {1e3 * theirs['seconds']:.1f} | {1e3 * ours['seconds']:.2f} | {spread} | {ratio} |")
    setting = result["setting"]
    what = f"{setting['adapter_bytes'] / 1e6:.1f} MB an adapter ({setting['dtype']})"
    few = "" if setting["rounds"] >= ENOUGH else f" (fewer than {ENOUGH}: a first impression)"
    return "\n".join([*lines, "", f"{what}; medians of {setting['rounds']}{few}.", "", machine(result)])


TABLES = {
    "train_step": ("benchmarks.md", train_step),
    "adapters": ("benchmarks.md", adapters),
    "python_docs": ("training.md", python_docs),
}


def main() -> int:
    stale = 0
    for name, (file, table) in TABLES.items():
        path, page = RESULTS / f"{name}.json", DOCS / file
        if not path.is_file():
            continue
        block = f"<!-- {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end {name} -->"
        old = page.read_text()
        new, count = re.subn(
            rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, block=block: block, old, flags=re.DOTALL
        )
        if not count:
            print(f"{file} has no place for {name}", file=sys.stderr)
            return 1
        stale += new != old
        if "--check" not in sys.argv:
            page.write_text(new)
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
