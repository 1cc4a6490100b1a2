"""Singular values, cosines and overlaps from factors are those of the dense products that are never formed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.adapters.spectrum import Delta, likeness, rank_for

EXAMPLES = settings(max_examples=40, deadline=None)


@st.composite
def deltas(draw, shape=None, num_experts=None):
    """Factors of any sizes, also with more ranks than dimensions; of unequal scale."""
    outputs, inputs = shape or (draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    experts, rank = num_experts or draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a = torch.randn(experts, rank, inputs, generator=generator, dtype=torch.float64)
    b = torch.randn(experts, outputs, rank, generator=generator, dtype=torch.float64)
    return Delta(a * draw(st.sampled_from([1.0, 1e-3])), b, draw(st.sampled_from([2.0, 0.25, -1.5])))


@st.composite
def pairs(draw):
    shape, experts = (draw(st.integers(2, 9)), draw(st.integers(2, 9))), draw(st.integers(1, 3))
    return draw(deltas(shape, experts)), draw(deltas(shape, experts))


def dense(delta):
    return delta.scaling * (delta.b_ENR @ delta.a_ERK)


@EXAMPLES
@given(deltas())
def test_singular_values_are_those_of_the_dense_product(delta):
    wanted = torch.linalg.svdvals(dense(delta))
    length = min(delta.rank, wanted.shape[1])
    got = delta.singular_values
    torch.testing.assert_close(got[:, :length], wanted[:, :length])
    assert float(got[:, length:].sum()) < 1e-9
    u, s, v = delta.svd()
    torch.testing.assert_close(s, got, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(u * s[:, None] @ v.mT, dense(delta))
    assert delta.norm == pytest.approx(float(dense(delta).norm()))
    if delta.num_experts == 1:
        torch.testing.assert_close(delta.spectrum, got[0])


@EXAMPLES
@given(deltas(), st.floats(0.01, 1))
def test_energy_grows_with_the_rank_and_is_what_was_asked_for(delta, energy):
    kept = [delta.energy_at(k) for k in range(delta.rank + 1)]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == pytest.approx(1)
    rank = delta.rank_for(energy)
    assert delta.energy_at(rank) >= energy - 1e-12
    assert rank == 1 or delta.energy_at(rank - 1) < energy + 1e-12
    a, b = delta.cut(rank)
    lost = float((dense(delta) - delta.scaling * (b @ a)).norm()) ** 2 / delta.norm**2
    assert lost == pytest.approx(1 - delta.energy_at(rank), abs=1e-9)


@EXAMPLES
@given(deltas())
def test_cut_to_full_rank_is_the_identity(delta):
    a, b = delta.cut(delta.rank)
    assert (a.shape, b.shape) == (delta.a_ERK.shape, delta.b_ENR.shape)
    torch.testing.assert_close(delta.scaling * (b @ a), dense(delta))
    assert float(a.norm()) == pytest.approx(float(b.norm()))  # balanced


@EXAMPLES
@given(deltas(), st.integers(0, 2**31))
def test_nothing_depends_on_how_the_product_is_factored(delta, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(delta.rank, delta.rank, generator=generator, dtype=torch.float64) + 4 * torch.eye(delta.rank)
    other = Delta(torch.linalg.solve(mix, delta.a_ERK), delta.b_ENR @ mix, delta.scaling)
    torch.testing.assert_close(other.spectrum, delta.spectrum, atol=1e-9, rtol=1e-7)
    assert other.effective_rank == pytest.approx(delta.effective_rank, rel=1e-5)
    like = likeness(delta, other)
    assert (like.cosine, like.overlap_out, like.overlap_in) == pytest.approx((1, 1, 1), abs=1e-6)


@EXAMPLES
@given(pairs())
def test_likeness_is_that_of_the_dense_products_and_symmetric(pair):
    one, other = pair
    there, back = likeness(one, other), likeness(other, one)
    x, y = dense(one).flatten(), dense(other).flatten()
    assert there.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-9)
    assert there.product == pytest.approx(float(x @ y), abs=1e-9)
    for side in ("cosine", "overlap_out", "overlap_in", "by_chance_out", "cosines_out", "cosines_in"):
        assert getattr(there, side) == pytest.approx(getattr(back, side), abs=1e-9)
    assert -1 <= there.cosine <= 1 and 0 <= there.overlap_out <= 1 + 1e-12 and 0 <= there.overlap_in <= 1 + 1e-12


def test_overlap_of_known_subspaces():
    eye = torch.eye(8, dtype=torch.float64)
    one = Delta(eye[None, :2], eye[None, :, :2], 1.0)  # outputs and inputs 0 and 1
    other = Delta(eye[None, [1, 2, 3]], eye[None][..., [0, 1, 5]], 0.5)  # inputs 1, 2, 3 → outputs 0, 1, 5
    like = likeness(one, other)
    assert (like.overlap_out, like.overlap_in) == pytest.approx((1, 0.5))
    assert (like.by_chance_out, like.by_chance_in) == pytest.approx((3 / 8, 3 / 8))
    assert like.cosines_in == pytest.approx((1, 0)) and like.cosine == pytest.approx(0)
    padded = Delta(torch.cat([one.a_ERK, eye[None, 5:]], 1), torch.nn.functional.pad(one.b_ENR, (0, 3)), 1.0)
    assert likeness(padded, other).overlap_out == pytest.approx(1)  # ranks that are filled up with zeros are none


def test_random_subspaces_overlap_by_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 4, 60, generator=generator) for _ in range(2))
    values = [
        likeness(Delta(x[None], x.T[None], 1.0), Delta(y[None], y.T[None], 1.0)) for x, y in zip(a, b, strict=True)
    ]
    assert sum(v.overlap_in for v in values) / 200 == pytest.approx(values[0].by_chance_in, rel=0.1)


def test_experts_are_cut_together():
    delta = Delta(torch.randn(3, 4, 6), torch.randn(3, 5, 4), 2.0)
    energies = torch.linalg.svdvals(dense(delta)).square()
    assert delta.energy_at(2) == pytest.approx(float(energies[:, :2].sum() / energies.sum()))
    assert float(delta.spectrum.square().sum()) * 3 == pytest.approx(delta.norm**2)


def test_what_never_moved_has_no_direction():
    a, b = torch.randn(1, 4, 6), torch.randn(1, 5, 4)
    zero = Delta(a, torch.zeros_like(b), 2.0)
    start = Delta(torch.cat([a, a], 1), torch.cat([b, -b], 2), 2.0)  # a start of rank 2r, as it is saved
    for still in (zero, start, Delta(a, b, 0.0)):
        assert not still.has_moved
        assert (still.effective_rank, still.rank_for(0.9), still.rank_for(1.0)) == (0, 0, 0)
        assert likeness(still, Delta(a, b, 1.0)).cosine is None
    assert Delta(torch.cat([a, a], 1), torch.cat([b + 1e-6, -b], 2), 2.0).has_moved


def test_effective_rank_counts_equal_directions():
    eye = torch.eye(6)
    assert Delta(eye[None, :3], 4 * eye[None, :, :3], 1.0).effective_rank == pytest.approx(3)
    assert Delta(eye[None, :3], eye[None, :, :3] * torch.tensor([1e3, 1e-6, 1e-6]), 1.0).effective_rank < 1.01


def test_rank_for_knows_ties_and_ends():
    s = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert [rank_for(s, e) for e in (0.1, 4 / 6, 0.67, 5 / 6 + 1e-9, 1.0)] == [1, 1, 2, 3, 3]
    assert rank_for(torch.zeros(3, dtype=torch.float64), 0.5) == 1


def test_entries_that_are_no_numbers_are_seen():
    a, b = torch.randn(1, 2, 3), torch.randn(1, 4, 2)
    assert Delta(a, b, 1.0).is_finite
    assert not Delta(a.index_fill(2, torch.tensor(1), math.nan), b, 1.0).is_finite
    assert not Delta(a, b / 0, 1.0).is_finite
