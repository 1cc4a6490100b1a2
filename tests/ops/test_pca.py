"""Incremental principal components equal those of all rows at once."""

import pytest
import torch

from deltaw.ops.pca import IncrementalPca, leading_directions


def _rows(num, width=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9))).Q
    return torch.randn(num, width, generator=g) * 0.7 ** torch.arange(width) @ turn + 3


def _exact(rows, num):
    centred = rows.double() - rows.double().mean(0)
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    return s[:num], vt[:num], s.square() / s.square().sum()


@pytest.mark.parametrize("sizes", [(600,), (200, 200, 200), (1, 2, 3, 94, 500), (6,) * 100], ids=str)
def test_equals_all_rows_at_once(sizes):
    rows = _rows(600)
    pca = IncrementalPca(6)
    for batch in rows.split(sizes):
        pca.add(batch)
    assert pca.num_rows == 600 and pca.num_waiting == 0
    s, vt, part = _exact(rows, 6)
    torch.testing.assert_close(pca.singular_C.double(), s, atol=0, rtol=0.05)
    torch.testing.assert_close(pca.explained_C.double(), part[:6], atol=0.01, rtol=0.05)
    assert ((pca.components_CK.double() * vt).sum(1).abs()[:3] > 0.99).all()


def test_the_mean_may_move():
    rows = torch.cat([_rows(100), _rows(100, seed=1) + 5])
    pca = IncrementalPca(4)
    for batch in rows.split(100):
        pca.add(batch)
    s, vt, _ = _exact(rows, 4)
    torch.testing.assert_close(pca.singular_C.double()[0], s[0], atol=0, rtol=1e-3)
    assert (pca.components_CK[0].double() @ vt[0]).abs() > 0.999


def test_cosines_tell_when_nothing_turns_any_more():
    pca = IncrementalPca(4)
    pca.add(_rows(200))
    assert not pca.cosines_C.any()
    pca.add(_rows(200))
    assert (pca.cosines_C > 0.999).all()
    pca.add(100 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0)))
    assert pca.cosines_C.abs().min() < 0.9


def test_few_rows_wait():
    pca = IncrementalPca(6)
    pca.add(_rows(5))
    assert (pca.num_rows, pca.num_waiting) == (0, 5)
    pca.add(_rows(0))
    pca.add(_rows(1, seed=1).bfloat16())
    assert (pca.num_rows, pca.num_waiting) == (6, 0)
    assert pca.components_CK.shape == (6, 40) and pca.components_CK.dtype == torch.float32


def test_iteration_finds_what_the_exact_decomposition_finds():
    rows = _rows(300, width=60)
    s, v = leading_directions(rows, 5)
    exact_s, exact_v = torch.linalg.svd(rows)[1:]
    torch.testing.assert_close(s, exact_s[:5], atol=0, rtol=1e-3)
    assert ((v * exact_v[:5]).sum(1).abs() > 0.999).all()
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


def test_torch_s_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    leading_directions(_rows(300, width=60), 5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_rows_that_are_not_finite(bad):
    rows = _rows(10)
    rows[3, 3] = bad
    with pytest.raises(ValueError, match="infinities or nans"):
        IncrementalPca(4).add(rows)
