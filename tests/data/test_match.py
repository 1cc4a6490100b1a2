"""Answers are untrusted text: judged right or wrong in bounded time, never an error."""

import time

import pytest

from deltaw.data.match import MAX_ANSWER_CHARS, json_match, text_match


def test_texts_match_but_for_white_space_around_them():
    assert text_match("yes\n", "  yes")
    assert not text_match("yes", "Yes")
    assert not text_match("a b", "a  b")


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ('{"a": 1, "b": [1, 2]}', '{ "b":[1,2],"a":1 }'),
        ('{"a": 1}', '{"a": 1}\nI hope this helps!'),
        ('{"a": 1}', '\n\n {"a": 1.0} \n'),
        ('{"a": 100}', '{"a": 1e2}'),
        ('{"a": "é"}', '{"a": "\\u00e9"}'),
        ('{\n  "a": {\n    "b": null\n  }\n}', '{"a": {"b": null}}'),
        ('{"a": {"b": null}}', '{\n  "a": {\n    "b": null\n  }\n}'),
        ("{}", "{}"),
    ],
)
def test_json_matches_whatever_the_spelling(wanted, answer):
    assert json_match(wanted, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "", " \n", "yes", '{"a": 2}', '{"a": 1, "b": 2}', "{}", '{"a": "1"}', '{"a": [1]}', '[{"a": 1}]', "1", "null",
        '{"a": true}', 'Sure: {"a": 1}', '{"a": 1} {"a": 1}', '```json\n{"a": 1}\n```', '{"a": 1', '{"A": 1}',
        '{"a": 1, "a": 1}', '{"a": 2, "a": 1}', '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', "{'a': 1}",
        '{"a": 1,}', '{"a": 01}', '{"a": ١}', '{"a": 1}\x00', "\ud800", '{"a": ' + "1" * 5000 + "}",
    ],
)  # fmt: skip
def test_other_answers_are_wrong(answer):
    assert not json_match('{"a": 1}', answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"a":' * 100_000, "[" * 1_000_000, '{"a": ' + "[" * 3_000 + "]" * 3_000 + "}",
        '{"a": "' + "x" * 10_000_000 + '"}', '{"a": "' + "x" * 3_000 + "\n" * 3_000_000,
        '{"a": ' + "9" * 3_900 + "}", '{"a": 1e' + "9" * 3_900 + "}",
        "{" + ", ".join(f'"{i}": {i}' for i in range(300)) + "}", "\n" * 10_000_000 + '{"a": 2}',
    ],
)  # fmt: skip
def test_hostile_answers_are_wrong_and_quick(answer):
    started = time.perf_counter()
    assert not json_match('{"a": 1}', answer)
    assert time.perf_counter() - started < 1


def test_a_nested_answer_against_an_equal_one_never_raises():
    deep = '{"a": ' + "[" * 1_900 + "]" * 1_900 + "}"
    assert json_match(deep, deep) in (True, False)


def test_no_number_stands_for_a_wanted_answer_that_is_no_json():
    assert not json_match("yes", "yes")
    assert not json_match('{"a": NaN}', '{"a": NaN}')
    assert not json_match('{"a": 1e999}', '{"a": 1e998}')
    assert not json_match('{"a": "' + "x" * MAX_ANSWER_CHARS + '"}', '{"a": "' + "x" * MAX_ANSWER_CHARS + '"}')
    assert not json_match('{"a": 9007199254740993}', '{"a": 9007199254740992}')
