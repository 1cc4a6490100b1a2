"""Chat pairs out of the standard library: split by module, varied in length, the same every time."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "python_docs.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_docs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


python_docs = load()


@pytest.fixture(scope="module")
def built():
    return python_docs.build()


def group(example):
    top = example["module"].split(".")[0]
    return example["module"] if top == "topics" else top


def docs(examples):
    return [example["messages"][1]["content"] for example in examples]


def test_some_thousands_of_examples_a_tenth_held_out(built):
    train, heldout = built
    assert 3_000 <= len(train) + len(heldout) <= 6_500
    assert 0.08 <= len(heldout) / (len(train) + len(heldout)) <= 0.12


def test_heldout_modules_and_topics_are_new(built):
    train, heldout = ({group(example) for example in split} for split in built)
    assert train.isdisjoint(heldout)
    assert len(heldout) >= 10
    assert any(name.startswith("topics.") for name in heldout)


def test_no_text_twice(built):
    everything = docs(built[0]) + docs(built[1])
    assert len(set(everything)) == len(everything)


def test_shape_of_an_example(built):
    for example in built[0] + built[1]:
        assert [turn["role"] for turn in example["messages"]] == ["user", "assistant"]
        question, text = (turn["content"] for turn in example["messages"])
        assert example["module"].removeprefix("topics.") in question or example["module"].startswith("topics.")
        assert len(question) < 400
        assert text == text.strip()
        assert python_docs.MIN_CHARS <= len(text) <= python_docs.MAX_CHARS


def test_lengths_spread(built):
    lengths = sorted(map(len, docs(built[0])))
    assert lengths[len(lengths) // 10] < 60
    assert lengths[len(lengths) * 9 // 10] > 400
    assert lengths[-20] > 3_000


def test_nothing_of_this_process_leaks_in(built):
    questions = [example["messages"][0]["content"] for example in built[0] + built[1]]
    assert not [text for text in questions if re.search(r"0x[0-9a-f]{6}|<[a-z_]+ ", text)]
    assert "Initialize self.  See help(type(self)) for accurate signature." not in docs(built[0])


def test_questions_are_varied_and_know_signatures(built):
    questions = [example["messages"][0]["content"] for example in built[0] + built[1]]
    assert len({" ".join(text.split()[:3]) for text in questions}) >= 20
    assert sum("(text, width" in text for text in questions) >= 1


def test_same_seed_same_examples(built):
    assert python_docs.build() == built
    assert python_docs.build(seed=1)[1] != built[1]


def test_limit_thins_out_and_moves_nothing(built):
    train, heldout = python_docs.build(limit=100)
    assert len(train) == 90
    assert len(heldout) == 10
    assert {group(example) for example in train}.isdisjoint(group(example) for example in built[1])
    assert {json.dumps(example) for example in train} <= {json.dumps(example) for example in built[0]}
    assert [len(split) for split in python_docs.build(limit=2)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        python_docs.build(limit=1)


def test_long_answers_end_at_a_paragraph():
    paragraph = "word " * 100
    text = "\n\n".join([paragraph.strip()] * 20)
    cut = python_docs._cut(text)
    assert len(cut) <= python_docs.MAX_CHARS
    assert set(cut.split("\n\n")) == {paragraph.strip()}
    assert len(python_docs._cut("x" * 10_000)) == python_docs.MAX_CHARS
    assert python_docs._cut("short") == "short"


def test_importing_prints_nothing(capfd):
    assert python_docs._imported("this") is not None
    assert python_docs._imported("no_such_module") is None
    assert capfd.readouterr() == ("", "")


def test_command_writes_both_files_and_reports(tmp_path, capsys):
    assert python_docs.main(["--out", str(tmp_path / "docs"), "--limit", "200", "--seed", "5"]) == 0
    report = capsys.readouterr().out
    assert "train: 180 examples" in report
    assert "heldout: 20 examples" in report
    assert "characters: p0" in report
    for name, examples in zip(("train", "heldout"), python_docs.build(200, 5), strict=True):
        lines = (tmp_path / "docs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == examples


def test_another_process_writes_the_same(tmp_path):
    # Two fresh processes: in this one, other tests' packages have changed the standard library's own functions.
    for name in ("first", "second"):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / name), "--limit", "300"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stderr == ""
    first, second = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("first", "second"))
    assert first == second and first.count(b"\n") > 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out"),
        (["--out", "{file}"], "cannot write"),
        (["--out", "{file}/below"], "cannot write"),
        (["--out", "{folder}", "--limit", "0"], "'0'"),
        (["--out", "{folder}", "--limit", "many"], "'many'"),
        (["--out", "{folder}", "--seed", "x"], "--seed"),
        (["--out", "{folder}", "--colour"], "--colour"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, said, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    filled = [text.format(file=tmp_path / "file", folder=tmp_path / "out") for text in arguments]
    with pytest.raises(SystemExit) as stop:
        python_docs.main(filled)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error
    assert error.count("\n") == 1
