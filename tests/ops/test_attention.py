"""Packed attention against its plain twin; nothing leaks between examples."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw import kernels
from deltaw.ops import attention
from deltaw.ops.attention import Masking, packed_attention, packed_attention_reference

LEVELS = [name for name in kernels.LEVELS if kernels._path(name).is_file() and kernels._can_run(name)]


@pytest.fixture(params=[*LEVELS, "off"])
def level(request, monkeypatch):
    """Each level that this machine can run, in turn."""
    monkeypatch.setenv("DELTAW_KERNELS", request.param)
    caches = kernels.level, kernels.library, kernels.function, attention._kernel_call
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


def _random(num_heads=4, groups=2, tokens=23, size=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = [(num_heads, tokens, size), (groups, tokens, size), (groups, tokens, size)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


CASES = [
    pytest.param([23], Masking(0.35), id="one"),
    pytest.param([5, 1, 17], Masking(0.35), id="many"),
    pytest.param([5, 1, 17], Masking(0.35, window=4), id="window"),
    pytest.param([5, 1, 17], Masking(0.35, softcap=1.5), id="softcap"),
    pytest.param([11, 12], Masking(0.35, window=3, softcap=0.7), id="both"),
]


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize(("lengths", "masking"), CASES)
def test_equals_plain_twin_forward_and_backward(monkeypatch, lengths, masking, block):
    monkeypatch.setattr(attention, "BLOCK_ROWS", block)
    qkv = _random()
    ours = packed_attention(*qkv, lengths, masking)
    theirs = packed_attention_reference(*qkv, lengths, masking)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, twin in zip(
        torch.autograd.grad(ours, qkv, upstream), torch.autograd.grad(theirs, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(mine, twin)


@pytest.mark.parametrize(("lengths", "masking"), [([3, 4], Masking(0.5)), ([7], Masking(0.5, window=2, softcap=1.0))])
def test_gradcheck(lengths, masking):
    assert gradcheck(lambda q, k, v: packed_attention(q, k, v, lengths, masking), _random(2, 1, 7, 3))


def test_perturbing_one_example_moves_no_bit_of_another():
    q, k, v = _random(dtype=torch.float32)
    masking = Masking(0.35)
    before = packed_attention(q, k, v, [10, 13], masking)
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[:, :10] += 100
    after = packed_attention(q, k, v, [10, 13], masking)
    assert torch.equal(before[10:], after[10:])
    assert not torch.equal(before[:10], after[:10])


def test_bfloat16_stays_near_float32():
    qkv = _random(dtype=torch.float32)
    exact = packed_attention(*qkv, [5, 18], Masking(0.35))
    rough = packed_attention(*[t.bfloat16() for t in qkv], [5, 18], Masking(0.35))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="22 tokens in all, in a batch of 23"):
        packed_attention(*_random(), [22], Masking(1.0))


SHAPES = [  # heads, groups, D, D of v, lengths, window
    pytest.param(4, 2, 64, 64, [130, 1, 65], None, id="tiles"),
    pytest.param(9, 3, 64, 64, [96, 97], 70, id="window"),
    pytest.param(3, 3, 1, 3, [7, 66], None, id="tiny"),
    pytest.param(4, 1, 17, 40, [300], 5, id="odd"),
    pytest.param(2, 1, 256, 96, [40, 0, 6], None, id="wide"),
    pytest.param(2, 1, 8, 8, [23, 700], None, id="long"),
    pytest.param(2, 1, 8, 8, [1100], 600, id="long-window"),
    pytest.param(2, 1, 8, 8, [130], 1, id="itself"),
]


def _as_projected(num_heads, groups, size, v_size, tokens, dtype):
    """q, k and v as they come: slices of one product, seen heads first."""
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(tokens, (num_heads + groups) * size + groups * v_size, generator=g).to(dtype)
    q, k, v = qkv.split([num_heads * size, groups * size, groups * v_size], -1)
    heads = [q.unflatten(-1, (num_heads, size)), k.unflatten(-1, (groups, size)), v.unflatten(-1, (groups, v_size))]
    return [x.transpose(0, 1).requires_grad_() for x in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "groups", "size", "v_size", "lengths", "window"), SHAPES)
def test_every_level_equals_the_reference(level, num_heads, groups, size, v_size, lengths, window, dtype):
    qkv = _as_projected(num_heads, groups, size, v_size, sum(lengths), dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    masking = Masking(1.5 * size**-0.5, window=window)
    ours = packed_attention(*qkv, lengths, masking)
    theirs = packed_attention_reference(*exact, lengths, masking)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = torch.autograd.grad(ours, qkv, upstream)
    exact_grads = torch.autograd.grad(theirs, exact, upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for mine, twin in zip((ours, *grads), (theirs, *exact_grads), strict=True):
        assert mine.dtype == dtype and mine.shape == twin.shape
        scale = max(1.0, twin.abs().max().item())
        torch.testing.assert_close(mine.double(), twin, rtol=0, atol=tolerance * scale)


def test_threads_change_no_bit(level):
    def run(lengths):
        qkv = _as_projected(6, 2, 16, 16, sum(lengths), torch.bfloat16)
        o = packed_attention(*qkv, lengths, Masking(0.25))
        return o, *torch.autograd.grad(o.float().square().sum(), qkv)

    if level == "off":
        pytest.skip("torch's own products decide")
    num_threads = torch.get_num_threads()
    try:
        for lengths in ([150], [30] * 6):  # cut by query heads, and not
            torch.set_num_threads(1)
            one = run(lengths)
            torch.set_num_threads(3)
            assert all(map(torch.equal, one, run(lengths)))
    finally:
        torch.set_num_threads(num_threads)


def test_nothing_of_one_example_reaches_another(level):
    """Not even nan, forward or backward."""
    q, k, v = _as_projected(4, 2, 20, 20, 90, torch.bfloat16)
    lengths, masking = [41, 49], Masking(0.2)
    spoilt = [x.detach().clone() for x in (q, k, v)]
    for x in spoilt:
        x[:, :41] = torch.nan
        x.requires_grad_()
    for clean, dirty in zip(
        _with_grads((q, k, v), lengths, masking), _with_grads(spoilt, lengths, masking), strict=True
    ):
        assert torch.equal(clean[41:], dirty[41:])
        assert dirty[:41].isnan().all()


def _with_grads(qkv, lengths, masking):
    """o, dq, dk, dv with tokens first."""
    o = packed_attention(*qkv, lengths, masking)
    return o, *(grad.transpose(0, 1) for grad in torch.autograd.grad(o, qkv, torch.ones_like(o)))


def test_inputs_of_any_strides(level):
    """Rows that aren't contiguous, a gradient that is one number seen many times."""
    qkv = [x.detach().double().mT.contiguous().mT.float().requires_grad_() for x in _random(dtype=torch.float32)]
    assert qkv[0].stride(-1) != 1
    plain = [x.detach().contiguous().requires_grad_() for x in qkv]
    results = []
    for inputs in (qkv, plain):
        o = packed_attention(*inputs, [5, 18], Masking(0.35))
        results.append((o, *torch.autograd.grad(o.sum(), inputs)))
    for odd, usual in zip(*results, strict=True):
        torch.testing.assert_close(odd, usual)


def test_gradients_lie_tokens_first(level):
    """As the projections want them: no copy follows."""
    qkv = [x.detach() for x in _as_projected(4, 2, 8, 8, 20, torch.float32)]
    o, softmax = attention.attention(*qkv, [20], Masking(0.35))
    for grad in attention.attention_backward(torch.ones_like(o), *qkv, o, softmax, [20], Masking(0.35)):
        assert grad.transpose(0, 1).is_contiguous()
