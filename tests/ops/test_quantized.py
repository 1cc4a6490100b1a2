"""Products with a weight in 4 bits: those of its dense copy, however it is cut."""

import pytest
import torch

from deltaw.errors import UserError
from deltaw.ops import quantized as ops
from deltaw.ops.frozen import DenseWeight
from deltaw.ops.nf4 import dequantize
from deltaw.ops.quantized import METHODS, Method, QuantizedWeight, frozen_linear, look_up, row_blocks


def _weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.mark.parametrize("shape", [(48, 64), (30, 50), (7, 131), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("at_once", [2**26, 200], ids=["whole", "in parts"])
def test_products_are_those_of_the_dense_copy(method, shape, at_once, monkeypatch):
    monkeypatch.setattr(ops, "_AT_ONCE", at_once)
    q = method.quantize(_weight(*shape))
    weight, dense = QuantizedWeight(q), DenseWeight(dequantize(q))
    x, dy, bias = _weight(4, shape[1], seed=1), _weight(4, shape[0], seed=2), _weight(shape[0], seed=3)
    assert (weight.out_features, weight.in_features) == shape
    assert torch.equal(weight.dequantize(), dense.weight)
    torch.testing.assert_close(weight.multiply(x), dense.multiply(x))
    torch.testing.assert_close(weight.multiply(x, bias), dense.multiply(x, bias))
    torch.testing.assert_close(weight.multiply_transposed(dy), dense.multiply_transposed(dy))


@pytest.mark.parametrize("shape", [(300, 64), (30, 50), (70, 33)], ids=str)
def test_blocks_of_rows_are_the_whole(method, shape, monkeypatch):
    q = method.quantize(_weight(*shape))
    monkeypatch.setattr(ops, "_AT_ONCE", 500)
    blocks = list(row_blocks(q))
    assert torch.equal(torch.cat([dequantize(part) for _, part in blocks]), dequantize(q))
    assert [rows.start for rows, _ in blocks][1:] == [rows.stop for rows, _ in blocks][:-1]


def test_products_are_in_the_dtype_of_the_input():
    weight = QuantizedWeight(METHODS["nf4"].quantize(_weight(48, 64)))
    for dtype in (torch.bfloat16, torch.float64):
        x = _weight(3, 64).to(dtype)
        assert weight.multiply(x, torch.ones(48)).dtype == dtype
        assert weight.multiply_transposed(_weight(3, 48).to(dtype)).dtype == dtype


@pytest.mark.parametrize("width", [64, 192, 50, 33])
def test_rows_that_are_looked_up(method, width):
    q = method.quantize(_weight(40, width))
    ids = torch.tensor([[3, 39, 0], [3, 7, 7]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(look_up(q, ids, dtype), dequantize(q, dtype)[ids])
    assert look_up(q, ids[:0], torch.float32).shape == (0, 3, width)


def test_the_layers_product_has_the_derivatives_of_a_linear_layer():
    q = METHODS["nf4"].quantize(_weight(9, 64).double())
    x, bias = _weight(2, 3, 64).double().requires_grad_(), _weight(9).double().requires_grad_()
    y = frozen_linear(x, QuantizedWeight(q), bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dequantize(q), bias))
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, QuantizedWeight(q), b), (x, bias))


def test_under_autocast_products_are_in_its_dtype():
    weight = QuantizedWeight(METHODS["nf4"].quantize(_weight(9, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(_weight(2, 64), weight).dtype == torch.bfloat16


def test_what_there_is_not():
    with pytest.raises(UserError, match="'nf2': expected nf4, fp4 or int4"):
        Method(kind="nf2")
    with pytest.raises(UserError, match="blocks of 100 weights: expected one of 32"):
        Method(block_size=100)
    assert str(METHODS["nf4"]) == "NF4 + double quantisation, blocks of 64"


@pytest.mark.parametrize(
    ("name", "block_size", "bits"),
    [("nf4", 64, 4.127), ("nf4-single", 64, 4.5), ("int4", 64, 4.5), ("int4", 256, 4.125), ("fp4", 64, 4.5)],
)
def test_bits_of_the_real_tensors(name, block_size, bits):
    method = Method(kind=METHODS[name].kind, block_size=block_size, double=METHODS[name].double)
    w = _weight(512, 1024)
    assert 8 * method.quantize(w).nbytes / w.numel() == pytest.approx(bits, abs=1e-3)
