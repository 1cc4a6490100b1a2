"""The demo, made short: the same code on a handful of tickets. The real one is `make demo`."""

import json

import pytest

from deltaw.cli import demo, main

KEYS = {
    "exact_match_before", "exact_match_after", "eval_loss_before", "eval_loss_after", "seconds", "peak_rss_bytes",
    "adapter_bytes", "base_bytes", "compared",
}  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """A demo of three steps."""
    monkeypatch.setattr(demo, "NUM_TRAIN", 12)
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)


@pytest.mark.real
def test_demo_prints_one_object_keeps_the_run_and_refuses_to_replace_it(short, monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert len(result["compared"]) == 4
    assert {"prompt", "wanted", "base", "adapter"} <= result["compared"][0].keys()
    assert (out / "adapter_model.safetensors").stat().st_size == result["adapter_bytes"]
    assert json.loads((out / "summary.json").read_text())["steps"] == 3

    assert main(["demo", "--out", str(out)]) == 2
    assert "already holds a run (summary.json); add --resume or --overwrite" in capsys.readouterr().err

    # A finished run is shown once more: nothing is trained, and the answers are the same.
    monkeypatch.setattr("deltaw.train.loop.Job.run", lambda self: pytest.fail("trained again"))
    assert main(["demo", "--json", "--out", str(out), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["compared"] == result["compared"] and again["eval_loss_after"] == result["eval_loss_after"]


@pytest.mark.real
def test_an_interrupted_demo_says_how_to_go_on(short, monkeypatch, tmp_path, capsys):
    from deltaw.cli import train

    monkeypatch.setattr(demo, "_answers", lambda *_: [])
    monkeypatch.setattr(train.Interrupts, "should_stop", lambda self: True)
    out = tmp_path / "my run"
    assert main(["demo", "--out", str(out)]) == 130
    err = capsys.readouterr().err
    assert f"Saved. Go on with: deltaw demo --out '{out}' --resume" in err
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"


def test_demo_writes_over_nobodys_data(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "mine"}\n')
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds a train.jsonl that is not the demo's; give another folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
