"""A stored adapter with smaller ranks: B·A cut to its largest singular values, from the factors alone.

    s·B·A = U·diag(σ)·Vᵀ   →   s·B′·A′ = U_k·diag(σ_1 … σ_k)·V_kᵀ

the best approximation of rank k (Eckart & Young 1936); ‖ΔW − ΔW′‖² = Σ_{i>k} σᵢ². Every scaling stays what it is:
alpha changes with the rank. A module that keeps its rank keeps its factors bit for bit, so full rank is the identity
in any dtype; one that never moved keeps its first k rows of A, to be trained on.

DoRA: W′ = m∘(W + s·B·A)/‖W + s·B·A‖ has rows of length m whatever B·A is, so m is kept: only directions are
approximated, and the norm is that of the new ones, computed when the adapter is loaded. Energies are of s·B·A.

Experts of one parameter are cut to one rank, since the file has one rank for them; so are the adapters of single
experts from before these were fused. What isn't low-rank (biases, trained rows, modules saved whole) stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError, short
from .deltas import AdaptedModule, modules_of, scaled_alpha
from .peft_format import StoredAdapter

_SINGLE_EXPERT = re.compile(r".+\.experts\.\d+\.(?P<layer>w[123]|(?:gate|up|down)_proj)")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which rank a module is to have; never more than it has. Raises ``UserError`` for what is no such wish."""

    rank: int | None = None
    """For every module."""
    energy: float | None = None
    """Share of ‖ΔW‖² that every module keeps, over 0 and up to 1; its rank is the least that does."""
    pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Before the other two: names' ends or expressions, as in PEFT's ``rank_pattern`` → rank."""

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None) and not (self.pattern and self.rank is None):
            raise UserError("compress: give either a rank or an energy (or a rank pattern alone)")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"compress: rank {self.rank}: expected 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"compress: energy {self.energy}: expected a share over 0 and up to 1, such as 0.99")


@dataclass(frozen=True, kw_only=True)
class CutModule:
    """What was done to one module."""

    name: str
    kind: str
    rank_before: int
    rank: int
    energy: float
    """Share of ‖ΔW‖² that is left."""
    norm: float
    """‖ΔW‖ before."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The new adapter, not yet on disk, and what it cost."""

    adapter: StoredAdapter
    modules: tuple[CutModule, ...]
    parameters_before: int
    parameters: int
    """Of the low-rank modules."""

    @property
    def energy(self) -> float:
        """Share of the whole adapter's ‖ΔW‖² that is left."""
        total = math.fsum(m.norm**2 for m in self.modules)
        return math.fsum(m.energy * m.norm**2 for m in self.modules) / total if total else 1.0


def compress(
    stored: StoredAdapter,
    ranks: Ranks,
    *,
    skeleton: nn.Module | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Cut every module of an adapter to its rank; factors keep their dtype.

    ``skeleton`` is the base's architecture, which alone knows the names of bare parameters. Raises ``UserError`` as
    ``modules_of`` does, for entries that are no numbers, and for patterns that name no module.
    """
    modules = modules_of(stored, skeleton)
    if bad := [m.name for m in modules if not m.delta.is_finite]:
        raise UserError(f"{stored.path}: {bad[0]} has entries that are no numbers; retrain, or restore a sound copy")
    if unnamed := [m.name for m in modules if m.kind == "parameter" and m.name == m.path]:
        raise UserError(
            f"{stored.path}: {unnamed[0]}: which of its bare parameters is adapted stands in the base alone; give the "
            "base that it was trained on"
        )
    wanted = _wanted_ranks(stored, modules, ranks, progress)
    factors = {m.path: {**stored.factors[m.path], **_cut(stored, m, wanted[m.name])} for m in modules}
    after = {m.name: (wanted[m.name], m.delta.scaling) for m in modules}
    done = [
        CutModule(
            name=m.name,
            kind=m.kind,
            rank_before=m.delta.rank,
            rank=wanted[m.name],
            energy=m.delta.energy_at(wanted[m.name]),
            norm=m.delta.norm,
        )
        for m in modules
    ]
    adapter = dataclasses.replace(
        stored, config=config_for(stored.config, after), factors=factors, provenance=stored.provenance
    )
    return Compressed(
        adapter=adapter,
        modules=tuple(done),
        parameters_before=sum(m.num_parameters for m in modules),
        parameters=sum(t.numel() for parts in factors.values() for t in parts.values()),
    )


def config_for(config: LoraConfig, wanted: Mapping[str, tuple[int, float]]) -> LoraConfig:
    """The config by which each of these modules has its (rank, scaling): the most common as r and α, others by name."""
    rank, scaling = Counter(wanted.values()).most_common(1)[0][0]
    plain: dict[str, Any] = dict(
        r=rank,
        lora_alpha=scaled_alpha(scaling, rank, use_rslora=config.use_rslora),
        rank_pattern={},
        alpha_pattern={},
        # The start of what has been trained says nothing any more, and PEFT would change the base for some.
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
    )
    common = dataclasses.replace(config, **plain)
    others = {name: pair for name, pair in wanted.items() if pair != (rank, scaling)}
    # A name also means those that end with it: where that hits another one, all are named, the longest first.
    for named in (others, dict(sorted(wanted.items(), key=lambda item: -len(item[0])))):
        patterns: dict[str, Any] = dict(
            rank_pattern={name: r for name, (r, _) in named.items()},
            alpha_pattern={name: scaled_alpha(s, r, use_rslora=config.use_rslora) for name, (r, s) in named.items()},
        )
        out = dataclasses.replace(common, **patterns)
        if all(
            out.rank_of(n) == r and math.isclose(out.scaling_of(n), s, rel_tol=1e-12) for n, (r, s) in wanted.items()
        ):
            break
    return out


def _wanted_ranks(
    stored: StoredAdapter, modules: Sequence[AdaptedModule], ranks: Ranks, progress: Callable[[int, int], None]
) -> dict[str, int]:
    asked = LoraConfig(rank_pattern=dict(ranks.pattern))  # checks the patterns, and matches them as PEFT does
    used: set[str] = set()
    out: dict[str, int] = {}
    for i, m in enumerate(modules):
        key = asked.pattern_key(asked.rank_pattern, m.name)
        if key is not None:
            used.add(key)
            rank = asked.rank_pattern[key]
        elif ranks.energy is not None:
            rank = max(1, m.delta.rank_for(ranks.energy))
        else:
            rank = m.delta.rank if ranks.rank is None else ranks.rank
        out[m.name] = min(rank, m.delta.rank)
        progress(i + 1, len(modules))
    if unused := [key for key in ranks.pattern if key not in used]:
        ends = sorted({m.name.rpartition(".")[2] for m in modules})
        raise UserError(
            f"compress: rank pattern {short(unused[0])} names no module of {stored.path} ({', '.join(ends)})"
        )
    together: dict[str, int] = {}
    for name, rank in out.items():
        if (expert := _expert_kind(name)) is not None:
            together[expert] = max(rank, together.get(expert, 1))
    return {name: together.get(_expert_kind(name) or "", rank) for name, rank in out.items()}


def _expert_kind(name: str) -> str | None:
    """Single experts that fusing will need at one rank: gate and up of all layers, down of all layers."""
    match = _SINGLE_EXPERT.fullmatch(name)
    return None if match is None else "down" if match["layer"] in ("w2", "down_proj") else "gate_up"


def _cut(stored: StoredAdapter, module: AdaptedModule, rank: int) -> dict[str, Tensor]:
    """A and B under their names, laid out and in the dtype that they came in."""
    parts, delta = stored.factors[module.path], module.delta
    a, b = parts["lora_A"], parts["lora_B"]
    if rank >= delta.rank:
        return {"lora_A": a, "lora_B": b}
    if delta.has_moved:
        a_EkK, b_ENk = delta.cut(rank)
    else:
        a_EkK, b_ENk = delta.a_ERK[:, :rank], torch.zeros_like(delta.b_ENR[..., :rank])
    return {
        "lora_A": a_EkK.flatten(0, 1).to(a.dtype),
        "lora_B": b_ENk.permute(1, 2, 0).flatten(1).to(b.dtype),
    }
