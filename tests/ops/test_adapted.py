"""The one product against its plain twin: every mix of segments, ranks, dropout, DoRA, bias, layout and dtype."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops.adapted import Segment, adapted, adapted_reference
from deltaw.ops.dropout import DropoutKey
from deltaw.ops.frozen import DenseWeight

T, K, N = 11, 7, 5


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _segment(rows, rank, *, seed, dora=False, p=0.0, start=False, dtype=torch.float64):
    scale = (_rand(N, seed=seed + 2, dtype=dtype).abs() + 0.5).requires_grad_() if dora else None
    return Segment(
        rows=slice(*rows),
        a_RK=_rand(rank, K, seed=seed, dtype=dtype).requires_grad_(),
        b_NR=_rand(N, rank, seed=seed + 1, dtype=dtype).requires_grad_(),
        scaling=0.5 + seed,
        column_scale_N=scale,
        mask=DropoutKey(seed, 3).mask(p, "m", rows[0]) if p else None,
        start=(_rand(2, K, seed=seed + 5, dtype=dtype), _rand(N, 2, seed=seed + 6, dtype=dtype)) if start else None,
    )


BATCHES = {
    "none": [],
    "all rows": [dict(rows=(0, T), rank=3, seed=1)],
    "rank 1": [dict(rows=(0, T), rank=1, seed=1)],
    "base rows around": [dict(rows=(2, 7), rank=3, seed=1)],
    "three ranks": [
        dict(rows=(0, 4), rank=2, seed=1), dict(rows=(4, 5), rank=6, seed=2), dict(rows=(7, 11), rank=1, seed=3)
    ],
    "overlap adds up": [dict(rows=(0, T), rank=2, seed=1), dict(rows=(3, 9), rank=4, seed=2)],
    "empty rows": [dict(rows=(4, 4), rank=2, seed=1)],
    "dropout": [dict(rows=(0, T), rank=3, seed=1, p=0.4)],
    "dora": [dict(rows=(0, T), rank=3, seed=1, dora=True)],
    "dora, lora, base, dropout": [
        dict(rows=(0, 3), rank=3, seed=1, dora=True, p=0.3), dict(rows=(3, 8), rank=2, seed=2, p=0.5)
    ],
    "a start": [dict(rows=(1, T), rank=3, seed=1, start=True)],
    "dora and dropout with a start": [dict(rows=(0, 6), rank=3, seed=1, dora=True, p=0.3, start=True)],
}  # fmt: skip


def _case(name, *, bias, transposed, dtype=torch.float64):
    x = _rand(T, K, dtype=dtype).requires_grad_()
    weight = DenseWeight(_rand(*((K, N) if transposed else (N, K)), seed=9, dtype=dtype), transposed=transposed)
    b = _rand(N, seed=8, dtype=dtype).requires_grad_() if bias else None
    segments = [_segment(**s, dtype=dtype) for s in BATCHES[name]]
    leaves = [x, *([b] if bias else [])]
    leaves += [t for s in segments for t in (s.a_RK, s.b_NR, s.column_scale_N) if t is not None]
    return x, weight, segments, b, leaves


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_equals_plain_twin_forward_and_backward(name, bias, transposed):
    x, weight, segments, b, leaves = _case(name, bias=bias, transposed=transposed)
    ours, twin = adapted(x, weight, segments, b), adapted_reference(x, weight, segments, b)
    torch.testing.assert_close(ours, twin)
    upstream = _rand(T, N, seed=77)
    mine = torch.autograd.grad(ours, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(twin, leaves, upstream, allow_unused=True)
    for a, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize("name", [name for name in BATCHES if name != "empty rows"])
def test_gradcheck(name):
    _, weight, segments, _, leaves = _case(name, bias=True, transposed=False)
    names = ("a_RK", "b_NR", "column_scale_N")

    def run(x, b, *factors):
        given = iter(factors)
        rebuilt = []
        for s in segments:
            parts = {n: next(given) if getattr(s, n) is not None else None for n in names}
            rebuilt.append(Segment(rows=s.rows, scaling=s.scaling, mask=s.mask, **parts))
        return adapted(x, weight, rebuilt, b)

    assert gradcheck(run, leaves)


def test_a_column_scale_of_zero_has_its_gradient():
    x, weight, segments, b, leaves = _case("dora", bias=True, transposed=False)
    with torch.no_grad():
        segments[0].column_scale_N[1] = 0
    upstream = _rand(T, N, seed=77)
    mine = torch.autograd.grad(adapted(x, weight, segments, b), leaves, upstream)
    theirs = torch.autograd.grad(adapted_reference(x, weight, segments, b), leaves, upstream)
    for a, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, t)


def test_rows_outside_every_segment_are_the_base_to_the_bit():
    x, weight, segments, _, _ = _case("three ranks", bias=False, transposed=False, dtype=torch.float32)
    y = adapted(x, weight, segments)
    assert torch.equal(y[5:7], weight.multiply(x)[5:7])
    assert not torch.equal(y[:4], weight.multiply(x)[:4])


def test_float32_factors_over_bfloat16_do_not_promote_and_keep_their_own_gradients():
    x = _rand(T, K, dtype=torch.bfloat16).requires_grad_()
    weight = DenseWeight(_rand(N, K, seed=9, dtype=torch.bfloat16))
    s = _segment((0, T), 3, seed=1, dtype=torch.float32)
    y = adapted(x, weight, [s])
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert s.a_RK.grad.dtype == s.b_NR.grad.dtype == torch.float32


def test_a_frozen_input_costs_no_input_gradient():
    class NoTranspose(DenseWeight):
        def multiply_transposed(self, dy_TN):
            raise AssertionError("formed a gradient that nobody asked for")

    x = _rand(T, K)
    s = _segment((0, T), 3, seed=1)
    adapted(x, NoTranspose(_rand(N, K, seed=9)), [s]).sum().backward()
    assert s.a_RK.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a_RK=torch.zeros(3, K + 1)), "do not fit a weight of 5 × 7"),
        (dict(b_NR=torch.zeros(1, 3)), "do not fit a weight of 5 × 7"),
        (dict(rows=slice(3, T + 1)), "lie outside the batch's 11 rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    parts = dict(rows=slice(0, T), a_RK=torch.zeros(3, K), b_NR=torch.zeros(N, 3), scaling=1.0) | change
    with pytest.raises(ValueError, match=message):
        adapted(torch.zeros(T, K), DenseWeight(torch.zeros(N, K)), [Segment(**parts)])


@pytest.mark.parametrize("rows", [[(0, 5), (4, 8)], [(3, 6), (0, 9)], [(0, 9), (3, 6)]])
def test_a_column_scale_does_not_share_its_rows(rows):
    segments = [_segment(rows[0], 2, seed=1, dora=True), _segment(rows[1], 2, seed=2)]
    for order in (segments, segments[::-1]):
        with pytest.raises(ValueError, match="activate one at a time"):
            adapted(_rand(T, K), DenseWeight(_rand(N, K)), order)
