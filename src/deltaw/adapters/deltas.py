"""A stored adapter as the ΔW's that it makes, module by module, without any weights of a base.

A linear layer's and an embedding's factors are read as they lie: A [R, K], B [N, R] (an embedding's ΔW is [hidden,
vocabulary], the transpose of its weight's). Factors of a bare parameter (``target_parameters``) with E experts lie as
A [E·R, K] and B [N, R·E], the expert running fastest; the config's rank tells E. Which of a module's several
parameters a pair belongs to is known to the model alone: with its skeleton they have their names, without it the path
that they have in the file.

A factor pair whose start was taken off the base (PEFT's unconverted PiSSA, OLoRA, LoftQ) is no ΔW of the published
base, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError
from ..nn.parameters import parameter_targets
from ..nn.walk import logical_modules
from ..patterns import tails_of
from .peft_format import TAKEN_OFF, StoredAdapter
from .peft_format.keys import parameter_paths
from .spectrum import Delta


@dataclass(frozen=True, eq=False)
class AdaptedModule:
    """One pair of factors of a stored adapter."""

    name: str
    """Of the module, or of the bare parameter, in the model without adapters."""
    path: str
    """Where its factors stand in ``StoredAdapter.factors``."""
    kind: str
    """``linear``, ``embedding`` or ``parameter``."""
    delta: Delta
    magnitude_N: Tensor | None
    """DoRA's, where it has one."""

    @property
    def num_parameters(self) -> int:
        magnitude = 0 if self.magnitude_N is None else self.magnitude_N.numel()
        return self.delta.a_ERK.numel() + self.delta.b_ENR.numel() + magnitude


def modules_of(stored: StoredAdapter, skeleton: nn.Module | None = None) -> list[AdaptedModule]:
    """Every pair of factors, in the file's order; ``skeleton`` is the base's architecture, weights or none.

    Raises ``UserError`` for factors that are not whole, or not of the rank that the config says, and for those that go
    with a changed base.
    """
    check_own_base(stored)
    names, targets = _parameter_names(stored.config, skeleton), _targets_by_module(stored.config)
    return [_module(stored, path, names, targets) for path in stored.factors]


def check_own_base(stored: StoredAdapter) -> None:
    """``UserError`` where the factors belong to a base that a start was taken off."""
    start = stored.config.init_lora_weights
    if isinstance(start, str) and start.startswith(TAKEN_OFF):
        raise UserError(
            f"{stored.path}: init_lora_weights={start!r}: its factors go with a base that their start was taken off, "
            "and are no ΔW of the published one; load it and save it again with deltaw (PiSSA, OLoRA), or save it from "
            "PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _module(
    stored: StoredAdapter, path: str, names: Mapping[str, str], targets: Mapping[str, Sequence[str]]
) -> AdaptedModule:
    parts = stored.factors[path]
    if missing := {"lora_A", "lora_B"} - parts.keys():
        raise UserError(f"{stored.path}: {path}: {', '.join(sorted(missing))} missing; get a complete copy")
    a, b, config = parts["lora_A"], parts["lora_B"], stored.config
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
        raise UserError(f"{stored.path}: {path}: {shapes}; expected (r, inputs) and (outputs, r); get a sound copy")
    magnitude = parts.get("lora_magnitude_vector")
    name = names.get(path)
    if name is None and a.shape[0] == config.rank_of(path):
        kind = "embedding" if stored.is_embedding(path) else "linear"
        return AdaptedModule(path, path, kind, Delta(a[None], b[None], config.scaling_of(path)), magnitude)
    rank, scaling = _of_parameter(stored, path, [name] if name else _candidates(path, targets))
    experts = a.shape[0] // rank
    if experts * rank != a.shape[0]:
        raise UserError(f"{stored.path}: {path}: rank {a.shape[0]}, but its config says {rank}; get a sound copy")
    a_ERK = a.view(experts, rank, a.shape[1])
    b_ENR = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
    return AdaptedModule(name or path, path, "parameter", Delta(a_ERK, b_ENR, scaling), magnitude)


def _of_parameter(stored: StoredAdapter, path: str, candidates: Sequence[str]) -> tuple[int, float]:
    """(rank, scaling) of a bare parameter's factors, by all names that it may have."""
    config = stored.config
    found = {(config.rank_of(name), config.scaling_of(name)) for name in candidates}
    if not found:
        rank = stored.factors[path]["lora_A"].shape[0]
        raise UserError(
            f"{stored.path}: {path}: rank {rank}, but its config says {config.rank_of(path)}; get a sound copy"
        )
    if len(found) > 1:
        raise UserError(
            f"{stored.path}: {path}: its target_parameters have different ranks or scalings, and which of them this is "
            "stands in the base alone; give the base"
        )
    return found.pop()


def _targets_by_module(config: LoraConfig) -> dict[str, list[str]]:
    """End of a module's name → the parameters that ``target_parameters`` names with it."""
    out: dict[str, list[str]] = {}
    for target in config.target_parameters or ():
        module, _, parameter = target.rpartition(".")
        out.setdefault(module, []).append(parameter)
    return out


def _candidates(path: str, targets: Mapping[str, Sequence[str]]) -> list[str]:
    owner = path
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return [f"{owner}.{parameter}" for end in ("", *tails_of(owner)) for parameter in targets.get(end, ())]


def _parameter_names(config: LoraConfig, skeleton: nn.Module | None) -> dict[str, str]:
    """path in the file → name of the bare parameter, as the model orders them."""
    if skeleton is None or not config.target_parameters:
        return {}
    bases = {name: module for name, module in logical_modules(skeleton) if name}
    return {
        path: f"{module}.{parameter}"
        for module, parameters in parameter_targets(config, bases).items()
        for parameter, path in parameter_paths(module, parameters).items()
    }


def scaled_alpha(scaling: float, rank: int, *, use_rslora: bool) -> float:
    """α that means this scaling at this rank, as a whole number where it is one."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha
