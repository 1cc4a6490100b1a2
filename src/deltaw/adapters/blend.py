"""Make one adapter out of several: PEFT's ``add_weighted_adapter``, its methods and their names.

On whole deltas ΔWᵢ = sᵢ·Bᵢ·Aᵢ, the result cut to rank r by its singular values (Eckart-Young):
    svd                    Σ wᵢ·ΔWᵢ
    magnitude_prune_svd    Σ wᵢ·top(ΔWᵢ)               top keeps the ``density`` largest entries
    dare_linear_svd        Σ wᵢ·drop(ΔWᵢ)              drop keeps entries with probability d = density, over d
                                                       (DARE, Yu et al. 2024, arXiv:2311.03099, eq. 2 and 3)
    ties_svd               mean of wᵢ·top(ΔWᵢ) over the i whose sign is the elected one
                                                       (TIES, Yadav et al. 2023, arXiv:2306.01708, algorithm 1)
    dare_ties_svd          as ties_svd, with drop for top
On factors, which must have equal ranks:
    linear, magnitude_prune, dare_linear, ties, dare_ties     the same rules for the Aᵢ and, apart, for the Bᵢ,
                           weighted by ±√|wᵢsᵢ| and √|wᵢsᵢ|: their product has cross terms BᵢAⱼ that belong to no
                           adapter, so even ``linear`` is not the sum that its name promises
By laying factors side by side:
    cat                    Σ wᵢ·ΔWᵢ exactly, at the sum of the ranks

``cat`` is exact and the one to take; ``svd`` is the best of its rank. The sum of ``svd`` is never formed: with
[B₁ B₂ …] = Q·R and [w₁s₁A₁; …]ᵀ = P·T, the singular values of Q·(R·Tᵀ)·Pᵀ are those of the small R·Tᵀ.

Unlike PEFT: a single adapter gets the method that was asked for; ``use_rslora`` does not scale the result once more;
trained copies of ``modules_to_save`` come along.

Shapes: A [R, K], B [N, R]; all computed in float32 (float64 where a factor is).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError, short
from ..nn.inject import activate, inject
from ..nn.lowrank import LowRank
from ..nn.state import state_of
from ..nn.walk import AdaptedLayer, adapted_layers, saved_modules
from .spectrum import thin_svd

RULES = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")
METHODS = (*RULES, "cat", "svd", *(f"{rule}_svd" for rule in RULES[1:]))


class Part(NamedTuple):
    """One adapter in one layer, and what it counts for."""

    name: str
    """The adapter's."""
    a_RK: Tensor
    b_NR: Tensor
    scaling: float
    """s of ΔW = s·B·A."""
    weight: float
    """w: what it counts for in the blend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How parts become one; raises ``UserError`` for a setting that is missing, out of range or without effect."""

    method: str = "svd"
    """One of ``METHODS``."""
    svd_rank: int | None = None
    """Rank of the result, for methods on whole deltas; None: the largest of the adapters' ranks."""
    svd_clamp: float | None = None
    """Quantile, over 0.5 and up to 1, at which entries of the result's factors are clamped; None: not at all.
    Taken over the entries and their negatives: singular vectors have no sign of their own."""
    density: float | None = None
    """Fraction of entries that are kept, over 0 and up to 1; for all methods but linear, cat and svd."""
    majority_sign_method: str = "total"
    """How TIES elects a sign: by the ``total`` of the entries, or by their ``frequency``."""

    def __post_init__(self) -> None:
        def expect(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise UserError(f"blend: {name}={short(getattr(self, name))}: expected {wanted}")

        expect("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        clamp, density = self.svd_clamp, self.density
        if self.on_deltas:
            expect("svd_rank", self.svd_rank is None or self.svd_rank >= 1, "a rank from 1")
            expect("svd_clamp", clamp is None or 0.5 < clamp <= 1, "a quantile over 0.5 and up to 1")
        else:
            expect("svd_rank", self.svd_rank is None, f"nothing, since {self.method} has no use for it")
            expect("svd_clamp", clamp is None, f"nothing, since {self.method} has no use for it")
        if self.rule == "linear":
            expect("density", density is None, f"nothing, since {self.method} prunes nothing")
        else:
            expect("density", density is not None and 0 < density <= 1, "a fraction over 0 and up to 1")
        ways = ("total", "frequency") if self.elects else ("total",)
        expect("majority_sign_method", self.majority_sign_method in ways, f"{' or '.join(ways)} for {self.method}")

    @property
    def on_deltas(self) -> bool:
        return self.method.endswith("svd")

    @property
    def rule(self) -> str:
        return "linear" if self.method in ("svd", "cat") else self.method.removesuffix("_svd")

    @property
    def elects(self) -> bool:
        return self.rule.endswith("ties")


def blend(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    *,
    method: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add the adapter ``new_name`` to the model, blended of others; weights may be negative.

    The active adapters stay active (merged ones are unmerged), the new one is frozen until it is made to train. A
    module that one adapter has and another has not gets what there is. Its scaling is 1 everywhere; where layers come
    out with fewer ranks than others, they are filled up with zeros, so that one ``r`` is true of all.
    ``dare`` draws from torch's generator (``torch.manual_seed``).

    Raises ``UserError``, with the model as it was, for unknown names, settings that don't fit the method, ranks that
    differ where factors are mixed, and what can't be mixed: DoRA magnitudes, trained biases, single trained tokens,
    bare parameters, and a module that several adapters have trained whole.
    """
    recipe = Recipe(
        method=method,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        density=density,
        majority_sign_method=majority_sign_method,
    )
    check_weights(names, weights)
    _check_adapters(model, names)
    copies = _copies(model, names)
    before, configs = state_of(model).active.names, state_of(model).configs
    with torch.inference_mode(False), torch.no_grad():
        parts = {target: _parts(layer, names, weights) for target, layer in adapted_layers(model)}
        parts = {target: found for target, found in parts.items() if found}
        rank, factors = blend_modules(parts, recipe)
    first = configs[names[0]]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.lora_dropout,
        target_modules=list(factors),
        modules_to_save=list(copies) or None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )

    def make(layer: AdaptedLayer) -> LowRank:
        return LowRank(*factors[layer.name], scaling=1.0, dropout=float(first.lora_dropout))

    inject(model, config, new_name, make=make, chosen=list(factors), trainable=False)
    bound = state_of(model).bound  # what makes good the loss of one quantised base (LoftQ) does so as a part, too
    bound.update((new_name, bound[name]) for name in names if name in bound)
    for target, module in saved_modules(model):
        if target in copies:
            module.copies[new_name].load_state_dict(module.copies[copies[target]].state_dict())
    activate(model, before)


def blend_modules(
    parts: Mapping[str, list[Part]], recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """(rank, module → (A, B) of its blend with scaling 1), filled up with zeros so that all have that one rank.

    ``progress(done, total)`` is called after each module. Raises ``UserError`` for ranks that differ where factors are
    mixed.
    """
    _check_ranks(recipe, parts)
    bound = recipe.svd_rank or max(part.a_RK.shape[0] for found in parts.values() for part in found)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for done, (target, found) in enumerate(parts.items(), 1):
        factors[target] = blend_parts(found, recipe, bound)
        if progress is not None:
            progress(done, len(parts))
    rank = max(a_RK.shape[0] for a_RK, _ in factors.values())
    for target, (a_RK, b_NR) in factors.items():
        fill = rank - a_RK.shape[0]
        factors[target] = nn.functional.pad(a_RK, (0, 0, 0, fill)), nn.functional.pad(b_NR, (0, fill))
    return rank, factors


def blend_parts(parts: Sequence[Part], recipe: Recipe, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of one layer's blend, with scaling 1; ``rank`` bounds it where singular values are cut."""
    counts = [p.weight * p.scaling for p in parts]
    if recipe.method in ("cat", "svd"):
        a_RK, b_NR = torch.cat([c * p.a_RK for c, p in zip(counts, parts, strict=True)]), _side_by_side(parts)
        return (a_RK, b_NR) if recipe.method == "cat" else _clamped(*svd_of_product(a_RK, b_NR, rank), recipe)
    if recipe.on_deltas:
        delta_NK = combine([p.scaling * (p.b_NR @ p.a_RK) for p in parts], [p.weight for p in parts], recipe)
        u_NR, s_R, v_RK = torch.linalg.svd(delta_NK, full_matrices=False)
        return _clamped(v_RK[:rank], u_NR[:, :rank] * s_R[:rank], recipe)
    roots = [math.sqrt(abs(count)) for count in counts]
    signed = [math.copysign(root, count) for root, count in zip(roots, counts, strict=True)]
    a_RK = combine([p.a_RK for p in parts], signed, recipe)  # all A's first: DARE's draws are then in PEFT's order
    return a_RK, combine([p.b_NR for p in parts], roots, recipe)


def combine(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """One tensor by the recipe's rule, from tensors of one shape. TIES elects before anything is weighted."""
    kept = [_prune(tensor, recipe) for tensor in tensors]
    if not recipe.elects:
        return torch.stack([w * t for w, t in zip(weights, kept, strict=True)]).sum(0)
    votes = torch.stack(kept if recipe.majority_sign_method == "total" else [t.sign() for t in kept]).sum(0)
    elected = (votes >= 0).to(votes.dtype) * 2 - 1
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, tensor in zip(weights, kept, strict=True):
        agrees = tensor.sign() == elected
        total += weight * tensor * agrees
        count += agrees
    return total / count.clamp_(min=1)


def svd_of_product(a_RK: Tensor, b_NR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (A, B) of this rank for B·A: A's rows orthonormal, the singular values in B. B·A is never formed."""
    u_NM, s_M, v_KM = thin_svd(a_RK, b_NR)
    return v_KM[:, :rank].T.contiguous(), u_NM[:, :rank] * s_M[:rank]


def _prune(tensor: Tensor, recipe: Recipe) -> Tensor:
    density = recipe.density
    if density is None or density == 1:
        return tensor
    if recipe.rule.startswith("dare"):
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    flat = tensor.flatten()
    top = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, top, flat[top]).view_as(tensor)


def _clamped(a_RK: Tensor, b_NR: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Factors without the entries of extraordinary size that ``svd_clamp`` says."""
    if recipe.svd_clamp is None:
        return a_RK, b_NR
    sizes = torch.cat([a_RK.flatten(), b_NR.flatten()]).abs().sort().values
    # The q quantile of entries and their negatives is the (2q − 1) quantile of their sizes.
    place = (2 * recipe.svd_clamp - 1) * (len(sizes) - 1)
    limit = float(torch.lerp(sizes[math.floor(place)], sizes[math.ceil(place)], place % 1))
    return a_RK.clamp(-limit, limit), b_NR.clamp(-limit, limit)


def _side_by_side(parts: Sequence[Part]) -> Tensor:
    return torch.cat([p.b_NR for p in parts], dim=1)


def _parts(layer: AdaptedLayer, names: Sequence[str], weights: Sequence[float]) -> list[Part]:
    found = [(layer.adapter(name), name, weight) for name, weight in zip(names, weights, strict=True)
             if name in layer.adapters]  # fmt: skip
    dtype = reduce(torch.promote_types, (adapter.lora_A.dtype for adapter, *_ in found), torch.float32)
    out = []
    for adapter, name, weight in found:
        a_RK, b_NR = adapter.joined()  # a start that isn't zero is part of ΔW, at twice the rank
        out.append(Part(name, a_RK.to(dtype), b_NR.to(dtype), adapter.scaling, float(weight)))
    return out


def check_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    if not names or len(weights) != len(names):
        raise UserError(f"blend: {len(names)} adapters and {len(weights)} weights; give one weight for each adapter")
    bad = [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    if bad:
        raise UserError(f"blend: weight {short(bad[0])}: expected a finite number")


def _check_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Adapters that the model has, and that are nothing but low-rank factors (and modules saved whole)."""
    state = state_of(model)
    for name in names:
        if name not in state.configs:
            raise UserError(f"blend: no adapter {name!r} in this model (it has {', '.join(state.configs) or 'none'})")
        config = state.configs[name]
        kinds = {
            "a DoRA magnitude": config.use_dora,
            "trained biases": name in state.biases,
            "single trained tokens": config.trainable_token_indices,
            "adapted bare parameters": config.target_parameters,
        }
        if what := next((kind for kind, has in kinds.items() if has), None):
            raise UserError(f"blend: adapter {name!r} has {what}, which can't be blended; leave it out")


def _check_ranks(recipe: Recipe, parts: Mapping[str, list[Part]]) -> None:
    if recipe.on_deltas or recipe.method == "cat":
        return
    for target, found in parts.items():
        ranks = {p.name: p.a_RK.shape[0] for p in found}
        if len({*ranks.values()}) > 1:
            given = ", ".join(f"{name} has rank {rank}" for name, rank in ranks.items())
            raise UserError(
                f"blend: {recipe.method} mixes factors, which needs equal ranks; at {target} {given}; use cat or svd"
            )


def _copies(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Module that was trained whole → the one adapter that did; ``UserError`` where several did."""
    out: dict[str, str] = {}
    for target, module in saved_modules(model):
        owners = [name for name in dict.fromkeys(names) if name in module.copies]
        if len(owners) > 1:
            raise UserError(
                f"blend: {' and '.join(owners)} have both trained {target} whole (modules_to_save), and whole modules "
                "can't be blended; leave all but one out"
            )
        if owners:
            out[target] = owners[0]
    return out
