"""``deltaw modules``: what can be adapted in a model, grouped by shape, with what each would add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """List a model's layers that can be adapted: deltaw modules MODEL

    Layers of one name and one shape make a row: how many there are, what an adapter of rank r adds for each and for
    all of them, and which of the strategies (all-linear, attention, mlp, qv) choose them. No strategy chooses
    embeddings: they are adapted where --target-modules names them. No weights are read.
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
        table.add_row(*_cells(row), ", ".join(row["strategies"]) or "by name only")
    if result["embeddings"]:
        table.add_section()
        table.add_row("[dim]embeddings[/dim]")
    for row in result["embeddings"]:
        table.add_row(*_cells(row), "by name only")
    out.print(table)
    for name, total in result["strategies"].items():
        out.print(f"{name:<11} {total:>14,} parameters ({100 * total / result['total_parameters']:.3f} % of the model)")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    shape = f"{row['shape'][0]} × {row['shape'][1]}"
    return [row["name"], shape, str(row["count"]), f"{row['parameters']:,}", f"{row['parameters_each']:,}"]


def describe(options: Options) -> dict[str, Any]:
    """Rows and totals as plain JSON values."""
    from torch import nn

    from ..config import STRATEGIES, LoraConfig
    from ..errors import UserError
    from ..nn.load import skeleton
    from ..nn.storage import frozen_weight
    from ..nn.walk import head_name, linear_names, logical_modules
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
    weights = {name: frozen_weight(modules[name]) for name in linear}
    shapes = {name: (weight.out_features, weight.in_features) for name, weight in weights.items()}
    tables = {n: (m.num_embeddings, m.embedding_dim) for n, m in modules.items() if isinstance(m, nn.Embedding)}
    return {
        "model": options.model,
        "r": options.r,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "modules": _rows(shapes, options.r, chosen),
        "embeddings": _rows(tables, options.r, chosen),
        "strategies": {s: options.r * sum(sum(shapes[n]) for n in names) for s, names in chosen.items() if names},
    }


def _rows(shapes: dict[str, tuple[int, int]], r: int, chosen: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One row for all modules of one last name and one shape; A and B of rank r add r · (the shape's sum) to each."""
    alike: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault((name.rpartition(".")[2], shape), []).append(name)
    return [
        {
            "name": last,
            "shape": list(shape),
            "count": len(names),
            "parameters": r * sum(shape) * len(names),
            "parameters_each": r * sum(shape),
            "strategies": [strategy for strategy, those in chosen.items() if names[0] in those],
            "modules": names,
        }
        for (last, shape), names in alike.items()
    ]
