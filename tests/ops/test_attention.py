"""Packed attention against its plain twin; nothing leaks between examples."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops import attention
from deltaw.ops.attention import Masking, packed_attention, packed_attention_reference


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
