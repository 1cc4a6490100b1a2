"""Gated activations against their plain twin: sizes, dtypes, instruction sets, values at the ends of the range."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops.gate import gate, gate_backward, gate_reference
from deltaw.ops.source import Gated

ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-12}
SHAPES = [(0, 16), (1, 1), (3, 5), (1, 16), (1, 17), (3, 11), (7, 96), (300, 131)]


def _tensors(*shape, dtype=torch.float32, count=3):
    g = torch.Generator().manual_seed(shape[0] + 7)
    return [(3 * torch.randn(shape, generator=g)).to(dtype) for _ in range(count)]


def _twin_backward(dp, g, u, activation):
    """In float64: eager operations round in between, and GELU's tanh cancels where g is far below zero."""
    inputs = [t.double().requires_grad_() for t in (g, u)]
    return [t.to(g.dtype) for t in torch.autograd.grad(gate_reference(*inputs, activation), inputs, dp.double())]


@DTYPES
@ACTIVATIONS
def test_equals_plain_twin_forward_and_backward(level, activation, dtype):
    for shape in SHAPES:
        dp, g, u = _tensors(*shape, dtype=dtype)
        tolerance = dict(atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        p = gate(g, u, activation)
        assert p.dtype == dtype and p.shape == g.shape
        torch.testing.assert_close(p, gate_reference(g, u, activation), **tolerance)
        for mine, theirs in zip(gate_backward(dp, g, u, activation), _twin_backward(dp, g, u, activation), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


@ACTIVATIONS
def test_gradcheck(activation):
    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g, u):
            ctx.save_for_backward(g, u)
            return Gated(activation).forward([g, u])[0]

        @staticmethod
        def backward(ctx, dp):
            return Gated(activation).backward(dp, ctx.saved_tensors, [])

    g, u = (t.requires_grad_() for t in _tensors(3, 5, dtype=torch.float64, count=2))
    assert gradcheck(Gate.apply, (g, u))


@ACTIVATIONS
def test_strides_do_not_matter(level, activation):
    dp, g, u = _tensors(24, 40)
    views = [t.T for t in (dp, g, u)], [dp[::2, ::2], g[1::2, 1::2], u[:12, 3:23]], [dp, g[:1].expand(24, 40), u]
    for dp, g, u in views:
        torch.testing.assert_close(gate(g, u, activation), gate_reference(g, u, activation))
        for mine, theirs in zip(gate_backward(dp, g, u, activation), _twin_backward(dp, g, u, activation), strict=True):
            torch.testing.assert_close(mine, theirs, atol=4e-5, rtol=1e-5)


@ACTIVATIONS
def test_tensors_that_are_not_alike_go_the_plain_way(level, activation):
    dp, g, u = _tensors(4, 40, dtype=torch.bfloat16)
    torch.testing.assert_close(gate(g, u.float(), activation), gate_reference(g, u.float(), activation))
    torch.testing.assert_close(gate(g, u[:1], activation), gate_reference(g, u[:1], activation))
    dg, du = gate_backward(dp.float(), g, u.float(), activation)
    assert dg.dtype == torch.bfloat16 and du.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ACTIVATIONS
def test_the_ends_of_the_range(level, activation, dtype):
    """Far out an activation is 0 or the identity, and its slope 0 or 1; nothing is invented there."""
    far = torch.tensor([88.0, 89, 104, 1e3, 1e8, 1e18], dtype=dtype)
    g, u = torch.cat([far, -far, torch.zeros(2)]).to(dtype), torch.ones(14, dtype=dtype)
    p = gate(g, u, activation)
    torch.testing.assert_close(p, torch.cat([far, torch.zeros(8)]).to(dtype), atol=1e-30, rtol=1e-6)
    dg, du = gate_backward(u, g, u, activation)
    expected = torch.cat([torch.ones(6), torch.zeros(6), torch.full((2,), 0.5)]).to(dtype)
    torch.testing.assert_close(dg, expected, atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(du, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ACTIVATIONS
def test_what_is_not_finite_stays_so_and_keeps_to_its_place(level, activation, dtype):
    dp, g, u = _tensors(3, 37, dtype=dtype)
    bad = torch.zeros(3, 37, dtype=torch.bool)
    for (row, column), value in {(0, 36): float("nan"), (1, 3): float("inf"), (2, 20): float("-inf")}.items():
        g[row, column], bad[row, column] = value, True
    p, (dg, du) = gate(g, u, activation), gate_backward(dp, g, u, activation)
    assert p[0, 36].isnan() and dg[0, 36].isnan() and du[0, 36].isnan()
    assert p[1, 3].isinf()
    for t in (p, dg, du):
        assert t[~bad].isfinite().all()
