"""What there is to know of one stored adapter, or of two beside each other: plain figures, module by module.

An outlier is a module whose norm (relative to its weight's where the base is at hand) is far from those of its kind:
among the modules of one last name (all q_proj …) that have moved, at least ``MIN_KIND`` of them,

    |log x − median(log x)| > max(3.5 · 1.4826 · MAD, log 2)        MAD = median |log x − median(log x)|

(Iglewicz & Hoaglin 1993, "How to detect and handle outliers": 3.5 robust standard deviations; the factor of two keeps
modules out of it that are merely alike to a hair.)

The figures' mathematics stand in ``spectrum.py``, those of the base in ``base_norms.py``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError
from .base_norms import BaseFigures, BaseWeights
from .deltas import AdaptedModule, modules_of
from .peft_format import StoredAdapter
from .peft_format.keys import ROWS
from .spectrum import Likeness, likeness
from .store.names import label_of

MIN_KIND = 5
"""Modules of one kind from which on a median says something."""

OUTLIER_RULE = (
    "norm more than 3.5 robust standard deviations (1.4826·MAD of the logarithm), and at least a factor of 2, from the "
    "median of the modules of its name"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ModuleFigures:
    """One module of an adapter; None where a figure doesn't exist (numbers that are none, a weight not at hand)."""

    name: str
    kind: str
    """``linear``, ``embedding`` or ``parameter`` (a bare one, of experts)."""
    shape: tuple[int, int]
    """(outputs, inputs) of ΔW, of one expert's where there are several."""
    num_experts: int
    rank: int
    scaling: float
    num_parameters: int
    num_not_finite: int
    """Entries of its tensors that are NaN or infinite."""
    has_moved: bool | None
    """False: B is still zero, or the factors still are their start."""
    norm: float | None
    """‖ΔW‖ = ‖s·B·A‖, of all experts together."""
    base_norm: float | None
    """‖W‖."""
    relative_norm: float | None
    """‖ΔW‖/‖W‖; for DoRA ‖W′ − W‖/‖W‖, with its column scale."""
    column_scale: tuple[float, float, float] | None
    """DoRA's least, median and largest magnitude against the norm of its row."""
    singular_values: tuple[float, ...]
    """Of s·B·A, largest first; of experts, their root mean square over them."""
    effective_rank: float | None
    rank_90: int | None
    """Rank that keeps 90 % of ‖ΔW‖²."""
    rank_99: int | None
    is_outlier: bool = False


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One adapter."""

    path: str
    modules: tuple[ModuleFigures, ...]
    others: dict[str, dict[str, Any]]
    """What isn't low-rank, by name: shape, what it is, entries that are no numbers."""
    use_dora: bool
    config: dict[str, Any]
    provenance: dict[str, Any]
    base: str | None
    """The base whose weights were read; None where none was."""
    notes: tuple[str, ...]
    """What a reader must know of these figures."""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all modules."""
        shown = [m for m in self.modules if m.norm is not None]
        norm = math.hypot(*(m.norm or 0.0 for m in shown))
        with_base = [m for m in shown if m.relative_norm is not None and m.base_norm]
        change = math.hypot(*((m.relative_norm or 0.0) * (m.base_norm or 0.0) for m in with_base))
        base_norm = math.hypot(*(m.base_norm or 0.0 for m in with_base))
        moved = [m for m in shown if m.has_moved]
        return {
            "modules": len(self.modules),
            "parameters": sum(m.num_parameters for m in self.modules),
            "other_parameters": sum(math.prod(o["shape"]) for o in self.others.values()),
            "norm": norm,
            "relative_norm": change / base_norm if base_norm else None,
            "mean_effective_rank": statistics.fmean(m.effective_rank or 0.0 for m in moved) if moved else None,
            "largest_rank_90": max((m.rank_90 or 0 for m in moved), default=None),
            "largest_rank_99": max((m.rank_99 or 0 for m in moved), default=None),
            "parameters_at_99": sum(_parameters_at(m, m.rank_99) for m in self.modules),
            "not_moved": [m.name for m in self.modules if m.has_moved is False],
            "not_finite": [m.name for m in self.modules if m.num_not_finite]
            + [name for name, other in self.others.items() if other["num_not_finite"]],
            "outliers": [m.name for m in self.modules if m.is_outlier],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "totals": self.totals, "outlier_rule": OUTLIER_RULE}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two adapters beside each other."""

    modules: dict[str, Likeness]
    """Those that both have."""
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    cosine: float | None
    """Of both whole: over all modules, those of one alone adding to its norm."""
    norms: tuple[float, float]
    distance: float
    """‖ΔW − ΔW′‖ over all modules."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def inspect_adapter(
    stored: StoredAdapter, base: BaseWeights | None = None, *, progress: Progress = lambda done, total: None
) -> Inspection:
    """Every figure of a stored adapter. Raises ``UserError`` as ``modules_of`` does."""
    modules = modules_of(stored, None if base is None else base.model)
    found = []
    for i, module in enumerate(modules):
        found.append(_figures(module, base))
        progress(i + 1, len(modules))
    notes = _notes(stored, found, base)
    return Inspection(
        path=str(stored.path),
        modules=tuple(_with_outliers(found)),
        others={name: _describe(name, tensor) for name, tensor in stored.others.items()},
        use_dora=stored.config.use_dora,
        config=stored.config.to_dict(),
        provenance=dataclasses.asdict(stored.provenance),
        base=None if base is None else base.info.name,
        notes=tuple(notes),
    )


def compare_adapters(
    one: StoredAdapter, other: StoredAdapter, base: BaseWeights | None = None, *, progress: Progress = lambda d, t: None
) -> Comparison:
    """Cosines and overlaps of two adapters' ΔW's, whatever their ranks.

    Raises ``UserError`` as ``modules_of`` does, for modules of different shapes, for entries that are no numbers, and
    for adapters that have no module in common.
    """
    skeleton = None if base is None else base.model
    ones, others = ({m.name: m for m in modules_of(stored, skeleton)} for stored in (one, other))
    for stored, modules in ((one, ones), (other, others)):
        if bad := [name for name, m in modules.items() if not m.delta.is_finite]:
            raise UserError(f"{stored.path}: {bad[0]} has entries that are no numbers; there is nothing to compare")
    shared = [name for name in ones if name in others]
    if not shared:
        few = f"{next(iter(ones), 'none')} …, {next(iter(others), 'none')} …"
        raise UserError(f"{one.path} and {other.path} have no module in common ({few}); give adapters of one base")
    found: dict[str, Likeness] = {}
    product = 0.0
    for i, name in enumerate(shared):
        a, b = ones[name].delta, others[name].delta
        if (a.shape, a.num_experts) != (b.shape, b.num_experts):
            raise UserError(f"{name} is {a.shape} in {one.path}, {b.shape} in {other.path}; give adapters of one base")
        found[name] = likeness(a, b)
        product += found[name].product
        progress(i + 1, len(shared))
    norms = [math.hypot(*(m.delta.norm for m in modules.values())) for modules in (ones, others)]
    notes = [_about_dora(stored) for stored in (one, other) if stored.config.use_dora]
    notes += [_about_others(stored) for stored in (one, other) if stored.others]
    return Comparison(
        modules=found,
        only_one=tuple(name for name in ones if name not in others),
        only_other=tuple(name for name in others if name not in ones),
        cosine=max(-1.0, min(1.0, product / (norms[0] * norms[1]))) if all(norms) else None,
        norms=(norms[0], norms[1]),
        distance=math.sqrt(max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2 * product)),
        notes=tuple(notes),
    )


def _figures(module: AdaptedModule, base: BaseWeights | None) -> ModuleFigures:
    delta = module.delta
    tensors = [delta.a_ERK, delta.b_ENR] + ([] if module.magnitude_N is None else [module.magnitude_N])
    num_not_finite = sum(map(_num_not_finite, tensors))
    is_sound = num_not_finite == 0 and delta.is_finite
    own: BaseFigures | None = base.figures(module) if base is not None and is_sound else None
    relative = own.change_norm / own.base_norm if own is not None and own.base_norm else None
    return ModuleFigures(
        name=module.name,
        kind=module.kind,
        shape=delta.shape,
        num_experts=delta.num_experts,
        rank=delta.rank,
        scaling=delta.scaling,
        num_parameters=module.num_parameters,
        num_not_finite=num_not_finite,
        has_moved=delta.has_moved if is_sound else None,
        norm=delta.norm if is_sound else None,
        base_norm=None if own is None else own.base_norm,
        relative_norm=relative,
        column_scale=None if own is None else own.column_scale,
        singular_values=tuple(delta.spectrum.tolist()) if is_sound else (),
        effective_rank=delta.effective_rank if is_sound else None,
        rank_90=delta.rank_for(0.9) if is_sound else None,
        rank_99=delta.rank_for(0.99) if is_sound else None,
    )


def _with_outliers(found: Sequence[ModuleFigures]) -> list[ModuleFigures]:
    kinds: dict[str, list[ModuleFigures]] = {}
    is_relative = any(m.relative_norm for m in found)
    for m in found:
        if m.has_moved and (m.relative_norm if is_relative else m.norm):
            kinds.setdefault(m.name.rpartition(".")[2], []).append(m)
    far: set[str] = set()
    for alike in kinds.values():
        if len(alike) >= MIN_KIND:
            sizes = [math.log((m.relative_norm if is_relative else m.norm) or 1.0) for m in alike]
            far |= {m.name for m, is_far in zip(alike, outliers(sizes), strict=True) if is_far}
    return [dataclasses.replace(m, is_outlier=m.name in far) for m in found]


def outliers(logs: Sequence[float]) -> list[bool]:
    """Which of these logarithms are far from their median, by the rule above."""
    median = statistics.median(logs)
    mad = statistics.median(abs(x - median) for x in logs)
    limit = max(3.5 * 1.4826 * mad, math.log(2))
    return [abs(x - median) > limit for x in logs]


def _notes(stored: StoredAdapter, found: Sequence[ModuleFigures], base: BaseWeights | None) -> list[str]:
    notes = [_about_dora(stored)] if stored.config.use_dora else []
    if any(m.num_experts > 1 for m in found):
        notes.append("experts: one row a parameter; norms are of all experts together, singular values and ranks those "
                     "of cutting every expert to one rank (root mean square over the experts)")  # fmt: skip
    if stored.others:
        notes.append(_about_others(stored))
    lost = [] if base is None else [m.name for m in found if m.base_norm is None and not m.num_not_finite]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        notes.append(f"{lost[0]}{more}: no weight of that name and shape in plain numbers in the base's checkpoint")
    return notes


def _about_dora(stored: StoredAdapter) -> str:
    return (
        f"{label_of(stored.path)} is a DoRA adapter: ranks and singular values are of s·B·A, its change of direction; "
        "the column scale is no part of them"
    )


def _about_others(stored: StoredAdapter) -> str:
    count = f"{len(stored.others)} tensor{'s' if len(stored.others) > 1 else ''}"
    return (
        f"{label_of(stored.path)} also has {count} beside its low-rank ones (biases, rows, whole modules): "
        "in no figure here"
    )


def _describe(name: str, tensor: Tensor) -> dict[str, Any]:
    what = "trained rows" if name.endswith(ROWS) else "bias" if name.endswith(".bias") else "saved whole"
    return {"what": what, "shape": list(tensor.shape), "num_not_finite": _num_not_finite(tensor)}


def _num_not_finite(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0


def _parameters_at(module: ModuleFigures, rank: int | None) -> int:
    """Parameters of a module that is cut to this rank; its magnitude stays."""
    outputs, inputs = module.shape
    own = module.num_experts * module.rank * (outputs + inputs)
    cut = own if rank is None else module.num_experts * max(1, rank) * (outputs + inputs)
    return module.num_parameters - own + min(own, cut)
