"""``deltaw adapter inspect``: what an adapter's weights are made of; or how two adapters' relate."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..options import parse
from .stores import StoreOptions

if TYPE_CHECKING:
    from ...adapters.base_norms import BaseWeights
    from ...adapters.inspection import Comparison, Inspection
    from ...adapters.peft_format import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Look inside an adapter, module by module: deltaw adapter inspect ADAPTER

    Shows rank r and scaling s of ΔW = s·B·A; its norm, also against the base's weight where the base is on this
    machine; its largest singular values σ; how many directions it really uses (effective rank); and the ranks that keep
    90 and 99 % of it, which say what `compress` would save. Then what is strange: modules that never moved, entries
    that are no numbers, norms far from those of the other modules of their name. And where the adapter comes from.

    With two adapters: deltaw adapter inspect ONE OTHER compares them. A cosine near 1 says that they change a module
    alike, near 0 that they have nothing to do with each other; overlaps say how much of the directions that they write
    to (out) and read from (in) they share, beside what chance alone would give.
    """

    adapters: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="ADAPTER [OTHER]")]]
    """One adapter or two: folders, names in the store (NAME, NAME@VERSION), or hub ids."""
    base: str | None = None
    """The base model, where it isn't found by the name that the adapter has for it; fetched if need be."""
    require_base: bool = False
    """Fail where the base's weights can't be read, instead of leaving its column out."""
    allow_other_base: bool = False
    """Measure against a base with other weights than the adapter was trained on."""
    plot: Path | None = None
    """Draw it into this PNG file, too (needs matplotlib)."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if not 1 <= len(self.adapters) <= 2:
            raise UserError(f"{len(self.adapters)} adapters; expected one to look into, or two to compare")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {self.plot}: expected the name of a .png file")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter inspect", args)
    from ...adapters.peft_format import read_adapter
    from ...adapters.store import locate_adapter
    from ..screen import print_json, quiet_libraries

    quiet_libraries()
    if options.plot is not None:
        from .plots import check_matplotlib

        check_matplotlib()
    stored = [read_adapter(locate_adapter(text, options.store)) for text in options.adapters]
    found = [look(adapter, options) for adapter in stored]
    comparison = compare(stored[0], stored[1], options) if len(stored) == 2 else None
    if options.plot is not None:
        from .plots import plot_comparison, plot_inspection

        if comparison is None:
            plot_inspection(found[0], options.plot)
        else:
            plot_comparison(found[0], found[1], comparison, options.plot)
    if options.json:
        print_json(result(found, comparison))
    else:
        show(found, comparison, options)
    return 0


def result(found: list[Inspection], comparison: Comparison | None) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "adapters": [inspection.to_dict() for inspection in found],
        "comparison": None if comparison is None else comparison.to_dict(),
    }


def look(stored: StoredAdapter, options: Options) -> Inspection:
    """Every figure of one adapter, with the base's where it can be had."""
    from ...adapters.inspection import inspect_adapter
    from ...adapters.store import label_of
    from ...errors import UserError
    from ..screen import counted

    weights, note = None, None
    try:
        weights = _open_base(stored, options)
    except UserError as error:
        if options.base is not None or options.require_base:
            raise
        note = f"no ‖ΔW‖/‖W‖ for {label_of(stored.path)}: {error}; --base says where its base is"
    with weights or nullcontext(), counted(f"{label_of(stored.path)}: singular values") as progress:
        found = inspect_adapter(stored, weights, progress=progress)
    if note is not None:
        return dataclasses.replace(found, notes=(*found.notes, note))
    lost = [m.name for m in found.modules if m.base_norm is None and m.norm is not None]
    if options.require_base and lost:
        raise UserError(
            f"{found.base}: no weight in plain numbers for {len(lost)} of the adapter's modules "
            f"({', '.join(lost[:3])}); give another copy with --base, or leave --require-base out"
        )
    return found


def _open_base(stored: StoredAdapter, options: Options) -> BaseWeights:
    from ...adapters.base_norms import BaseWeights, base_at_hand
    from ...adapters.store import label_of
    from ...errors import UserError
    from ...nn.locate import locate

    name = options.base or stored.provenance.base_name or stored.config.base_model_name_or_path
    if name is None:
        raise UserError(f"{stored.path} doesn't say which base it was trained on")
    info = locate(name) if options.base is not None or options.require_base else base_at_hand(name)
    trained_on = stored.provenance.base_sha256
    if trained_on is not None and info.sha256 != trained_on and not options.allow_other_base:
        raise UserError(
            f"{label_of(stored.path)} was trained on weights with sha256 {trained_on[:12]}…, {name} has "
            f"{info.sha256[:12]}… (--allow-other-base takes it all the same)"
        )
    return BaseWeights(info)


def compare(one: StoredAdapter, other: StoredAdapter, options: Options) -> Comparison:
    """Both adapters beside each other; the base is opened for its names alone, where one has bare parameters."""
    from ...adapters.inspection import compare_adapters
    from ...errors import UserError
    from ..screen import counted

    weights: BaseWeights | None = None
    if one.config.target_parameters or other.config.target_parameters:
        try:
            weights = _open_base(one, options)
        except UserError:
            if options.base is not None or options.require_base:
                raise
    with weights or nullcontext(), counted("cosines and overlaps") as progress:
        return compare_adapters(one, other, weights, progress=progress)


def show(found: list[Inspection], comparison: Comparison | None, options: Options) -> None:
    """Tables and what they add up to, on standard output."""
    from .tables import comparison_table, inspection_table, say_comparison, say_inspection

    if comparison is None:
        inspection_table(found[0])
        say_inspection(found[0])
    else:
        comparison_table(found[0], found[1], comparison)
        say_comparison(found[0], found[1], comparison)
    if options.plot is not None:
        from ..screen import out

        out.print(f"drawn into {options.plot}", markup=False, soft_wrap=True)
