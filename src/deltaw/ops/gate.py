"""Gated activations in one pass forward and one backward: p = act(g)∘u (Shazeer 2020).

    dg = dp∘u∘act'(g)      du = dp∘act(g)

Shapes: g, u and p are alike. ``gate_reference`` is the plain twin.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import find

Activation = Literal["silu", "gelu_tanh"]
_NUMBER: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}


def gate(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """p in g's dtype; not differentiable by itself (``gate_backward`` is its derivative)."""
    kernel = find("gate", "pppii", g)
    if kernel is None or not _are_alike(g, u):
        return gate_reference(g, u, activation)
    g, u = g.contiguous(), u.contiguous()
    p = torch.empty_like(g)
    kernel(g.data_ptr(), u.data_ptr(), p.data_ptr(), g.numel(), _NUMBER[activation])
    return p


def gate_backward(dp: Tensor, g: Tensor, u: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(dg, du) in g's dtype."""
    kernel = find("gate_backward", "pppppii", g)
    if kernel is None or not _are_alike(dp, g, u):
        with torch.enable_grad():
            inputs = g.detach().requires_grad_(), u.detach().requires_grad_()
            dg, du = torch.autograd.grad(gate_reference(*inputs, activation), inputs, dp)
        return dg, du
    dp, g, u = dp.contiguous(), g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(u)
    kernel(*(t.data_ptr() for t in (dp, g, u, dg, du)), g.numel(), _NUMBER[activation])
    return dg, du


def gate_reference(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """The plain twin, with autograd's derivative."""
    return (F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * u


def _are_alike(first: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == first.dtype and t.shape == first.shape and t.device == first.device for t in others)
