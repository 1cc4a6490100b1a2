"""Chunked cross-entropy over a frozen head against its plain twin."""

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops import loss
from deltaw.ops.frozen import DenseWeight
from deltaw.ops.loss import cross_entropy_reference, frozen_cross_entropy

S, H, V = 13, 6, 29


def _case(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, H, generator=g, dtype=dtype).requires_grad_()
    head = DenseWeight(torch.randn(V, H, generator=g, dtype=dtype))
    return hidden, head, torch.randint(V, (S,), generator=g), torch.randn(V, generator=g, dtype=dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_equals_plain_twin_whatever_the_chunk(monkeypatch, rows_per_chunk, with_bias):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * rows_per_chunk)
    hidden, head, targets, bias = _case()
    bias = bias if with_bias else None
    ours, twin = frozen_cross_entropy(hidden, head, targets, bias), cross_entropy_reference(hidden, head, targets, bias)
    torch.testing.assert_close(ours, twin, check_dtype=False)
    mine, theirs = torch.autograd.grad(3 * ours, hidden), torch.autograd.grad(3 * twin, hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    hidden, head, targets, _ = _case()
    assert gradcheck(lambda h: frozen_cross_entropy(h, head, targets), [hidden])


def test_no_rows_give_a_finite_loss_of_zero_and_no_gradient():
    hidden, head, _, _ = _case()
    value = frozen_cross_entropy(hidden[:0], head, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_huge_logits_stay_finite():
    hidden, head, targets, _ = _case(torch.float32)
    value = frozen_cross_entropy(hidden * 1e4, head, targets)
    value.backward()
    assert value.isfinite() and hidden.grad.isfinite().all()


def test_evaluation_forms_no_gradient():
    hidden, head, targets, _ = _case()

    class NoTranspose(DenseWeight):
        def multiply_transposed(self, dy_TN):
            raise AssertionError("formed a gradient in evaluation")

    with torch.no_grad():
        frozen_cross_entropy(hidden, NoTranspose(head.weight), targets)
