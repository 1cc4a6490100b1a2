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

from .frozen import FrozenWeight

CHUNK_BYTES = 32 * 2**20
"""Float32 logits of one chunk: the memory held, and large enough to keep the products busy."""

BLOCK_ROWS = 32
"""Rows of logits that are turned into their gradient together, so that what lies between stays in the cache."""


def frozen_cross_entropy(
    hidden_SH: Tensor, head: FrozenWeight, targets_S: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Loss (scalar, nats, float32 at least) summed over ``targets_S``; differentiable in ``hidden_SH`` only."""
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
            targets = targets_S[rows, None]
            logits = head.multiply(hidden_SH[rows], bias_V)
            for part, wanted in zip(logits.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
                p = part.softmax(1, dtype=accurate)
                largest, at = p.max(1, keepdim=True)
                log_z = part.gather(1, at).to(accurate) - largest.log_()
                total += (log_z - part.gather(1, wanted)).sum()
                if grad_SH is not None:
                    part.copy_(p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0)))
            if grad_SH is not None:
                grad_SH[rows] = head.multiply_transposed(logits)
        ctx.save_for_backward(grad_SH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SH,) = ctx.saved_tensors
        return (None if grad_SH is None else grad_SH * grads[0].to(grad_SH.dtype)), None, None, None, None
