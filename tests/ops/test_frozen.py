"""The two products of a frozen weight, whichever library does them."""

import pytest
import torch

from deltaw.ops import frozen
from deltaw.ops.frozen import ONEDNN_ROWS, DenseWeight

ROWS = (0, 1, ONEDNN_ROWS - 1, ONEDNN_ROWS, ONEDNN_ROWS + 1, 200)
SIZES = [(1, 1), (1, 33), (17, 1), (15, 16), (33, 47), (64, 128)]


def _rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(weight, dtype, tolerance):
    dense = weight.dequantize().double()
    outputs, inputs = dense.shape
    for rows in ROWS:
        x, dy, bias = (
            _rand(rows, inputs, dtype=dtype),
            _rand(rows, outputs, seed=1, dtype=dtype),
            _rand(outputs, seed=2),
        )
        for mine, exact in [
            (weight.multiply(x), x.double() @ dense.T),
            (weight.multiply(x, bias), x.double() @ dense.T + bias.to(dtype).double()),
            (weight.multiply_transposed(dy), dy.double() @ dense),
        ]:
            assert mine.dtype == dtype and mine.shape == exact.shape
            torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
def test_products_are_exact_to_rounding(dtype, tolerance, transposed):
    for outputs, inputs in SIZES:
        w = _rand(*((inputs, outputs) if transposed else (outputs, inputs)), seed=3, dtype=dtype)
        _check(DenseWeight(w, transposed=transposed), dtype, tolerance)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(frozen, "_HAS_ONEDNN", False)
    _check(DenseWeight(_rand(33, 47, seed=3)), torch.float32, 1e-4)


def test_strides_do_not_matter():
    wide = _rand(66, 94, seed=3)
    for w in (wide[::2, ::2], wide.T[:33, :47], wide[:1].expand(33, 94)[:, :47]):
        assert not w.is_contiguous()
        weight, dense = DenseWeight(w), DenseWeight(w.contiguous())
        x, dy = _rand(94, 200).T[::2, ::2], _rand(66, 200, seed=1).T[:, ::2]
        for mine, plain in [
            (weight.multiply(x), dense.multiply(x.contiguous())),
            (weight.multiply_transposed(dy), dense.multiply_transposed(dy.contiguous())),
        ]:
            torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 100])
def test_whoever_wants_a_gradient_through_it_gets_one(rows):
    """Outside our own functions a product is an ordinary operation."""
    x, w = _rand(rows, 9).requires_grad_(), _rand(5, 9, seed=1)
    DenseWeight(w).multiply(x).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(rows, 9))
    trained = w.clone().requires_grad_()
    DenseWeight(trained).multiply(x.detach()).sum().backward()
    torch.testing.assert_close(trained.grad, x.detach().sum(0).expand(5, 9))


@pytest.mark.parametrize("rows", [3, 100])
def test_a_live_weight_is_read_not_kept(rows):
    """No packed copy: what changes in place is seen."""
    w, x = _rand(5, 9, seed=1), _rand(rows, 9)
    weight = DenseWeight(w)
    before = weight.multiply(x)
    w.mul_(2)
    torch.testing.assert_close(weight.multiply(x), 2 * before)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_hostile_row_leaves_the_others_alone(bad):
    weight, x = DenseWeight(_rand(33, 47, seed=1)), _rand(100, 47)
    expected = weight.multiply(x)
    x[7, 3] = bad
    got = weight.multiply(x)
    assert not got[7].isfinite().any()
    others = [i for i in range(100) if i != 7]
    torch.testing.assert_close(got[others], expected[others])
