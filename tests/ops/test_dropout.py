"""Masks are a function of their key: independent of layout, of company and of when they are drawn."""

import pytest
import torch

from deltaw.ops.dropout import DropoutKey, kept, kept_reference, unpack


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64])
def test_a_row_does_not_depend_on_the_rows_before_it(columns):
    whole = DropoutKey(1, 2).mask(0.3, "q_proj", 0).draw(50, columns)
    part = DropoutKey(1, 2, first_row=20).mask(0.3, "q_proj", 7).draw(5, columns)
    assert torch.equal(whole[27:32], part)


def test_seed_step_and_module_each_change_the_mask():
    base = DropoutKey(1, 2).mask(0.5, "q", 0).draw(8, 64)
    for other in (
        DropoutKey(2, 2).mask(0.5, "q", 0),
        DropoutKey(1, 3).mask(0.5, "q", 0),
        DropoutKey(1, 2).mask(0.5, "k", 0),
    ):
        assert not torch.equal(base, other.draw(8, 64))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_share_dropped_and_expectation(p):
    x = torch.ones(1000, 500)
    mask = DropoutKey(0, 0).mask(p, "m", 0)
    y = kept(x, mask.draw(*x.shape)) * mask.scale
    assert abs((y == 0).double().mean().item() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / 32768
    assert abs(y.double().mean().item() - 1) < 0.01


def test_columns_and_rows_are_uncorrelated():
    keep = DropoutKey(5, 0).mask(0.5, "m", 0).draw(4000, 32)
    keep = unpack(keep, 32).double() - 0.5
    correlation = (keep.T @ keep) / (0.25 * len(keep))
    assert (correlation - torch.eye(32)).abs().max() < 0.1


def test_nothing_dropped_at_zero_and_something_kept_just_below_one():
    assert DropoutKey(0, 0).mask(0.0, "m", 0).scale_for(torch.ones(10, 10)).all()
    assert DropoutKey(0, 0).mask(0.999999, "m", 0).scale_for(torch.ones(400, 400)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropping_by_bits_equals_multiplying_by_the_mask(dtype):
    x = torch.randn(9, 21).to(dtype)
    x[0, 0] = float("nan")
    mask = DropoutKey(0, 0).mask(0.4, "m", 0)
    by_bits = kept(x, mask.draw(*x.shape)) * mask.scale
    torch.testing.assert_close(by_bits[1:], (x * mask.scale_for(x))[1:])
    assert by_bits.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (0, 4), (5, 31), (7, 32), (300, 577)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
def test_the_kernels_draw_and_keep_what_the_plain_twins_do(shape, p):
    mask = DropoutKey(3, 9, first_row=11).mask(p, "m", 2)
    bits = mask.draw(*shape)
    assert torch.equal(bits, mask.draw_reference(*shape))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, onto = torch.randn(2, *shape).to(dtype)
        assert torch.equal(kept(x, bits), kept_reference(x, bits))
        expected = onto + kept_reference(x, bits)
        assert torch.equal(kept(x, bits, onto=onto), expected)
