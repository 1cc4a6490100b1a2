"""Packing: nothing is lost, nothing is doubled, no label crosses a boundary."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.pack import pack
from deltaw.data.render import Tokens
from deltaw.errors import UserError

rows = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12)


def tokens(row: list[tuple[int, bool]]) -> Tokens:
    return Tokens(input_ids=[t for t, _ in row], supervised=[flag for _, flag in row], origin="x:1")


examples = st.lists(rows.map(tokens), max_size=12)


@given(examples=examples, max_tokens=st.integers(1, 40))
def test_end_to_end_in_order(examples: list[Tokens], max_tokens: int) -> None:
    batches = pack(examples, max_tokens)
    ids = [token for batch in batches for token in batch.input_ids_T.tolist()]
    assert ids == [token for example in examples for token in example.input_ids]
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == [len(example.input_ids) for example in examples]
    offset = 0
    for batch in batches:
        assert batch.row_offset == offset
        assert sum(batch.lengths) == len(batch.input_ids_T)
        assert len(batch.input_ids_T) <= max_tokens or len(batch.lengths) == 1
        assert batch.position_ids_T.tolist() == [t for length in batch.lengths for t in range(length)]
        offset += len(batch.input_ids_T)
    for batch, following in itertools.pairwise(batches):  # greedy: the next would not have fitted
        assert sum(batch.lengths) + following.lengths[0] > max_tokens


@given(examples=examples, max_tokens=st.integers(1, 40))
def test_each_target_once_whatever_the_layout(examples: list[Tokens], max_tokens: int) -> None:
    expected, start = [], 0
    for example in examples:
        for t in range(1, len(example.input_ids)):
            if example.supervised[t]:
                expected.append((start + t - 1, example.input_ids[t]))
        start += len(example.input_ids)
    found = []
    for batch in pack(examples, max_tokens):
        rows = (batch.target_rows_S + batch.row_offset).tolist()
        found += list(zip(rows, batch.targets_S.tolist(), strict=True))
        assert batch.num_supervised == len(rows)
    assert found == expected


@given(examples=examples, max_tokens=st.integers(1, 40))
def test_no_label_crosses_a_boundary(examples: list[Tokens], max_tokens: int) -> None:
    for batch in pack(examples, max_tokens):
        last_rows = {sum(batch.lengths[: i + 1]) - 1 for i in range(len(batch.lengths))}
        assert not last_rows & set(batch.target_rows_S.tolist())


def test_by_hand() -> None:
    a = Tokens(input_ids=[5, 6, 7], supervised=[False, False, True], origin="a")
    b = Tokens(input_ids=[8, 9], supervised=[True, True], origin="b")  # its first token is nobody's target
    (batch,) = pack([a, b], 5)
    assert batch.target_rows_S.tolist() == [1, 3]
    assert batch.targets_S.tolist() == [7, 9]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert {t.dtype for t in (batch.input_ids_T, batch.position_ids_T, batch.target_rows_S)} == {torch.int64}


def test_long_example_stands_alone() -> None:
    long = Tokens(input_ids=[1] * 9, supervised=[False] * 9, origin="a")
    short = Tokens(input_ids=[2], supervised=[True], origin="b")
    assert [batch.lengths for batch in pack([short, long, short, short], 4)] == [(1,), (9,), (1, 1)]
    assert pack([], 4) == []
    assert pack([short], 4)[0].num_supervised == 0


def test_max_tokens_below_one() -> None:
    with pytest.raises(UserError, match="--micro-batch-tokens 0 holds no example; expected at least 1"):
        pack([], 0)
