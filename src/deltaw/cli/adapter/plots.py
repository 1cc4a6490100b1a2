"""Pictures of `deltaw adapter inspect --plot`: one PNG, drawn by matplotlib without a screen.

One adapter: a heat map of its norms by layer and kind of module, a second of the share of its rank that it uses, and
how fast the energy of each kind gathers in its largest singular values. Two adapters: heat maps of the cosine and of
both overlaps.
"""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.inspection import Comparison, Inspection, ModuleFigures
from ...adapters.store import label_of
from ...errors import UserError
from ...files import replace_file
from ...settings import is_number
from .tables import natural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#222222", "#8a8a8a"
_OUTSIDE = -1
"""Column of modules that stand in no layer (embeddings, the head)."""


def check_matplotlib() -> None:
    """``UserError`` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed; run: pip install 'deltaw[plot]'")


def plot_inspection(found: Inspection, path: Path) -> None:
    """One adapter as a picture. Raises ``UserError`` where it has no sound module to draw."""
    sound = [m for m in found.modules if m.norm is not None]
    if not sound:
        raise UserError(f"{found.path}: no module of finite numbers, so nothing to draw")
    place = _places([m.name for m in sound])
    has_base = any(m.relative_norm is not None for m in sound)
    figure = _figure(len({place[m.name][0] for m in sound}))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1))
    ratio = "‖W′ − W‖ / ‖W‖" if found.use_dora else "‖ΔW‖ / ‖W‖"
    sizes = {m.name: (m.relative_norm if has_base else m.norm) for m in sound}
    shares = {m.name: m.effective_rank / m.rank if m.effective_rank else None for m in sound}
    top, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    _heat(figure, top, place, sizes, title=ratio if has_base else "‖ΔW‖", colours="magma", is_log=True)
    _heat(figure, below, place, shares, title="effective rank / r", colours="viridis", limits=(0, 1))
    below.set_xlabel("layer")
    _energies(figure.add_subplot(grid[:, 1]), place, sound)
    t = found.totals
    of_base = f", {100 * t['relative_norm']:.3g} % of ‖W‖" if t["relative_norm"] is not None else ""
    _title(figure, label_of(found.path), f"{t['modules']} modules, {t['parameters']:,} parameters{of_base}")
    _save(figure, path)


def plot_comparison(one: Inspection, other: Inspection, comparison: Comparison, path: Path) -> None:
    """Two adapters beside each other as a picture."""
    place = _places(list(comparison.modules))
    figure = _figure(len({kind for kind, _ in place.values()}), rows=3)
    likes = comparison.modules.items()
    axes = [figure.add_subplot(3, 1, i + 1) for i in range(3)]
    cosines = {name: like.cosine for name, like in likes}
    most = max((abs(c) for c in cosines.values() if c is not None), default=1.0)
    _heat(figure, axes[0], place, cosines, title="cosine of ΔW and ΔW′", colours="RdBu", limits=(-most, most))
    for axis, side, values, chances in (
        (axes[1], "outputs (B)", {n: k.overlap_out for n, k in likes}, [k.by_chance_out for _, k in likes]),
        (axes[2], "inputs (A)", {n: k.overlap_in for n, k in likes}, [k.by_chance_in for _, k in likes]),
    ):
        known = [c for c in chances if c is not None]
        title = f"overlap of {side}" + (f"; by chance {100 * statistics.median(known):.1f} %" if known else "")
        _heat(figure, axis, place, values, title=title, colours="viridis", limits=(0, 1))
    axes[2].set_xlabel("layer")
    whole = "not defined" if comparison.cosine is None else f"{comparison.cosine:+.3f}"
    _title(figure, f"{label_of(one.path)} and {label_of(other.path)}", f"cosine of the whole {whole}")
    _save(figure, path)


def _figure(num_kinds: int, rows: int = 2) -> Figure:
    from matplotlib.figure import Figure

    height = rows * (0.9 + 0.26 * max(4, min(num_kinds, 24))) + 0.9
    return Figure(figsize=(12.5, height), layout="constrained", facecolor="white")


def _places(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """name → (kind, layer): what stands behind the layer's number, and that number, or ``_OUTSIDE``."""
    found = {name: re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name) for name in names}
    prefixes = {m[1] for m in found.values() if m}
    out = {}
    for name, m in found.items():
        if m is None:
            out[name] = (name.removeprefix("model."), _OUTSIDE)
        else:
            stack = f"{m[1].split('.')[0]} · " if len(prefixes) > 1 else ""  # encoder and decoder
            out[name] = (stack + re.sub(r"\.\d+(?=\.|$)", ".*", m[3]), int(m[2]))
    return out


def _heat(
    figure: Figure,
    axis: Axes,
    place: Mapping[str, tuple[str, int]],
    values: Mapping[str, float | None],
    *,
    title: str,
    colours: str,
    is_log: bool = False,
    limits: tuple[float, float] = (0, 1),
) -> None:
    """A strip of squares: kinds down, layers across; grey where there is nothing."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    kinds = sorted({kind for kind, _ in place.values()}, key=natural)
    layers = sorted({layer for _, layer in place.values()})
    cells: dict[tuple[int, int], list[float]] = {}
    for name, value in values.items():
        if value is not None and is_number(value) and (value > 0 or not is_log):
            kind, layer = place[name]
            cells.setdefault((kinds.index(kind), layers.index(layer)), []).append(value)
    grid = np.full((len(kinds), len(layers)), np.nan)
    for cell, those in cells.items():
        grid[cell] = statistics.fmean(those)
    seen = grid[np.isfinite(grid)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.1, 1.0)
    if is_log:
        norm: Any = LogNorm(low, high if high > low else low * 1.01)
    else:
        norm = Normalize(*limits)
    palette = colormaps[colours].with_extremes(bad="#e9e9e9")
    image = axis.pcolormesh(np.ma.masked_invalid(grid), cmap=palette, norm=norm, edgecolors="white", linewidth=0.6)
    axis.invert_yaxis()
    axis.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, fontsize=9, color=_INK)
    step = max(1, math.ceil(len(layers) / 16))
    shown = list(range(0, len(layers), step))
    axis.set_xticks(
        [i + 0.5 for i in shown], ["–" if layers[i] == _OUTSIDE else str(layers[i]) for i in shown], fontsize=9
    )
    _plain(axis, title)
    bar = figure.colorbar(image, ax=axis, pad=0.012, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=_INK, length=0, which="both")


def _energies(axis: Axes, place: Mapping[str, tuple[str, int]], modules: Sequence[ModuleFigures]) -> None:
    """Share of ‖ΔW‖² in the k largest singular values, the median over the layers of each kind."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    kinds = sorted({place[m.name][0] for m in modules if m.has_moved}, key=natural)
    colour: Callable[[float], Any] = colormaps["tab10" if len(kinds) <= 10 else "turbo"]
    most = 1
    for i, kind in enumerate(kinds):
        curves = [_gathered(m.singular_values) for m in modules if place[m.name][0] == kind and m.has_moved]
        most = max(most, *map(len, curves))
        length = min(map(len, curves))
        middle = [statistics.median(curve[k] for curve in curves) for k in range(length)]
        hue = colour(i if len(kinds) <= 10 else i / max(1, len(kinds) - 1))
        marker = "o" if length <= 32 else None
        axis.plot(range(1, length + 1), middle, color=hue, label=kind, linewidth=1.6, marker=marker, markersize=3)
    for level in (0.9, 0.99):
        axis.axhline(level, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 4)))
        axis.annotate(f"{100 * level:.0f} %", (0.01, level), xycoords=("axes fraction", "data"), fontsize=8,
                      color=_FAINT, ha="left", va="bottom")  # fmt: skip
    axis.set_ylim(0, 1.04)
    axis.set_xlim(0.5, most + 0.5)
    axis.set_xlabel("rank kept")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
    _plain(axis, "share of ‖ΔW‖² kept (median over layers)")
    axis.legend(fontsize=8, frameon=False, loc="lower right", ncols=1 if len(kinds) <= 12 else 2)


def _gathered(singular_values: Sequence[float]) -> list[float]:
    total, so_far, out = math.fsum(s * s for s in singular_values), 0.0, []
    for s in singular_values:
        so_far += s * s
        out.append(so_far / total if total else 0.0)
    return out


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, color=_INK, loc="left")
    axis.tick_params(length=0, labelcolor=_INK)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _title(figure: Figure, name: str, facts: str) -> None:
    figure.suptitle(f"{_for_matplotlib(name)}   {facts}", fontsize=12, color=_INK, x=0.01, ha="left")


def _for_matplotlib(text: str) -> str:
    """Names may hold anything; a pair of dollars would be read as mathematics."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda scratch: figure.savefig(scratch, format="png", dpi=110))
