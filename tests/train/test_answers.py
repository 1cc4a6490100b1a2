"""Generated answers are judged against what was wanted."""

import pytest

from deltaw.data.formats import load_examples
from deltaw.errors import UserError
from deltaw.nn.load import load_base
from deltaw.train import answers as module
from deltaw.train.answers import answers, exact_match


def _ask(monkeypatch, tiny_base, rows, said, **given):
    model, tokenizer = load_base(tiny_base, dtype="float32")
    texts = iter(said)

    def generate(model, prompts, sampling, progress=None):
        assert all(prompts)
        return [tokenizer(next(texts))["input_ids"] for _ in prompts]

    monkeypatch.setattr(module, "generate", generate)
    return answers(model, tokenizer, load_examples(rows), **given)


def _chat(answer):
    turns = [("system", "Be brief."), ("user", "first"), ("assistant", "no"), ("user", "last"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_exact_matches_are_counted(monkeypatch, tiny_base):
    found = _ask(monkeypatch, tiny_base, [_chat(" yes\n"), _chat("yes"), _chat("yes")], ["yes", " yes ", "yes!"])
    assert [(a.prompt, a.wanted, a.got, a.is_match) for a in found] == [
        ("last", "yes", "yes", True), ("last", "yes", "yes", True), ("last", "yes", "yes!", False),
    ]  # fmt: skip
    assert exact_match(found) == pytest.approx(2 / 3)
    assert exact_match([]) == 0


def test_json_answers_and_prompts_to_show(monkeypatch, tiny_base):
    said = ['{"b": 2, "a": 1}\nand more', '{"a": 1, "b": true}']
    found = _ask(monkeypatch, tiny_base, [_chat('{"a": 1, "b": 2}')] * 2, said, match="json", shown=["one", "two"])
    assert [(a.prompt, a.is_match) for a in found] == [("one", True), ("two", False)]


def test_what_has_no_answer_to_compare_with_is_refused(monkeypatch, tiny_base):
    with pytest.raises(UserError, match="a text has no prompt"):
        _ask(monkeypatch, tiny_base, [{"text": "just text"}], [])
    with pytest.raises(
        UserError, match=r"1 of 2 wanted answers are no JSON object \(first: list:item 2\); compare as text"
    ):
        _ask(monkeypatch, tiny_base, [_chat("{}"), _chat("yes")], [], match="json")


def test_a_completion_is_asked_as_it_stands(monkeypatch, tiny_base):
    (found,) = _ask(monkeypatch, tiny_base, [{"prompt": "1 + 1 =", "completion": " 2"}], [" 2"])
    assert (found.prompt, found.wanted, found.is_match) == ("1 + 1 =", "2", True)
