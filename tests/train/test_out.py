"""The folder of a run: which checkpoints stay, and that nothing of anybody's is lost."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltaw.errors import UserError
from deltaw.nn.load import load_base
from deltaw.train import prepare as module
from deltaw.train import run
from deltaw.train.evaluate import mean_loss
from deltaw.train.forward import examine
from deltaw.train.prepare import prepare
from deltaw.train.run import run_training

# --- checkpoints ---


def test_the_newest_two_checkpoints_and_the_best_are_kept(options, monkeypatch, checkpoints_of):
    from deltaw.train import loop

    losses = iter([9, 5, 6, 7, 8, 9, 10])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(losses), 10))
    given = options(save_every=1, eval_every=1)
    at_best = {}

    def keep(event):
        if event.kind == "checkpoint" and event.step == 1:
            at_best.update(load_file(Path(event.path) / "adapter_model.safetensors"))

    summary = run_training(given, [keep])
    assert checkpoints_of(given.out) == ["step-00000001", "step-00000005", "step-00000006"]
    assert (summary["best_step"], summary["eval_loss_after"], summary["eval_loss_last"]) == (1, 5, 10)
    final = load_file(given.out / "adapter_model.safetensors")
    assert all(torch.equal(final[k], at_best[k]) for k in final)  # the best is what is handed over


def test_without_held_out_data_the_last_is_handed_over(options, checkpoints_of):
    given = options(eval_data=None, save_every=4)
    summary = run_training(given)
    assert checkpoints_of(given.out) == ["step-00000004", "step-00000006"]
    assert summary["eval_loss_before"] is summary["eval_loss_after"] is None
    name = "adapter_model.safetensors"
    one, other = load_file(given.out / name), load_file(given.out / "checkpoints/step-00000006" / name)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_checkpoints_hold_no_base(options):
    given = options()
    summary = run_training(given)
    for folder in (given.out / "checkpoints").iterdir():
        assert (
            sum(p.stat().st_size for p in folder.iterdir()) < 4 * summary["adapter_bytes"] < summary["base_bytes"] / 4
        )
        assert not any("embed" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_full_fine_tuning_leaves_a_plain_model(options):
    given = options(full=True, dtype="bfloat16", learning_rate=1e-3, epochs=4)
    before = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).state_dict()
    summary = run_training(given)
    assert not (given.out / "adapter_config.json").exists()
    model, _ = load_base(given.out)
    after = model.state_dict()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert summary["trainable_parameters"] == summary["total_parameters"]
    assert summary["adapter_bytes"] == (given.out / "model.safetensors").stat().st_size
    held_out = prepare(given).eval.examples
    assert mean_loss(examine(model), held_out, 64)[0] == pytest.approx(summary["eval_loss_after"], abs=1e-3)
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.05


# --- the folder ---


def test_a_run_is_not_written_over_unasked(options, listing, checkpoints_of):
    given = options(max_steps=1)
    run_training(given)
    (given.out / "notes.txt").write_text("mine")
    (given.out / "tokenizer.json").write_text("mine too")
    before = listing(given.out)
    with pytest.raises(UserError, match=r"already holds a run \(summary.json\); add --resume or --overwrite"):
        run_training(given)
    assert listing(given.out) == before
    run_training(dataclasses.replace(given, overwrite=True, max_steps=2, seed=1))
    assert (given.out / "notes.txt").read_text() == "mine"
    assert (given.out / "tokenizer.json").read_text() == "mine too"
    assert checkpoints_of(given.out) == ["step-00000002"]


def test_overwriting_a_full_run_takes_its_model_away(options):
    given = options(max_steps=1, full=True)
    run_training(given)
    (given.out / "notes.txt").write_text("mine")
    run_training(dataclasses.replace(given, full=False, overwrite=True))
    assert sorted(p.name for p in given.out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "notes.txt",
        "summary.json",
    ]  # fmt: skip


def test_a_summary_that_names_foreign_files_deletes_none(options, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("")
    given = options(max_steps=1)
    summary = run_training(given) | {"files": ["../victim", str(victim), "..", "", 7]}
    (given.out / "summary.json").write_text(json.dumps(summary))
    (given.out / "mine").write_text("")
    run_training(dataclasses.replace(given, overwrite=True))
    assert victim.exists() and (given.out / "mine").exists()


def test_options_that_cannot_be_met_cost_no_old_run(options, write, monkeypatch, listing):
    given = options(max_steps=1)
    run_training(given)
    before = listing(given.out)
    bad = write("bad.jsonl", [{"messages": []}])
    for change, message in [
        (dict(data=bad), "bad line in .*bad.jsonl"),
        (dict(eval_data=bad), "bad line in .*bad.jsonl"),
        (dict(data="nope.jsonl"), "no such file"),
        (dict(model="nope"), "no such model"),
        (dict(target_modules="nope"), "nope"),
        (dict(max_length=9999), "the model takes at most 512 tokens"),
        (dict(max_length=2), "nothing is supervised"),
    ]:
        with pytest.raises(UserError, match=message):
            run_training(dataclasses.replace(given, overwrite=True, **change))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_training(dataclasses.replace(given, overwrite=True, tensorboard=True))
    monkeypatch.setattr(module, "load_base", _without_checkpointing)
    with pytest.raises(UserError, match="no gradient checkpointing; leave --gradient-checkpointing out"):
        run_training(dataclasses.replace(given, overwrite=True, gradient_checkpointing=True))
    assert listing(given.out) == before


def _without_checkpointing(*args, **kwargs):
    model, tokenizer = load_base(*args, **kwargs)
    model.__dict__["supports_gradient_checkpointing"] = False
    return model, tokenizer


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written_is_refused_at_once(options, tmp_path, out, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("read everything first"))
    with pytest.raises(UserError, match=r"--out .*(a file|can't be written)"):
        run_training(options(out=tmp_path / out))
