"""``deltaw adapter card``: measured, written, and never over somebody else's."""

import shutil

import pytest

pytestmark = pytest.mark.real


def test_card(run, adapters, data, tmp_path, only_json):
    folder = tmp_path / "mine"
    shutil.copytree(adapters["first"], folder)
    code, text, err = run("adapter", "card", folder, "--eval-data", data, "--max-length", 99, "--tokens", 99, "--json")
    assert code == 0, err
    said = only_json(text)
    before, after = said["measured"]["text"]
    assert before != after and said["measured"]["text_tokens"] == 99
    assert said["measured"]["task"][0] != said["measured"]["task"][1]
    assert (folder / "README.md").read_text() == said["card"]
    code, text, _ = run("adapter", "card", folder, "--skip-measuring")
    assert (code, "written: " in text) == (0, True)
    assert "## Figures" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    code, _, err = run("adapter", "card", folder, "--skip-measuring")
    assert (code, "somebody else" in err) == (2, True)
    assert run("adapter", "card", folder, "--skip-measuring", "--out", tmp_path / "card.md")[0] == 0
    assert (folder / "README.md").read_text() == "mine"
    assert run("adapter", "card", folder, "--skip-measuring", "--overwrite")[0] == 0
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_training_leaves_a_card(run, data, tiny_base, tmp_path):
    args = (
        "train",
        "--model",
        tiny_base,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--max-steps",
        2,
        "--max-length",
        200,
    )
    assert run(*args)[0] == 0
    text = (tmp_path / "run" / "README.md").read_text()
    assert "chats.jsonl" in text and "| steps | 2 |" in text
    assert run(*args, "--overwrite")[0] == 0
    (tmp_path / "run" / "README.md").write_text("mine")
    assert run(*args, "--overwrite")[0] == 0
    assert (tmp_path / "run" / "README.md").read_text() == "mine"


def test_mistakes(run, adapters, data, tmp_path):
    for flags, said in (
        (("--out", tmp_path), "a folder"),
        (("--skip-measuring", "--eval-data", data), "leave one out"),
        (("--tokens", 0), "expected at least 2"),
        (("--eval-data", tmp_path / "nothing.jsonl"), "nothing.jsonl"),
    ):
        code, _, err = run("adapter", "card", adapters["first"], *flags)
        assert (code, said in err) == (2, True), err
