"""The demo, made short: the same code on a handful of tickets. The real one is `make demo`."""

import json

import pytest

from deltaw.cli import demo, main

KEYS = {
    "exact_match_before", "exact_match_after", "eval_loss_before", "eval_loss_after", "seconds", "peak_rss_bytes",
    "adapter_bytes", "base_bytes", "compared",
}  # fmt: skip


@pytest.mark.real
def test_demo_prints_one_object_keeps_the_run_and_refuses_to_replace_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "NUM_TRAIN", 12)
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
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
    assert "already holds a run" in capsys.readouterr().err
