"""Cross-entropy over a frozen output head, without ever holding tokens × vocabulary.

Only rows that predict a supervised token reach the head. They go through it in chunks, and the gradient with respect
to the hidden states is formed on the way, while a chunk's logits are at hand:

    p_s = softmax(h_s·Wᵀ) = exp(h_s·Wᵀ)/z_s        ℓ = Σ_s [log z_s - h_s·w_target]        dh_s = (p_s - onehot_s)·W

with log z from the largest entry of p, which is never small. So the memory held is one chunk of logits, and backward
is a multiplication (cut cross-entropy, Wijmans et al. 2024, and Liger, Hsu et al. 2024, have the idea; here the head
is frozen, so its own gradient is not formed at all).

The loss is a sum. Dividing it by the supervised tokens of the whole optimiser step is the caller's, since only the
caller knows them all.

Shapes: S supervised rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import find
from .frozen import FrozenWeight

CHUNK_BYTES = 32 * 2**20
"""Float32 logits of one chunk: the memory held, and large enough to keep the products busy."""

BLOCK_ROWS = 32
"""Rows of logits that are turned into their gradient together, so that what lies between stays in the cache."""


def frozen_cross_entropy(
    hidden_SH: Tensor, head: FrozenWeight, targets_S: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Loss (scalar, nats, float32 at least) summed over ``targets_S``; differentiable in ``hidden_SH`` only.

    Raises ``ValueError`` for a target outside the vocabulary.
    """
    if len(targets_S) and not 0 <= int(targets_S.min()) <= int(targets_S.max()) < head.out_features:
        raise ValueError(f"targets from {targets_S.min()} to {targets_S.max()} in a vocabulary of {head.out_features}")
    needs_grad = torch.is_grad_enabled() and hidden_SH.requires_grad  # inside a Function grad mode is always off
    args = (hidden_SH, head, targets_S, bias_V, needs_grad)
    loss: Tensor = _FrozenCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
    return loss


def cross_entropy_reference(
    hidden_SH: Tensor, head: FrozenWeight, targets_S: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """The plain twin: all logits at once, autograd's derivative."""
    logits_SV = F.linear(hidden_SH, head.dequantize(), bias_V).float()
    return F.cross_entropy(logits_SV, targets_S, reduction="sum")


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        head: FrozenWeight,
        targets_S: Tensor,
        bias_V: Tensor | None,
        needs_grad: bool,
    ) -> Tensor:
        chunk = max(1, CHUNK_BYTES // (4 * head.out_features))
        accurate = torch.promote_types(hidden_SH.dtype, torch.float32)
        total = torch.zeros((), dtype=accurate, device=hidden_SH.device)
        grad_SH = torch.empty_like(hidden_SH) if needs_grad else None
        for start in range(0, len(targets_S), chunk):
            rows = slice(start, start + chunk)
            logits = head.multiply(hidden_SH[rows], bias_V)
            total += _to_gradient(logits, targets_S[rows], accurate, needs_grad)
            if grad_SH is not None:
                grad_SH[rows] = head.multiply_transposed(logits)
        ctx.save_for_backward(grad_SH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return (None if grad_SH is None else grad_SH * grads[0].to(grad_SH.dtype)), None, None, None, None


def _to_gradient(logits_SV: Tensor, targets_S: Tensor, accurate: torch.dtype, needs_grad: bool) -> Tensor:
    """The chunk's summed loss; its logits become softmax - onehot in place, where a gradient is wanted."""
    kernel = find("cross_entropy", "pppiii", logits_SV)
    if kernel is None or not logits_SV.is_contiguous():
        return _to_gradient_plain(logits_SV, targets_S, accurate, needs_grad)
    parts_S2 = logits_SV.new_empty(len(targets_S), 2, dtype=torch.float32)
    targets_S = targets_S.to(torch.int64).contiguous()
    addresses = (t.data_ptr() for t in (logits_SV, targets_S, parts_S2))
    kernel(*addresses, *logits_SV.shape, needs_grad)
    return (parts_S2[:, 0] + parts_S2[:, 1].log()).sum()


def _to_gradient_plain(logits_SV: Tensor, targets_S: Tensor, accurate: torch.dtype, needs_grad: bool) -> Tensor:
    total = torch.zeros((), dtype=accurate, device=logits_SV.device)
    for part, wanted in zip(logits_SV.split(BLOCK_ROWS), targets_S[:, None].split(BLOCK_ROWS), strict=True):
        p = part.softmax(1, dtype=accurate)
        largest, at = p.max(1, keepdim=True)
        log_z = part.gather(1, at).to(accurate) - largest.log_()
        total += (log_z - part.gather(1, wanted)).sum()
        if needs_grad:
            part.copy_(p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0)))
    return total
