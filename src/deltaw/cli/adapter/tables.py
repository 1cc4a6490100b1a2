"""How `deltaw adapter inspect` shows its figures: tables of at most 100 columns, then the sums in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...adapters.inspection import OUTLIER_RULE, Comparison, Inspection, ModuleFigures
from ...adapters.store import label_of
from ..program import command
from ..screen import out, visible

WIDTH = 100
_NARROW = 92
"""Columns below which the table shows one singular value instead of three."""


def inspection_table(found: Inspection) -> None:
    """A row a module, in the order of layers."""
    prefix = shared_prefix(m.name for m in found.modules)
    with_base = any(m.relative_norm is not None for m in found.modules)
    ratio = "‖W′−W‖/‖W‖" if found.use_dora else "‖ΔW‖/‖W‖"
    sigmas = ["σ₁", "σ₂", "σ₃"] if _width() >= _NARROW else ["σ₁"]
    titles = ["r", "s", "‖ΔW‖", *([ratio] if with_base else []), *sigmas, "eff. r", "r90", "r99"]
    table = _table(f"{prefix}…" if prefix else "module", titles, last=True)
    for m in sorted(found.modules, key=lambda m: natural(m.name)):
        first = [_number(s) for s in m.singular_values[: len(sigmas)]]
        first += [""] * (len(sigmas) - len(first))
        rank = f"{m.num_experts}×{m.rank}" if m.num_experts > 1 else str(m.rank)
        base = [_number(m.relative_norm)] if with_base else []
        effective = "–" if m.effective_rank is None else f"{m.effective_rank:.1f}"
        cells = [rank, _number(m.scaling), _number(m.norm), *base, *first, effective, _whole(m.rank_90)]
        table.add_row(_name(m.name, prefix), *cells, _whole(m.rank_99), _remark(m))
    _print(table)


def say_inspection(found: Inspection) -> None:
    """The sums, what is strange, and where the adapter comes from."""
    t = found.totals
    others = f" and {t['other_parameters']:,} others" if t["other_parameters"] else ""
    against = f", {100 * t['relative_norm']:.3g} % of ‖W‖ ({found.base})" if t["relative_norm"] is not None else ""
    _say(f"{t['modules']:,} modules, {t['parameters']:,} parameters{others}; ‖ΔW‖ {_number(t['norm'])}{against}")
    if t["mean_effective_rank"] is not None:
        _say(
            f"effective rank {t['mean_effective_rank']:.1f} on average; of every module, rank {t['largest_rank_90']} "
            f"keeps 90 %, rank {t['largest_rank_99']} 99 %"
        )
        if t["parameters_at_99"] < 0.95 * t["parameters"]:
            share = 100 * t["parameters_at_99"] / t["parameters"]
            does = command("adapter", "compress", found.path, "--energy", "0.99", "--out", "smaller")
            _say(f"99 % of each would fit into {share:.0f} % of the parameters: {does}")
    _list("never moved (no ΔW)", t["not_moved"], "yellow")
    _list("not finite (NaN or infinite)", t["not_finite"], "red")
    _list("outliers", t["outliers"], "yellow", rule=OUTLIER_RULE)
    for line in _provenance(found.provenance):
        _say(line, style="dim")
    for note in found.notes:
        _say(f"note: {note}", style="yellow")


def comparison_table(one: Inspection, other: Inspection, comparison: Comparison) -> None:
    """A row for each module that both have."""
    ones, others = ({m.name: m for m in found.modules} for found in (one, other))
    prefix = shared_prefix(comparison.modules)
    titles = ["r", "r′", "‖ΔW‖", "‖ΔW′‖", "cosine", "out", "chance", "in", "chance"]
    table = _table(f"{prefix}…" if prefix else "module", titles)
    for name in sorted(comparison.modules, key=natural):
        a, b, like = ones[name], others[name], comparison.modules[name]
        figures = (like.overlap_out, like.by_chance_out, like.overlap_in, like.by_chance_in)
        cosine = Text("–" if like.cosine is None else f"{like.cosine:+.3f}", style=_cosine_style(like.cosine))
        shares = ["–" if x is None else f"{100 * x:.1f} %" for x in figures]
        table.add_row(_name(name, prefix), str(a.rank), str(b.rank), _number(a.norm), _number(b.norm), cosine, *shares)
    _print(table)


def say_comparison(one: Inspection, other: Inspection, comparison: Comparison) -> None:
    """Both as wholes."""
    first, second = labels(one, other)
    cosine = "not defined (one is zero)" if comparison.cosine is None else f"{comparison.cosine:+.4f}"
    norms = comparison.norms
    _say(
        f"as wholes: cosine {cosine}; ‖ΔW‖ {_number(norms[0])} ({first}), ‖ΔW′‖ {_number(norms[1])} ({second}), "
        f"‖ΔW − ΔW′‖ {_number(comparison.distance)}"
    )
    _say("out, in: share of the smaller one's directions that lie in the larger one's; chance: of random ones", "dim")
    _list(f"only {first} has", comparison.only_one, "yellow")
    _list(f"only {second} has", comparison.only_other, "yellow")
    for note in comparison.notes:
        _say(f"note: {note}", style="yellow")


def labels(one: Inspection, other: Inspection) -> tuple[str, str]:
    """What to call two adapters: by their folders' names, or by their whole paths where these are alike."""
    names = label_of(one.path), label_of(other.path)
    return (one.path, other.path) if names[0] == names[1] else names


def shared_prefix(names: Iterable[str]) -> str:
    """What stands before the layer's number in every name that has one, if it is one and the same."""
    prefixes = {m[1] for name in names if (m := re.match(r"(.*?\.)\d+\.", name))}
    return prefixes.pop() if len(prefixes) == 1 else ""


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _table(first: str, titles: Sequence[str], *, last: bool = False) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    if last:
        table.add_column("", no_wrap=True)
    return table


def _print(table: Table) -> None:
    Console(highlight=False, width=_width()).print(table)


def _width() -> int:
    return min(WIDTH, out.width) if out.is_terminal else WIDTH  # a pipe or a file has none of its own


def _name(name: str, prefix: str) -> Text:
    return Text(visible(name.removeprefix(prefix)))


def _remark(m: ModuleFigures) -> Text:
    if m.num_not_finite:
        return Text("not finite", style="red")
    if m.has_moved is False:
        return Text("never moved", style="yellow")
    return Text("outlier" if m.is_outlier else "", style="yellow")


def _cosine_style(cosine: float | None) -> str:
    return "" if cosine is None or abs(cosine) < 0.1 else "green" if cosine > 0 else "red"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def _say(line: str, style: str = "") -> None:
    out.print(visible(line), style=style or None, markup=False, soft_wrap=True)


def _list(what: str, names: Sequence[str], style: str, rule: str = "") -> None:
    if names:
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        _say(f"{len(names)} {what}: {', '.join(names[:6])}{more}{f' ({rule})' if rule else ''}", style)


def _provenance(came: dict[str, Any]) -> list[str]:
    if not came["base_name"] and not came["versions"]:
        return ["no provenance in its file (another tool's)"]
    data = f", data sha256 {came['data_sha256'][:12]}…" if came["data_sha256"] else ""
    base = f" (sha256 {came['base_sha256'][:12]}…)" if came["base_sha256"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in came["versions"].items())
    return [f"trained on {came['base_name']}{base}{data}; {versions}", *(f"then: {step}" for step in came["history"])]
