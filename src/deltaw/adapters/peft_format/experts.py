"""Adapters made before experts were fused: a pair (A, B) for each linear layer of each expert.

``transformers`` 5 keeps the experts of a layer in two parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I], and
the router in a third, where versions before it had modules that adapters name:

    {experts}.{e}.{gate_proj or w1, up_proj or w3}   A [r, H], B [I, r]   →   A [E·2r, H], B [2I, 2r·E]
    {experts}.{e}.{down_proj or w2}                  A [r, I], B [H, r]   →   A [E·r, I], B [H, r·E]
    {router}                                                              →   the same, of its ``weight``

Gate and up have an A each, so fused they have both, and a block-diagonal B: rank 2r, with the alpha that keeps s.
Mixtral's block was called ``block_sparse_moe`` and is called ``mlp``. Saved, such an adapter has the new form.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LoraConfig
from ...errors import UserError
from ...nn.storage import is_linear
from .read import StoredAdapter

_EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d{1,5})\.(?P<layer>w[123]|(?:gate|up|down)_proj)")
_LAYERS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Parameter of a module of experts → the layers that are in it, in their order."""

_Pairs = dict[tuple[str, int], str]
"""(layer, expert) → name in the file."""


def fused(stored: StoredAdapter, modules: Mapping[str, nn.Module], *, trainable: bool) -> StoredAdapter:
    """The adapter with its experts in the model's form; itself where it has none, or the model has such modules.

    Dropout is no part of adapters on bare parameters: one that will not train is loaded without it. Raises
    ``UserError`` where experts are missing, or differ in what one parameter has but once (rank, scaling).
    """
    if not any(_EXPERT.fullmatch(name) and name not in modules for name in stored.factors):
        return stored
    factors: dict[str, dict[str, Tensor]] = {}
    owners: dict[str, _Pairs] = {}
    targets = [*(stored.config.target_parameters or ())]
    for name in stored.factors:
        now = name if name in modules else name.replace(".block_sparse_moe.", ".mlp.")
        match = _EXPERT.fullmatch(now)
        if match is not None and _is_fused(modules.get(match["owner"])):
            owners.setdefault(match["owner"], {})[_LAYERS[match["layer"]], int(match["expert"])] = name
            continue
        factors[now] = stored.factors[name]
        if now.endswith(".gate") and now in modules and not is_linear(modules[now]):
            targets.append(f"{now}.weight")
    patterns: dict[str, tuple[int, float]] = {}
    for owner, pairs in owners.items():
        parts = {p: _fuse(stored, owner, pairs, p, layers) for p, layers in _FUSED.items() if _has(pairs, layers)}
        for depth, (parameter, (tensors, rank, scaling)) in enumerate(reversed(parts.items())):
            factors[owner + depth * ".base_layer"] = tensors  # as PEFT nests them: the last parameter outermost
            targets.append(f"{owner}.{parameter}")
            if patterns.setdefault(f"experts.{parameter}", (rank, scaling)) != (rank, scaling):
                raise UserError(f"{stored.path}: {owner}.{parameter} has another rank or scaling than other layers'")
    return dataclasses.replace(stored, factors=factors, config=_config(stored.config, targets, patterns, trainable))


def _config(
    config: LoraConfig, targets: list[str], patterns: dict[str, tuple[int, float]], trainable: bool
) -> LoraConfig:
    ranks = {key: rank for key, (rank, _) in patterns.items()}
    alphas = {key: s * (math.sqrt(rank) if config.use_rslora else rank) for key, (rank, s) in patterns.items()}
    given: dict[str, Any] = dict(
        target_parameters=targets, rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern
    )
    if isinstance(config.target_modules, set):  # what named routers would name modules that can't be adapted
        given["target_modules"] = {n for n in config.target_modules if n.rpartition(".")[2] != "gate"}
    if not trainable:
        given["lora_dropout"] = 0.0
    return dataclasses.replace(config, **given)


def _is_fused(module: nn.Module | None) -> bool:
    base = getattr(module, "base_layer", module)
    return all(isinstance(getattr(base, p, None), Tensor) and getattr(base, p).dim() == 3 for p in _FUSED)


def _has(pairs: _Pairs, layers: tuple[str, ...]) -> bool:
    return any(layer in layers for layer, _ in pairs)


def _fuse(
    stored: StoredAdapter, owner: str, pairs: _Pairs, parameter: str, layers: tuple[str, ...]
) -> tuple[dict[str, Tensor], int, float]:
    """({A, B}, rank, scaling) of one parameter."""
    num_experts = max(expert for _, expert in pairs) + 1
    wanted = [[(layer, e) for layer in layers] for e in range(num_experts)] if num_experts <= len(pairs) else []
    names = [pairs.get(pair, "") for expert in wanted for pair in expert]
    if not names or "" in names:
        raise UserError(f"{stored.path}: {owner}: not every expert's {' and '.join(layers)} has an adapter")
    parts = [stored.factors[name] for name in names]
    if any(part.keys() != {"lora_A", "lora_B"} for part in parts):
        raise UserError(f"{stored.path}: {owner}: experts need lora_A and lora_B each, and nothing else")
    a_s, b_s = ([part[key] for part in parts] for key in ("lora_A", "lora_B"))
    shapes = {(tuple(t.shape), t.dtype) for t in a_s}, {(tuple(t.shape), t.dtype) for t in b_s}
    scalings = {stored.config.scaling_of(name) for name in names}
    rank = stored.config.rank_of(names[0])
    if any(len(s) > 1 for s in shapes) or len(scalings) > 1 or a_s[0].shape[:1] != (rank,) or a_s[0].dim() != 2:
        raise UserError(f"{stored.path}: {owner}.{parameter}: its experts differ in shape, dtype, rank or scaling")
    if b_s[0].dim() != 2 or b_s[0].shape[1] != rank:
        raise UserError(f"{stored.path}: {owner}.{parameter}: lora_B is {tuple(b_s[0].shape)}, needed is (…, {rank})")
    step = len(layers)
    a_EsK = torch.stack([torch.cat(a_s[i : i + step]) for i in range(0, len(a_s), step)])
    b_ENs = torch.stack([torch.block_diag(*b_s[i : i + step]) for i in range(0, len(b_s), step)])
    tensors = {"lora_A": a_EsK.flatten(0, 1), "lora_B": b_ENs.permute(1, 2, 0).flatten(1).contiguous()}
    return tensors, rank * step, scalings.pop()
