"""``deltaw modules``: what can be adapted in a model, grouped by shape, with what each would add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """List a model's layers that can be adapted: deltaw modules MODEL

    Layers of one name and one shape make a row: how many there are, what an adapter of rank r adds for each and for
    all of them, and which of the strategies (all-linear, attention, mlp, qv) choose them. No weights are read.
    """

    model: str = "smollm2-135m"
    """Base model: smollm2-135m, a folder, a .gguf file or a hub id."""
    r: int = 16
    """Rank to count with."""
    json: bool = False
    """Print one JSON object."""


def main(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    options = parse(Options, "modules", args)
    from rich.table import Table

    from .screen import out, print_json, quiet_libraries

    quiet_libraries()
    result = describe(options)
    if options.json:
        print_json(result)
        return 0
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("name", "shape", "count", f"adds (r={options.r})", "each", "chosen by"):
        table.add_column(title, justify="left" if title in ("name", "chosen by") else "right")
    for row in result["modules"]:
        table.add_row(
            row["name"],
            f"{row['shape'][0]} × {row['shape'][1]}",
            str(row["count"]),
            f"{row['parameters']:,}",
            f"{row['parameters_each']:,}",
            ", ".join(row["strategies"]) or "–",
        )
    out.print(table)
    for name, total in result["strategies"].items():
        out.print(f"{name:<11} {total:>14,} parameters ({100 * total / result['total_parameters']:.3f} % of the model)")
    return 0


def describe(options: Options) -> dict[str, Any]:
    """Rows and totals as plain JSON values."""
    from ..config import STRATEGIES, LoraConfig
    from ..errors import UserError
    from ..nn.inject import head_name, linear_names, logical_modules
    from ..nn.load import skeleton
    from ..nn.storage import frozen_weight
    from ..targets import choose

    model = skeleton(options.model)
    modules, linear, head = dict(logical_modules(model)), linear_names(model), head_name(model)
    chosen: dict[str, list[str]] = {}
    for strategy in STRATEGIES:
        config = LoraConfig(r=options.r, target_modules=strategy)
        try:
            chosen[strategy] = choose(config, list(modules), linear, head=head)
        except UserError:  # a model without such layers
            chosen[strategy] = []
    rows: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    added: dict[str, int] = {}
    for name in linear:
        weight = frozen_weight(modules[name])
        shape = (weight.out_features, weight.in_features)
        added[name] = options.r * sum(shape)
        row = rows.setdefault(
            (name.rpartition(".")[2], shape),
            {
                "name": name.rpartition(".")[2],
                "shape": list(shape),
                "count": 0,
                "parameters": 0,
                "parameters_each": added[name],
                "strategies": [s for s in STRATEGIES if name in chosen[s]],
                "modules": [],
            },
        )
        row["count"] += 1
        row["parameters"] += added[name]
        row["modules"].append(name)
    return {
        "model": options.model,
        "r": options.r,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "modules": list(rows.values()),
        "strategies": {s: sum(added[n] for n in names) for s, names in chosen.items() if names},
    }
