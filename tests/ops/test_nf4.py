"""4-bit weights: bitsandbytes' codes, scales and values bit for bit, whatever the shape."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.ops import nf4
from deltaw.ops.nf4 import KINDS, dequantize, dequantize_scales, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g)  # blocks of very different scales
    return (torch.randn(shape, generator=g) * rows).to(dtype)


def _plainly(q, levels):
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)[: q.shape.numel()]
    scales = dequantize_scales(q.scales).repeat_interleave(q.block_size)[: len(codes)]
    return (levels[codes.long()] * scales).to(q.dtype).view(q.shape)


def _assert_equal(w, kind, double, block_size=64):
    packed, state = bnb.quantize_4bit(w.contiguous(), quant_type=kind, blocksize=block_size, compress_statistics=double)
    ours = quantize(w, kind, block_size=block_size, double=double)
    assert torch.equal(ours.packed, packed.view(-1))
    if double:
        assert torch.equal(ours.scales.codes, state.absmax)
        assert torch.equal(ours.scales.absmax, state.state2.absmax)
        assert torch.equal(ours.scales.offset, state.offset)
    else:
        assert torch.equal(ours.scales, state.absmax)
    got = dequantize(ours)
    assert got.dtype == w.dtype
    assert torch.equal(got, _plainly(ours, state.code))
    if w.shape[-1] % block_size == 0 or w.shape[-1] % 2:
        # Of other rows bitsandbytes' AVX512 kernel takes some weights times their neighbours' scale.
        assert torch.equal(got, bnb.dequantize_4bit(packed, state).view(w.shape))
    return ours


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_bitsandbytes(kind, dtype, double):
    for shape in [(33, 64), (7, 130), (1000, 640), (2, 3, 66), (1, 64), (400, 100)]:
        _assert_equal(_weight(*shape, dtype=dtype), kind, double)


@pytest.mark.parametrize("shape", [(33, 65), (7, 131), (5, 3), (1, 1)], ids=str)
def test_equals_bitsandbytes_for_odd_sizes(shape):
    ours = _assert_equal(_weight(*shape), "nf4", True)
    assert len(ours.packed) == (shape[0] * shape[1] + 1) // 2


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_equals_bitsandbytes_for_every_block_size(block_size):
    _assert_equal(_weight(5, 4096 + 2), "nf4", False, block_size)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(32, 70), seed=st.integers(0, 99), double=st.booleans())
def test_equals_bitsandbytes_anywhere(rows, columns, seed, double):
    w = _weight(rows, 2 * columns, seed=seed)
    w[w.abs() < 0.1] = 0
    _assert_equal(w, "nf4", double)


def test_zeros():
    for shape in [(4, 64), (3, 50), (1, 1)]:
        ours = _assert_equal(torch.zeros(shape), "nf4", False)
        assert not dequantize(ours).any()
    assert torch.equal(dequantize(quantize(torch.ones(64, 64), double=True)), torch.ones(64, 64))


def test_strides_do_not_matter():
    w = _weight(96, 130)
    views = {
        "transposed": w.T,
        "every other": w[::2, ::2],
        "expanded": w[:1].expand(50, 130),
        "narrow": w[:, 3:90],
        "permuted": w.view(96, 13, 10).permute(2, 0, 1),
    }
    for name, view in views.items():
        one, other = quantize(view, double=True), quantize(view.contiguous(), double=True)
        assert torch.equal(one.packed, other.packed) and torch.equal(one.scales.codes, other.scales.codes), name
        assert torch.equal(dequantize(one), dequantize(other)), name


@pytest.mark.parametrize("shape", [(50, 40), (1, 2000), (2000,), (3, 5, 133), (7, 1)], ids=str)
def test_pieces_do_not_matter(monkeypatch, shape):
    w = _weight(*shape)
    whole = quantize(w)
    expected = dequantize(whole)
    monkeypatch.setattr(nf4, "_PIECE", 128)
    pieces = quantize(w)
    assert torch.equal(whole.packed, pieces.packed) and torch.equal(whole.scales, pieces.scales)
    assert torch.equal(dequantize(pieces), expected)


@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (3, 0)], ids=str)
def test_scalars_and_nothing(shape):
    w = torch.full(shape, -0.7)
    assert torch.equal(dequantize(quantize(w)), w)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_level_is_taken(kind):
    w = _weight(40, 64)
    ours = quantize(w, kind)
    levels = torch.tensor(nf4._LEVELS[kind]).double()
    blocks = w.view(-1, 64).double()
    scales = blocks.abs().amax(1, keepdim=True)
    best = (blocks / scales)[..., None].sub(levels).abs().amin(-1) * scales
    error = (dequantize(ours, torch.float64).view(-1, 64) - blocks).abs()
    torch.testing.assert_close(error, best, atol=1e-6, rtol=0)
    assert torch.equal(dequantize(quantize(dequantize(ours), kind)), dequantize(ours))


def test_nf4_loses_least_of_normal_weights():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    lost = {kind: (dequantize(quantize(w, kind)) - w).norm() / w.norm() for kind in KINDS}
    assert lost["nf4"] < lost["int4"] < lost["fp4"] < lost["nf2"]


def test_double_quantisation_costs_little_and_saves_most_of_the_scales():
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = quantize(w), quantize(w, double=True)
    assert plain.nbytes * 8 / w.numel() == 4.5
    assert double.nbytes * 8 / w.numel() == pytest.approx(4.127, abs=1e-3)
    torch.testing.assert_close(dequantize_scales(double.scales), plain.scales, atol=0.02, rtol=0.01)
    assert (dequantize(double) - w).norm() < 1.01 * (dequantize(plain) - w).norm()


def test_the_maps_are_bitsandbytes():
    cpu = torch.device("cpu")
    assert torch.equal(nf4.dynamic_map(cpu), bnb.create_dynamic_map())
    for kind in ("nf4", "fp4"):
        assert torch.equal(nf4.levels_of(kind, cpu), bnb.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite(bad):
    w = _weight(4, 65)
    w[3, 64] = bad
    with pytest.raises(UserError, match="infinities or nans"):
        quantize(w)


def test_scales_that_add_up_to_infinity():
    w = torch.full((64, 64), 3e38)
    assert quantize(w).scales.isfinite().all()
    with pytest.raises(UserError, match="too large for double"):
        quantize(w, double=True)


def test_what_there_is_not():
    w = torch.zeros(4, 64)
    with pytest.raises(UserError, match="'nf3': expected one of nf4, fp4, int4, nf2"):
        quantize(w, "nf3")
    with pytest.raises(UserError, match="blocks of 100 weights: expected one of 32, 64"):
        quantize(w, block_size=100)
    with pytest.raises(UserError, match="int32 can't be quantised"):
        quantize(w.int())
