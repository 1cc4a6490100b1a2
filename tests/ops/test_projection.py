"""Groups of projections on one input, kept or computed again: against their plain twin, and autograd's finite steps."""

import copy

import pytest
import torch
from torch.autograd import gradcheck

from deltaw.ops.adapted import Projection, Segment, adapted_group, adapted_group_reference
from deltaw.ops.dropout import DropoutKey
from deltaw.ops.frozen import DenseWeight
from deltaw.ops.norm import RmsNorm
from deltaw.ops.projection import joint
from deltaw.ops.source import Gated, Itself, Normed

T, K = 9, 6


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SOURCES = {
    "itself": (lambda dtype: Itself(), 1),
    "norm": (lambda dtype: Normed(RmsNorm(_rand(K, seed=50, dtype=dtype), 1e-5)), 1),
    "gemma's norm": (lambda dtype: Normed(RmsNorm(_rand(K, seed=50, dtype=dtype), 1e-5, adds_one=True)), 1),
    "silu": (lambda dtype: Gated("silu"), 2),
    "gelu": (lambda dtype: Gated("gelu_tanh"), 2),
}
GROUPS = {
    "base alone": [[], []],
    "joint": [[dict(rank=3)], [dict(rank=1)], [dict(rank=4)]],
    "one of three": [[], [dict(rank=2)], []],
    "joint with dora": [[dict(rank=3, dora=True)], [dict(rank=2)]],
    "dropout": [[dict(rank=3, p=0.4)], [dict(rank=2, p=0.4)]],
    "dropout in one": [[dict(rank=3, p=0.4)], [dict(rank=2)]],
    "a start": [[dict(rank=3, start=True)], [dict(rank=2, start=True, p=0.3)]],
    "segments": [[dict(rank=2, rows=(0, 4)), dict(rank=3, rows=(5, 9))], [dict(rank=2, rows=(0, 4), dora=True)]],
    "no rows": [[dict(rank=2, rows=(3, 3))], [dict(rank=2)]],
}
each_source = pytest.mark.parametrize("source", SOURCES)
each_group = pytest.mark.parametrize("group", GROUPS)


def _projection(i, segments, dtype, *, bias, factors=None):
    outputs, made = 4 + i, []
    for j, given in enumerate(segments):
        s = dict(rows=(0, T), dora=False, p=0.0, start=False) | given
        seed, own = 100 * i + 10 * j + 1, factors or dtype
        scale = (_rand(outputs, seed=seed + 2).abs() + 0.5).to(own).requires_grad_()
        start = _rand(2, K, seed=seed + 3, dtype=own), _rand(outputs, 2, seed=seed + 4, dtype=own)
        made.append(
            Segment(
                rows=slice(*s["rows"]),
                a_RK=_rand(s["rank"], K, seed=seed, dtype=own).requires_grad_(),
                b_NR=_rand(outputs, s["rank"], seed=seed + 1, dtype=own).requires_grad_(),
                scaling=0.5 + i,
                column_scale_N=scale if s["dora"] else None,
                mask=DropoutKey(3, 4).mask(s["p"], f"m{i}", s["rows"][0]) if s["p"] else None,
                start=start if s["start"] else None,
            )
        )
    b = _rand(outputs, seed=900 + i, dtype=dtype).requires_grad_() if bias else None
    return Projection(DenseWeight(_rand(outputs, K, seed=800 + i, dtype=dtype)), tuple(made), b)


def _case(source, group, dtype=torch.float64, *, bias=True, factors=None):
    make, count = SOURCES[source]
    inputs = [_rand(T, K, seed=i, dtype=dtype).requires_grad_() for i in range(count)]
    projections = [_projection(i, s, dtype, bias=bias, factors=factors) for i, s in enumerate(GROUPS[group])]
    leaves = [*inputs, *(t for p in projections for t in p.tensors if t is not None)]
    return inputs, make(dtype), projections, leaves


def _gradients(ys, leaves):
    loss = sum((y.double() * _rand(*y.shape, seed=70 + i)).sum() for i, y in enumerate(ys))
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _assert_equal(inputs, source, projections, leaves, **tolerance):
    ours, twins = adapted_group(inputs, source, projections), adapted_group_reference(inputs, source, projections)
    for mine, theirs in zip(ours, twins, strict=True):
        assert mine.dtype == inputs[0].dtype
        torch.testing.assert_close(mine, theirs, **tolerance)
    for mine, theirs, leaf in zip(_gradients(ours, leaves), _gradients(twins, leaves), leaves, strict=True):
        assert mine is None or mine.dtype == leaf.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


@each_group
@each_source
def test_equals_plain_twin_in_float64(source, group):
    _assert_equal(*_case(source, group))


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "no rows"])  # nothing depends on it
@each_source
def test_gradcheck(source, group):
    inputs, made, projections, leaves = _case(source, group)

    def run(*leaves):
        given = iter(leaves)
        again = [next(given) for _ in inputs]
        rebuilt = []
        for p in projections:
            bias, segments = next(given), []
            for s in p.segments:
                a, b = next(given), next(given)
                scale = None if s.column_scale_N is None else next(given)
                segments.append(Segment(s.rows, a, b, s.scaling, scale, s.mask, s.start))
            rebuilt.append(Projection(p.weight, tuple(segments), bias))
        return adapted_group(again, made, rebuilt)

    assert gradcheck(run, leaves)


@each_group
@each_source
def test_equals_plain_twin_under_every_instruction_set(level, source, group):
    _assert_equal(*_case(source, group, torch.float32), atol=1e-4, rtol=1e-4)


@each_source
def test_bfloat16_with_float32_masters(level, source):
    """Each side rounds in its own places: they are as far from each other as from the truth."""
    *case, leaves = _case(source, "joint", torch.bfloat16, factors=torch.float32)
    *exact, exact_leaves = _case(source, "joint")
    ours, truth = adapted_group(*case), adapted_group_reference(*exact)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < 0.02 * true.norm()
    for mine, true, leaf in zip(_gradients(ours, leaves), _gradients(truth, exact_leaves), leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert (mine - true).norm() < 0.03 * true.norm()


def test_float16_takes_torchs_operations(level):
    *case, leaves = _case("norm", "joint", torch.float16)
    *exact, _ = _case("norm", "joint")
    for mine, true in zip(adapted_group(*case), adapted_group_reference(*exact), strict=True):
        assert mine.dtype == torch.float16 and (mine - true).norm() < 0.01 * true.norm()
    assert all(g.dtype == torch.float16 for g in _gradients(adapted_group(*case), leaves))


@pytest.mark.parametrize(
    ("group", "is_joint"), [("joint", True), ("joint with dora", True), ("one of three", False), ("dropout", False),
                            ("dropout in one", False), ("a start", False), ("segments", False)]
)  # fmt: skip
def test_what_has_its_factors_joined(group, is_joint):
    inputs, _, projections, _ = _case("itself", group)
    assert (joint(projections, inputs[0]) is not None) == is_joint


@each_source
def test_rows_of_many_sizes(level, source):
    make, count = SOURCES[source]
    for rows in (0, 1, 15, 16, 17, 33, 70):
        inputs = [_rand(rows, K, seed=i, dtype=torch.float32).requires_grad_() for i in range(count)]
        weight = DenseWeight(_rand(5, K, seed=3, dtype=torch.float32))
        a, b = (_rand(*s, seed=4, dtype=torch.float32).requires_grad_() for s in ((2, K), (5, 2)))
        projections = [Projection(weight, (Segment(slice(0, rows), a, b, 2.0),))] * 2
        _assert_equal(inputs, make(torch.float32), projections, [*inputs, a, b], atol=1e-4, rtol=1e-4)


@each_source
def test_strides_do_not_matter(level, source):
    make, count = SOURCES[source]
    wide = [_rand(2 * K, 2 * T, seed=i, dtype=torch.float32) for i in range(count)]
    inputs = [w.T[::2, ::2].requires_grad_() for w in wide]
    _, _, projections, leaves = _case("itself", "joint", torch.float32)
    _assert_equal(inputs, make(torch.float32), projections, [*inputs, *leaves[1:]], atol=1e-4, rtol=1e-4)


@each_source
def test_only_what_is_asked_for_is_formed(source):
    """Frozen inputs cost no product backward; frozen factors get no gradient, their inputs do."""

    class NoTranspose(DenseWeight):
        def multiply_transposed(self, dy_TN):
            raise AssertionError("formed a gradient that nobody asked for")

    inputs, made, projections, leaves = _case(source, "joint")
    frozen = [x.detach() for x in inputs]
    blind = [Projection(NoTranspose(p.weight.weight), p.segments, p.bias_N) for p in projections]
    factors = leaves[len(inputs) :]
    for mine, theirs in zip(
        _gradients(adapted_group(frozen, made, blind), factors),
        _gradients(adapted_group_reference(frozen, made, projections), factors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    for t in factors:
        t.requires_grad_(False)
    _assert_equal(inputs, made, projections, inputs)
    assert not any(y.requires_grad for y in adapted_group(frozen, made, projections))


def test_an_output_that_nobody_uses():
    inputs, made, projections, leaves = _case("norm", "joint")
    ours, twins = (f(inputs, made, projections)[1:2] for f in (adapted_group, adapted_group_reference))
    for mine, theirs in zip(_gradients(ours, leaves), _gradients(twins, leaves), strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_a_factor_changed_between_forward_and_backward_is_noticed():
    inputs, made, projections, leaves = _case("norm", "joint")
    loss = sum(y.sum() for y in adapted_group(inputs, made, projections))
    with torch.no_grad():
        projections[0].segments[0].a_RK.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("source", ["itself", "silu"])  # under autocast norms are left to the model's own layers
def test_autocast_casts_the_input_and_no_more(source):
    inputs, made, projections, leaves = _case(source, "joint", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = adapted_group(inputs, made, projections)
    cast = [x.detach().bfloat16() for x in inputs]
    for mine, theirs in zip(ours, adapted_group(cast, copy.copy(made), projections), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs)
    assert [g.dtype for g in _gradients(ours, leaves)] == [t.dtype for t in leaves]
