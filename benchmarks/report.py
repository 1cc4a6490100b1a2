"""Write the tables in docs/ anew from benchmarks/results/*.json: no measured figure there is typed by hand.

    python benchmarks/report.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; --check writes nothing and fails if one is stale.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

from _common import RESULTS
from _qlora_tables import PARTS as QLORA_PARTS
from _qlora_tables import part as qlora_part

DOCS = Path(__file__).parents[1] / "docs"
ENOUGH = 5
"""Rounds that a figure should rest on."""


DEFAULT_SHAPE = "smollm2"
FLOOR = "floor"
PEERS = {
    "deltaw, dropout 0": "PEFT, dropout 0",
    "deltaw, gradient checkpointing": "PEFT, dropout 0",
    "deltaw, dropout 0.05": "PEFT, dropout 0.05",
    "deltaw DoRA": "PEFT DoRA",
}
"""Whom each of ours is measured against."""


def train_step(result: dict) -> str | None:
    """The default shape, all configurations: a table a dtype."""
    runs = result["runs"].get(DEFAULT_SHAPE)
    return runs and "\n\n".join(_step_table(run, dtype) for dtype, run in runs.items())


def _step_table(run: dict, dtype: str) -> str:
    titles = ("s", "least to most", "against PEFT", "against full", "÷ floor", "peak", "of PEFT's")
    lines = [f"| {dtype} | " + " | ".join(titles) + " |", "|---" + "|---:" * len(titles) + "|"]
    rows = run["results"]
    full = rows.get("full fine-tuning")
    for name, row in rows.items():
        peer = rows.get(PEERS.get(name, ""))
        cells = [
            f"{row['seconds']:.2f}",
            f"{min(row['seconds_all']):.2f} to {max(row['seconds_all']):.2f}",
            f"{peer['seconds'] / row['seconds']:.2f}× the speed" if peer else "",
            f"{full['seconds'] / row['seconds']:.2f}×" if peer and full and _ran_together(row, full) else "",
            _over_floor(row) if name != FLOOR else "",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{row['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f}" if peer else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = "" if "note" not in run else f" ({run['note']})"
    return "\n".join([*lines, "", f"{_rounds(run)} {_first_losses(run)}{note}", "", machine(run)])


def train_step_shapes(result: dict) -> str | None:
    """All shapes: PEFT and deltaw without dropout, a row a shape and dtype."""
    titles = ("PEFT, s", "deltaw, s", "against PEFT", "floor, s", "÷ floor", "PEFT, peak", "deltaw, peak", "of PEFT's")
    lines = ["| | | " + " | ".join(titles) + " |", "|---|---" + "|---:" * len(titles) + "|"]
    if set(result["runs"]) <= {DEFAULT_SHAPE}:
        return None
    runs = [run for by_dtype in result["runs"].values() for run in by_dtype.values()]
    for by_dtype in result["runs"].values():
        for dtype, run in by_dtype.items():
            ours, theirs = (run["results"][name] for name in ("deltaw, dropout 0", "PEFT, dropout 0"))
            cells = [
                f"{theirs['seconds']:.2f}",
                f"{ours['seconds']:.2f}",
                f"{theirs['seconds'] / ours['seconds']:.2f}× the speed",
                f"{ours['floor_seconds']:.2f}" if "floor_seconds" in ours else "",
                _over_floor(ours),
                *(f"{row['peak_rss_bytes'] / 1e9:.2f} GB" for row in (theirs, ours)),
                f"{ours['peak_rss_bytes'] / theirs['peak_rss_bytes']:.2f}",
            ]
            lines.append(f"| {run['setting'].get('title', DEFAULT_SHAPE)} | {dtype} | " + " | ".join(cells) + " |")
    machines = dict.fromkeys(machine(run) for run in runs)
    return "\n".join([*lines, "", _rounds(*runs), "", "\n\n".join(machines)])


def train_step_breakdown(result: dict) -> str | None:
    """Where deltaw's step goes, by part: two columns a shape and dtype."""
    runs = [
        (f"{run['setting']['title']}, {dtype}", run)
        for by_dtype in result["runs"].values()
        for dtype, run in by_dtype.items()
        if "breakdown" in run
    ]
    if not runs:
        return None
    found = [run["breakdown"] for _, run in runs]
    lines = ["| ms | " + " | ".join(title for title, _ in runs) + " |", "|---" + "|---:" * len(runs) + "|"]
    rows = {
        part: [f"{1e3 * one['parts'][part]:.0f} ({100 * one['parts'][part] / one['seconds']:.0f} %)" for one in found]
        for part in found[0]["parts"]
    }
    rows["the profiled step"] = [f"{1e3 * one['seconds']:.0f}" for one in found]
    rows["the step without profiler"] = [f"{1e3 * one['seconds_without_profiler']:.0f}" for one in found]
    rows["floor"] = [f"{1e3 * run['results']['deltaw, dropout 0']['floor_seconds']:.0f}" for _, run in runs]
    rows["calls of operators and kernels"] = [f"{one['calls']:,}" for one in found]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join([*lines, "", "\n\n".join(dict.fromkeys(machine(run) for _, run in runs))])


def _ran_together(one: dict, other: dict) -> bool:
    """Whether two configurations took turns: each group has its own measurement of the floor."""
    return one.get("floor_seconds") == other.get("floor_seconds")


def _over_floor(row: dict) -> str:
    return f"{row['seconds'] / row['floor_seconds']:.2f}" if "floor_seconds" in row else ""


def _rounds(*runs: dict) -> str:
    """How often was measured, and whether that is enough."""
    rounds = min(len(row["seconds_all"]) for run in runs for row in run["results"].values())
    few = "" if rounds >= ENOUGH else f" (fewer than {ENOUGH}: a first impression)"
    return f"Medians of {rounds} steps each, after a warm-up{few}."


def _first_losses(run: dict) -> str:
    """By how much both sides' losses differ before the first update: whether they compute the same thing."""
    rows = run["results"]
    pairs = [(rows[ours]["first_loss"], rows[theirs]["first_loss"]) for ours, theirs in PEERS.items() if ours in rows]
    apart = max(abs(a / b - 1) for a, b in pairs)
    how = f"agree with PEFT's to a relative {apart:.2g}" if apart else "are PEFT's exactly"
    return f"The first step's losses {how}."


def train_end_to_end(result: dict) -> str:
    """Whole runs: speed, memory, and the held-out loss that one evaluator found for all."""
    rows, data, setting = result["results"], result["data"], result["setting"]
    titles = ("examples/s", "training, s", "against TRL", "peak", "of TRL's", "held-out loss", "against TRL")
    lines = ["| | " + " | ".join(titles) + " |", "|---" + "|---:" * len(titles) + "|"]
    peer = rows["TRL + PEFT"]
    for name, row in rows.items():
        ratio, memory, loss = (row[key] / peer[key] for key in ("examples_per_second", "peak_rss_bytes", "eval_loss"))
        cells = [
            f"{row['examples_per_second']:.2f}",
            ", ".join(f"{seconds:.0f}" for seconds in row["seconds_all"]),
            f"{ratio:.2f}× the speed" if row is not peer else "",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"1/{1 / memory:.1f}" if row is not peer else "",
            f"{row['eval_loss']:.4f}",
            f"{100 * (loss - 1):+.2f} %" if row is not peer else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    what = (
        f"{data['examples']:,} examples of 50 to 600 tokens ({data['tokens']:,} tokens, {data['supervised_tokens']:,} "
        f"learnt), {setting['batch_size']} to a step. Held-out loss before training: {result['eval_loss_before']:.4f}, "
        f"over {result['held_out']['examples']} examples ({result['held_out']['supervised_tokens']:,} tokens)."
    )
    return "\n".join([*lines, "", what, "", machine(result)])


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


def algebra(result: dict) -> str:
    """Medians of seconds and extra memory: a table a model, one row an action."""
    setting, blocks = result["setting"], []
    for model, actions in result["results"].items():
        lines = [
            f"| {model} | PEFT, s | deltaw, s | least to most | against PEFT | PEFT, extra | deltaw, extra |",
            "|---" + "|---:" * 6 + "|",
        ]
        for name, by_library in actions.items():
            theirs, ours = (by_library[library] for library in ("PEFT", "deltaw"))
            spread = " to ".join(f"{figure:.2f}" for figure in (min(ours["seconds_all"]), max(ours["seconds_all"])))
            ratio = f"{theirs['seconds'] / ours['seconds']:.1f}× the speed"
            extra = " | ".join(f"{row['extra_bytes'] / 1e6:.0f} MB" for row in (theirs, ours))
            lines.append(f"| {name} | {theirs['seconds']:.2f} | {ours['seconds']:.2f} | {spread} | {ratio} | {extra} |")
        first = next(iter(actions.values()))["deltaw"]
        lines += ["", f"The largest layer takes {first['largest_layer_float32_bytes'] / 1e6:.0f} MB in float32."]
        blocks.append("\n".join(lines))
    few = "" if setting["rounds"] >= ENOUGH else f" (fewer than {ENOUGH}: a first impression)"
    return "\n\n".join([*blocks, f"Medians of {setting['rounds']}{few}.", machine(result)])


TABLES = {
    "algebra": ("algebra", "benchmarks.md", algebra),
    "train_step": ("train_step", "benchmarks.md", train_step),
    "train_step_shapes": ("train_step", "benchmarks.md", train_step_shapes),
    "train_step_breakdown": ("train_step", "benchmarks.md", train_step_breakdown),
    "train_end_to_end": ("train_end_to_end", "benchmarks.md", train_end_to_end),
    "adapters": ("adapters", "benchmarks.md", adapters),
    **{f"qlora_{name}": ("qlora", "benchmarks.md", partial(qlora_part, name, machine)) for name in QLORA_PARTS},
    "python_docs": ("python_docs", "training.md", python_docs),
}
"""Name → (raw figures, page, what makes the table; None: there are no figures for it yet)."""


def main() -> int:
    stale = 0
    for name, (raw, file, table) in TABLES.items():
        path, page = RESULTS / f"{raw}.json", DOCS / file
        made = table(json.loads(path.read_text())) if path.is_file() else None
        if made is None:
            continue
        block = f"<!-- {name} -->\n{made}\n<!-- end {name} -->"
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
