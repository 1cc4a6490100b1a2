"""A mixture-of-experts layer with adapters on its fused weights, and no W + ΔW formed.

For each token t and each expert e that its router chose, with weight w_te:

    u = W_e·x_t + b_e + s·B_e·A_e·x_t        h = gate(u)        o_te = V_e·h + c_e + s·B'_e·A'_e·h

    y_t = Σ_e w_te·o_te

Tokens are sorted by expert and, within an expert, by adapter, so that each expert is the project's one product
(``ops/adapted.py``) with a segment for each adapter: no gradient of W or V is formed, and a batch may mix adapters.

What an experts layer must say of itself (``has_gate``, ``is_transposed`` …) is transformers' interface for ways of
running experts (``integrations/moe.py``); a layer without it takes the plain way of ``nn/parameters.py``, of which
this is the fast twin. Left out: experts shared out over machines.

Shapes: T tokens, J experts of each token, S = T·J pairs in order of expert, E experts, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.adapted import Segment, adapted
from ..ops.frozen import DenseWeight

_SAYS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
_WEIGHTS = {"gate_up_proj", "up_proj", "down_proj"}

Factors = tuple[Sequence[Tensor], Sequence[Tensor], float]
"""(A_e [R, K] for each expert, B_e [N, R] for each expert, s) of one weight."""


def can_route(experts: nn.Module, parameters: Collection[str]) -> bool:
    """Whether this is an experts layer by transformers' interface, and these of its parameters its large weights."""
    says_all = all(hasattr(experts, name) for name in _SAYS)
    return says_all and not getattr(experts, "_is_expert_parallel", False) and set(parameters) <= _WEIGHTS


def routed(
    experts: nn.Module,
    x_TK: Tensor,
    chosen_TJ: Tensor,
    weight_TJ: Tensor,
    parts: Sequence[tuple[slice, str]],
    factors: Mapping[str, Mapping[str, Factors]],
) -> Tensor:
    """y [T, K] in x's dtype. ``parts`` are (tokens, adapter), ``factors`` each adapter's by name of the weight."""
    facts: Any = experts
    num_tokens, num_choices = chosen_TJ.shape
    kind_T, kinds = _kinds(num_tokens, parts, x_TK.device)
    group_S = (chosen_TJ * len(kinds) + kind_T[:, None]).flatten()
    order_S = group_S.argsort(stable=True)
    counts_EC = group_S.bincount(minlength=facts.num_experts * len(kinds)).view(facts.num_experts, len(kinds)).tolist()
    token_S = order_S // num_choices

    def product(parameter: str, expert: int, x: Tensor) -> Tensor:
        weight = DenseWeight(getattr(facts, parameter)[expert], transposed=facts.is_transposed)
        bias = getattr(facts, f"{parameter}_bias")[expert] if facts.has_bias else None
        segments, start = [], 0
        for names, size in zip(kinds, counts_EC[expert], strict=True):
            for name in names if size else ():
                if parameter in factors[name]:
                    a, b, scaling = factors[name][parameter]
                    rows = slice(start, start + size)
                    segments.append(Segment(rows=rows, a_RK=a[expert], b_NR=b[expert], scaling=scaling))
            start += size
        return adapted(x, weight, segments, bias) if segments else weight.multiply(x, bias)

    outputs, start = [], 0
    for expert, counts in enumerate(counts_EC):
        stop = start + sum(counts)
        if start == stop:
            continue
        x = x_TK[token_S[start:stop]]
        if facts.has_gate:
            h = facts._apply_gate(product("gate_up_proj", expert, x))
        else:
            h = facts.act_fn(product("up_proj", expert, x))
        o = product("down_proj", expert, h)
        outputs.append(facts.post_expert_norm(o) if facts.has_post_expert_norm else o)
        start = stop
    o_SK = torch.cat(outputs) * weight_TJ.flatten()[order_S, None]
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return o_SK[back_S].view(num_tokens, num_choices, -1).sum(1).to(x_TK.dtype)


def _kinds(
    num_tokens: int, parts: Sequence[tuple[slice, str]], device: torch.device
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """(kind of each token [T], the adapters of each kind): tokens of one kind have the same adapters."""
    kinds: dict[tuple[str, ...], int] = {}
    kind_T = torch.zeros(num_tokens, dtype=torch.long)
    cuts = sorted({0, num_tokens, *(cut for rows, _ in parts for cut in (rows.start, rows.stop))})
    for start, stop in pairwise(cuts):
        names = tuple(name for rows, name in parts if rows.start <= start and stop <= rows.stop)
        kind_T[start:stop] = kinds.setdefault(names, len(kinds))
    return kind_T.to(device), list(kinds)
