"""Reading weights in 4 bits with compiled kernels: dense ones to the bit, products to the last digits."""

import pytest
import torch

from deltaw.ops import nf4, nf4_kernel
from deltaw.ops.nf4 import KINDS, dequantize, dequantize_reference, quantize
from deltaw.ops.quantized import multiply, multiply_reference

each_kind = pytest.mark.parametrize("kind", KINDS)
each_scale = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
each_block = pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)


def _weight(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g)


@each_scale
@each_kind
def test_dense_weights_are_the_plain_twins_to_the_bit(level, kind, double):
    for shape in [(0,), (1,), (15,), (3, 5), (16, 1), (31, 33), (7, 128), (5, 130), (40, 576), (300, 100)]:
        q = quantize(_weight(*shape), kind, double=double)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(dequantize(q, dtype), dequantize_reference(q, dtype)), (shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_codes_and_scales_are_the_plain_twins_to_the_bit(level, kind, dtype):
    for shape in [(0,), (1,), (15,), (3, 5), (31, 33), (5, 130), (40, 576)]:
        w = _weight(*shape)
        for case in (w, w * 0, -w * 0, w * 1e-36, w * 1e-39, w * 5e37):
            for block_size in (32, 64, 4096):
                q = quantize(case.to(dtype), kind, block_size=block_size)
                packed, scales = nf4._quantize_plain(case.to(dtype), kind, block_size)
                assert torch.equal(q.packed, packed) and torch.equal(q.scales, scales), (shape, block_size)


def test_weights_too_small_for_a_processors_shortcuts(level):
    for magnitude in (1e-34, 1e-36, 1e-38, 1e-40):
        q = quantize(_weight(20, 100) * magnitude)
        assert torch.equal(dequantize(q, torch.bfloat16), dequantize_reference(q, torch.bfloat16)), magnitude


@each_block
def test_every_block_size(level, block_size):
    for shape in [(3, 4096), (5, block_size + 2), (1, 31)]:
        q = quantize(_weight(*shape), block_size=block_size, double=True)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize(q, dtype), dequantize_reference(q, dtype))


def test_dense_weights_where_they_are_wanted(level):
    q = quantize(_weight(6, 50))
    memory = torch.full((302,), 7.0)
    out = dequantize(q, out=memory[1:301].view(6, 50))
    assert out.data_ptr() == memory[1:].data_ptr() and torch.equal(out, dequantize_reference(q))
    assert memory[0] == memory[301] == 7


def _product(x, q):
    got = nf4_kernel.multiply(x, q, nf4.codebooks(q.kind))
    return multiply(x, q) if got is None else got


@each_block
@each_scale
@each_kind
def test_products_with_few_rows(level, kind, double, block_size):
    for rows, outputs, width in [(1, 1, 128), (2, 17, 128), (3, 5, 640), (5, 33, 256), (8, 3, 4096)]:
        q = quantize(_weight(outputs, width), kind, block_size=block_size, double=double)
        x = _weight(rows, width, seed=1)
        torch.testing.assert_close(_product(x, q), x @ dequantize_reference(q).T, atol=1e-3, rtol=1e-4)
        x = x.bfloat16()
        dense = dequantize_reference(q, torch.float64)
        got = _product(x, q)
        assert got.dtype == torch.bfloat16
        error, most = (got.double() - x.double() @ dense.T).abs(), x.double().abs() @ dense.abs().T
        assert (error <= 2**-7 * most).all()


def test_strides_do_not_matter(level):
    q = quantize(_weight(20, 256), double=True)
    x = _weight(256, 6, seed=1).T
    assert torch.equal(multiply(x, q), multiply(x.contiguous(), q))


def test_which_products_have_a_kernel(level):
    def has(rows, width, block_size=64, dtype=torch.float32):
        q = quantize(_weight(4, width), block_size=block_size)
        return nf4_kernel.multiply(_weight(rows, width).to(dtype), q, nf4.codebooks("nf4")) is not None

    there = level != "off"
    assert has(1, 128) == has(8, 128) == has(2, 256, dtype=torch.bfloat16) == there
    assert not any(
        [has(0, 128), has(9, 128), has(1, 64), has(1, 200), has(1, 128, 256), has(1, 128, dtype=torch.float16)]
    )


def test_no_rows_and_many_rows_are_the_plain_product(level):
    q = quantize(_weight(20, 256))
    for rows in (0, 9, 40):
        x = _weight(rows, 256, seed=1) if rows else torch.empty(0, 256)
        assert torch.equal(multiply(x, q), multiply_reference(x, q))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_hostile_row_leaves_the_others_alone(level, bad):
    q, x = quantize(_weight(20, 256)), _weight(3, 256, seed=1)
    expected = multiply(x, q)
    x[1, 5] = bad
    got = multiply(x, q)
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_threads_change_no_bit(level):
    q, x = quantize(_weight(700, 512), double=True), _weight(3, 512, seed=1)
    was, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((dequantize(q), dequantize(q, torch.bfloat16), multiply(x, q), multiply(x.bfloat16(), q)))
    finally:
        torch.set_num_threads(was)
    for other in results[1:] if level != "off" else []:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
