"""Rotary positions against the three eager operations: sizes, dtypes, strides, and the transpose as derivative."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops.rotary import rotary, rotary_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.0, torch.float16: 0.0, torch.float64: 1e-14}
SHAPES = [(0, 2, 8), (1, 1, 2), (3, 2, 6), (5, 3, 30), (2, 4, 32), (7, 1, 34), (9, 2, 64), (70, 9, 128)]


def _case(tokens, heads, size, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens + size)
    x, dy = (torch.randn(tokens, heads, size, generator=g).to(dtype) for _ in range(2))
    # not a rotation's: the two halves of cos and sin differ, so that a mix-up shows
    cos, sin = (torch.randn(tokens, size, generator=g).to(dtype) for _ in range(2))
    return x.requires_grad_(), cos, sin, dy


def _assert_equal(x, cos, sin, dy, tolerance):
    y, twin = rotary(x, cos, sin), rotary_reference(x, cos, sin)
    assert y.is_contiguous() and y.dtype == x.dtype
    torch.testing.assert_close(y, twin, atol=tolerance, rtol=tolerance)
    mine, theirs = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(twin, x, dy)[0]
    torch.testing.assert_close(mine, theirs, atol=4 * tolerance, rtol=tolerance)


@DTYPES
def test_equals_plain_twin_forward_and_backward(level, dtype):
    """To the bit in 16 bits; in float32 a product may be summed before it is rounded."""
    for shape in SHAPES:
        _assert_equal(*_case(*shape, dtype), TOLERANCE[dtype])


def test_gradcheck():
    x, cos, sin, _ = _case(3, 2, 6, torch.float64)
    assert gradcheck(lambda x: rotary(x, cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(level, dtype):
    x, cos, sin, dy = _case(12, 6, 40, dtype)
    x = x.detach()
    views = {
        "heads first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "part of a wider row": lambda t: torch.cat([t, t], -1)[..., :40],
        "every other head": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "every other number": lambda t: t.repeat_interleave(2, 2)[..., ::2],
        "one token for all": lambda t: t[:1].expand(12, 6, 40),
    }
    for name, view in views.items():
        assert not view(x).is_contiguous(), name
        given = (view(x).requires_grad_(), view(cos[:, None])[:, 0], sin.T.contiguous().T, view(dy))
        _assert_equal(*given, TOLERANCE[dtype])


def test_angles_in_another_dtype(level):
    x, cos, sin, _ = _case(4, 2, 16, torch.bfloat16)
    torch.testing.assert_close(rotary(x, cos.float(), sin.float()), rotary_reference(x, cos.float(), sin.float()))


def test_angles_that_do_not_fit_are_refused_not_read_past_their_end(level):
    x, cos, sin, _ = _case(4, 2, 16)
    with pytest.raises(RuntimeError, match="size of tensor"):
        rotary(x, cos[:, :8], sin[:, :8])
    with pytest.raises(RuntimeError, match="size of tensor"):
        rotary(x, cos[:3], sin[:3])


def test_what_is_not_finite_stays_in_its_pair(level):
    x, cos, sin, _ = _case(3, 2, 40)
    with torch.no_grad():
        x[1, 1, 3] = float("nan")
    bad = ~rotary(x, cos, sin).isfinite()
    assert bad.nonzero().tolist() == [[1, 1, 3], [1, 1, 23]]
