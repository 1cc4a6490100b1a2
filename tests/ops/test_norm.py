"""RMS norm against its plain twin: both kinds, all sizes, dtypes, instruction sets; rows that are hostile."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops.norm import RmsNorm, rms_norm, rms_norm_reference
from deltaw.ops.source import Normed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = pytest.mark.parametrize("adds_one", [False, True], ids=["llama", "gemma"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


def _case(rows, width, dtype=torch.float32, *, adds_one=False, eps=1e-5):
    g = torch.Generator().manual_seed(rows * 1000 + width)
    x, dy = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    return x.requires_grad_(), dy, RmsNorm(torch.randn(width, generator=g).to(dtype), eps, adds_one)


def _assert_equal(x, dy, norm, **tolerance):
    y, twin = rms_norm(x, norm), rms_norm_reference(x, norm)
    assert y.dtype == x.dtype and y.shape == x.shape
    torch.testing.assert_close(y, twin, **tolerance)
    mine, theirs = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(twin, x, dy)[0]
    assert mine.dtype == x.dtype
    torch.testing.assert_close(mine, theirs, **tolerance)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_plain_twin_forward_and_backward(level, dtype, adds_one):
    for rows, width in [(0, 16), (1, 1), (3, 15), (2, 16), (5, 17), (1, 33), (7, 64), (4, 576), (200, 100)]:
        tolerance = dict(atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
        _assert_equal(*_case(rows, width, dtype, adds_one=adds_one), **tolerance)


@KINDS
def test_gradcheck(adds_one):
    x, _, norm = _case(3, 7, torch.float64, adds_one=adds_one)
    assert gradcheck(lambda x: rms_norm(x, norm), x)


def test_strides_do_not_matter(level):
    x, dy, _ = _case(34, 40)
    views = {
        "transposed": lambda t: t.T[:, :34],
        "every other": lambda t: t[::2, ::2],
        "expanded": lambda t: t[:1].expand(6, 40),
    }
    for name, view in views.items():
        weight = torch.randn(80)[::2][: view(x).shape[1]]
        assert not view(x).is_contiguous() and not weight.is_contiguous(), name
        _assert_equal(view(x.detach()).requires_grad_(), view(dy), RmsNorm(weight, 1e-5))


def test_a_weight_in_another_dtype(level):
    x, _, norm = _case(3, 40, torch.bfloat16)
    wide = RmsNorm(norm.weight_H.float(), norm.eps)
    torch.testing.assert_close(rms_norm(x, wide), rms_norm_reference(x, wide))
    wide = RmsNorm(norm.weight_H.float(), norm.eps, adds_one=True)
    torch.testing.assert_close(rms_norm(x, wide), rms_norm_reference(x, wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, 1e30, -1e-30])
def test_hostile_rows_come_out_as_the_twins_and_leave_the_others_alone(level, value, dtype):
    x, dy, norm = _case(5, 37, dtype)
    with torch.no_grad():
        x[2] = torch.cat([torch.full((1,), value), torch.zeros(36)])
        x[3, 36] = value
    tolerance = dict(atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype], equal_nan=True)
    y, twin = rms_norm(x, norm), rms_norm_reference(x, norm)
    torch.testing.assert_close(y, twin, **tolerance)
    mine, theirs = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(twin, x, dy)[0]
    others = [0, 1, 4]
    torch.testing.assert_close(mine[others], theirs[others], **tolerance)
    assert (mine[2:4].isfinite() | ~theirs[2:4].isfinite()).all()  # autograd's own sum overflows sooner


def test_the_second_time_gives_the_same_bits(level):
    x, _, norm = _case(9, 100, torch.bfloat16)
    y, (r,) = Normed(norm).forward([x])
    assert torch.equal(Normed(norm).again([x], [r]), y)
