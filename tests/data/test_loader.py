"""The step sampler: every example once an epoch, resumable, sharded without overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.loader import StepSampler
from deltaw.errors import UserError

sizes = st.integers(1, 60)


@given(num_examples=sizes, per_step=sizes, seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_each_example_once_an_epoch(num_examples: int, per_step: int, seed: int, epochs: int) -> None:
    sampler = StepSampler(num_examples, per_step, seed, epochs=epochs)
    assert sampler.num_steps == epochs * sampler.steps_per_epoch
    for epoch in range(epochs):
        steps = [step for step in range(sampler.num_steps) if sampler.epoch_of(step) == epoch]
        batches = [sampler.indices(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(num_examples))
        assert all(len(batch) == min(per_step, num_examples) for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= per_step


@given(num_examples=sizes, per_step=sizes, num_shards=st.integers(1, 7))
def test_shards_are_disjoint_and_together_the_step(num_examples: int, per_step: int, num_shards: int) -> None:
    whole = StepSampler(num_examples, per_step, 3, max_steps=4)
    shards = [StepSampler(num_examples, per_step, 3, None, 4, shard, num_shards) for shard in range(num_shards)]
    for step in range(4):
        shares = [shard.indices(step) for shard in shards]
        assert sorted(index for share in shares for index in share) == sorted(whole.indices(step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_resuming_needs_only_the_step() -> None:
    first = StepSampler(23, 4, seed=7, max_steps=40)
    run = [first.indices(step) for step in range(40)]
    second = StepSampler(23, 4, seed=7, max_steps=40)
    assert [second.indices(step) for step in reversed(range(40))] == run[::-1]


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(StepSampler(50, 50, seed, epochs=2).indices(step)) for seed in (0, 1, 2**70) for step in (0, 1)}
    assert len(orders) == 6


def test_the_first_limit_wins() -> None:
    assert StepSampler(10, 4, 0, epochs=2, max_steps=5).num_steps == 5
    assert StepSampler(10, 4, 0, epochs=1, max_steps=5).num_steps == 3


def test_order_is_pinned() -> None:
    """A change here breaks resuming from every existing checkpoint."""
    assert StepSampler(8, 8, seed=0, epochs=1).indices(0) == [3, 6, 4, 0, 7, 5, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0, 1), "num_examples is 0"),
        ((5, 0, 0, 1), "examples_per_step is 0"),
        ((5, 1, -1, 1), "seed is -1"),
        ((5, 1, 0), "neither epochs nor max_steps"),
        ((5, 1, 0, 0), "epochs is 0"),
        ((5, 1, 0, None, 0), "max_steps is 0"),
        ((5, 1, 0, 1, None, 2, 2), "shard is 2, expected 0 to 1"),
    ],
)
def test_nonsense_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepSampler(*arguments)


@pytest.mark.parametrize("step", [-1, 3])
def test_step_out_of_range(step: int) -> None:
    with pytest.raises(IndexError, match="outside of 0 to 2"):
        StepSampler(5, 2, 0, epochs=1).indices(step)
