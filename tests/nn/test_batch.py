"""Which rows belong to whom."""

import pytest

from deltaw.nn.batch import Batch, batch, checkpoint_context, current_batch


def _runs(adapters, num_rows, lengths=None):
    return [(s.start, s.stop, name) for s, name in Batch(adapters=adapters, lengths=lengths).runs(num_rows)]


def test_neighbours_with_one_adapter_are_one_run():
    assert _runs(("a", "a", "__base__", "b"), 8) == [(0, 4, "a"), (4, 6, "__base__"), (6, 8, "b")]
    assert _runs(("a",), 5) == [(0, 5, "a")]
    assert _runs(("a", "b", "a"), 3) == [(0, 1, "a"), (1, 2, "b"), (2, 3, "a")]


def test_examples_laid_end_to_end_have_their_own_lengths():
    assert _runs(("a", "a", "b"), 10, (2, 5, 3)) == [(0, 7, "a"), (7, 10, "b")]


@pytest.mark.parametrize(
    ("adapters", "num_rows", "lengths"),
    [(("a", "b"), 7, None), (("a", "b"), 10, (4, 5)), (("a", "b"), 9, (4, 4, 1)), ((), 3, None), (("a", "b"), 1, None)],
)
def test_rows_that_cannot_be_shared_out_are_refused(adapters, num_rows, lengths):
    with pytest.raises(ValueError, match=f"has {len(adapters)} names, which {num_rows} rows"):
        _runs(adapters, num_rows, lengths)


def test_facts_nest_and_recomputation_sees_those_of_its_forward():
    outer, inner = Batch(lengths=(1,)), Batch(lengths=(2,))
    with batch(outer):
        with batch(inner):
            _, again = checkpoint_context()
            assert current_batch() is inner
        assert current_batch() is outer
    assert current_batch() is None
    with again:
        assert current_batch() is inner
    assert current_batch() is None
