"""Blend adapters as they lie on disk, without any model: files in, one stored adapter out.

The arithmetic is ``blend.py``'s. What is added here is what a model would have seen to: that all are of one base and
fit each other, and that each is nothing but low-rank factors (and modules saved whole, by one of them at most).

How far a blend is from the exact sum is told from factors alone, in float64, and without a d×d matrix: the difference
B·A − Σ wᵢsᵢBᵢAᵢ is itself low-rank, [B, −w₁s₁B₁ …]·[A; A₁; …], and with thin QRs of both, Q·L and P·T, its norm is
‖L·Tᵀ‖.

Shapes: A [R, K], B [N, R].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..config import LoraConfig, as_names
from ..errors import UserError
from .blend import Part, Recipe, blend_modules, check_weights
from .deltas import modules_of
from .peft_format import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class Blended:
    """One adapter out of several."""

    adapter: StoredAdapter
    """Not on disk yet; its path and number of bytes are the first part's."""
    distance: float
    """‖ΔW − Σ wᵢΔWᵢ‖ / ‖Σ wᵢΔWᵢ‖ over all modules."""
    worst: tuple[str, float]
    """The module where that is largest, and how large."""


def blend_stored(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    recipe: Recipe,
    *,
    allow_other_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Blended:
    """Blend by the recipe; DARE draws from torch's generator, in the order of the files. Weights may be negative.

    Scaling is 1 everywhere, and one rank holds for all modules. Raises ``UserError`` for adapters of different bases
    (unless ``allow_other_base``) or shapes, for ranks that differ where factors are mixed, and for what can't be mixed:
    DoRA magnitudes, trained biases, single trained tokens, bare parameters, modules that several have trained whole.
    """
    check_weights([str(stored.path) for stored in adapters], weights)
    if not allow_other_base:
        _check_one_base(adapters)
    owners = _whole_modules(adapters)
    parts: dict[str, list[Part]] = {}
    for stored, weight in zip(adapters, weights, strict=True):
        for module in modules_of(stored):
            _check_plain(stored, module.kind, module.magnitude_N)
            delta = module.delta
            part = Part(str(stored.path), delta.a_ERK[0], delta.b_ENR[0], delta.scaling, float(weight))
            parts.setdefault(module.name, []).append(part)
    if not parts:
        raise UserError(f"blend: {adapters[0].path}: no low-rank factors in it; there is nothing to blend")
    for module_name, found in parts.items():
        _check_shapes(module_name, found)
        parts[module_name] = _one_dtype(found)
    with torch.no_grad():
        rank, factors = blend_modules(parts, recipe, progress)
        distance, worst = _distance(parts, factors)
    keys = reduce(lambda known, stored: {**stored.keys, **known}, adapters, dict[str, str]())
    result = dataclasses.replace(
        adapters[0],
        config=_config(adapters, rank, list(factors)),
        factors={name: {"lora_A": a_RK, "lora_B": b_NR} for name, (a_RK, b_NR) in factors.items()},
        others={name: tensor for owner in owners for name, tensor in owner.others.items()},
        provenance=dataclasses.replace(adapters[0].provenance, data_sha256=None),
        keys=keys,
    )
    return Blended(adapter=result, distance=distance, worst=worst)


def _config(adapters: Sequence[StoredAdapter], rank: int, targets: list[str]) -> LoraConfig:
    first = adapters[0].config
    saved = sorted({name for stored in adapters for name in as_names(stored.config.modules_to_save)})
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=first.fan_in_fan_out,
        modules_to_save=saved or None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        peft_version=first.peft_version,
        inference_mode=True,
    )


def _check_one_base(adapters: Sequence[StoredAdapter]) -> None:
    """``UserError`` where two adapters record different weights, or make good different quantisations' losses."""
    for what in ("base_sha256", "quantized_sha256"):
        known = {getattr(stored.provenance, what): stored for stored in adapters if getattr(stored.provenance, what)}
        if len(known) > 1:
            (one, first), (other, second) = list(known.items())[:2]
            raise UserError(
                f"blend: {first.path} is for {_base(first)} (sha256 {one[:12]}…) and {second.path} for {_base(second)} "
                f"({other[:12]}…); blend adapters of one base, or allow other bases (allow_other_base)"
            )


def _base(stored: StoredAdapter) -> str:
    return str(stored.provenance.base_name or stored.config.base_model_name_or_path)


def _check_plain(stored: StoredAdapter, kind: str, magnitude_N: Tensor | None) -> None:
    config = stored.config
    whole = as_names(config.modules_to_save)
    beside = [name for name in stored.others if not _is_within(name, whole)]
    kinds = {
        "a DoRA magnitude": config.use_dora or magnitude_N is not None,
        "adapted bare parameters": kind == "parameter",
        "single trained tokens": bool(config.trainable_token_indices),
        "trained biases": any(name.endswith(".bias") for name in beside),
    }
    if what := next((name for name, has in kinds.items() if has), None):
        raise UserError(f"blend: {stored.path} has {what}, which can't be blended; leave it out")
    if beside:
        raise UserError(
            f"blend: {stored.path} brings the whole of {beside[0]}, which can't be blended; where that is only a copy "
            "of the base's, save it again without (PEFT's save_embedding_layers=False)"
        )


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of these modules, named whole or by their last parts."""
    return any(f".{module}." in f".{name}" for module in modules)


def _whole_modules(adapters: Sequence[StoredAdapter]) -> list[StoredAdapter]:
    """Adapters with modules that were trained whole; ``UserError`` where two have the same tensor."""
    owners: dict[str, StoredAdapter] = {}
    for stored in adapters:
        for name in stored.others:
            if owners.setdefault(name, stored) is not stored:
                raise UserError(
                    f"blend: {owners[name].path} and {stored.path} have both trained {name} whole (modules_to_save), "
                    "and whole modules can't be blended; leave all but one out"
                )
    return list({id(stored): stored for stored in owners.values()}.values())


def _check_shapes(module: str, parts: Sequence[Part]) -> None:
    shapes = {(part.b_NR.shape[0], part.a_RK.shape[1]): part.name for part in parts}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise UserError(
            f"blend: {module} is {one[0]}×{one[1]} in {first} and {other[0]}×{other[1]} in {second}; "
            "these adapters are of different bases"
        )


def _one_dtype(parts: Sequence[Part]) -> list[Part]:
    dtype = reduce(torch.promote_types, (part.a_RK.dtype for part in parts), torch.float32)
    return [part._replace(a_RK=part.a_RK.to(dtype), b_NR=part.b_NR.to(dtype)) for part in parts]


def _distance(
    parts: Mapping[str, Sequence[Part]], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[float, tuple[str, float]]:
    """(relative distance from the exact sum over all modules, (the worst module, its own))."""
    off, whole, worst = 0.0, 0.0, ("", -1.0)
    for name, found in parts.items():
        a_RK, b_NR = factors[name]
        own_off = norm_of_sum([*((p.weight * p.scaling, p.a_RK, p.b_NR) for p in found), (-1.0, a_RK, b_NR)])
        own = norm_of_sum([(p.weight * p.scaling, p.a_RK, p.b_NR) for p in found])
        off, whole = off + own_off**2, whole + own**2
        worst = max(worst, (name, _ratio(own_off, own)), key=lambda pair: pair[1])
    return _ratio(math.sqrt(off), math.sqrt(whole)), worst


def norm_of_sum(terms: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    """‖Σ cᵢ·Bᵢ·Aᵢ‖ (Frobenius) of terms (c, A [R, K], B [N, R]), in float64; no [N, K] matrix is formed."""
    b_NM = torch.cat([count * b_NR.double() for count, _, b_NR in terms], dim=1)
    a_MK = torch.cat([a_RK.double() for _, a_RK, _ in terms])
    left, right = torch.linalg.qr(b_NM, mode="r").R, torch.linalg.qr(a_MK.T, mode="r").R
    return float(torch.linalg.matrix_norm(left @ right.T))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if not part else math.inf
