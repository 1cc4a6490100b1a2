"""A run that was stopped, killed or damaged, and goes on: it is the run that never was, or a clear refusal."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.adapters.peft_format import load_adapter
from deltaw.errors import UserError
from deltaw.nn.load import load_base
from deltaw.train.events import Stepped
from deltaw.train.run import run_training


@pytest.mark.parametrize(
    ("given", "stop_at"),
    [
        pytest.param(dict(lora_dropout=0.2, use_dora=True), 2, id="dora, dropout, inside an epoch"),
        pytest.param(dict(lora_dropout=0.2), 3, id="at the border of an epoch"),
        pytest.param(dict(init_lora_weights="pissa", use_rslora=True, lora_dropout=0.1), 3, id="pissa"),
        pytest.param(dict(init_lora_weights="loftq", use_dora=True), 3, id="loftq, dora"),
        pytest.param(dict(init_lora_weights="eva", r=2, loraplus_lr_ratio=4.0), 3, id="eva, lora+"),
        pytest.param(dict(save_every=0, eval_every=2, gradient_accumulation=2, batch_size=2), 5, id="short last step"),
        pytest.param(dict(full=True, learning_rate=1e-3), 4, id="full"),
        pytest.param(dict(full=True, dtype="bfloat16", learning_rate=1e-4), 4, id="full in bfloat16"),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(options, events, tmp_path, given, stop_at, run_until):
    whole = options(out=tmp_path / "whole", **given)
    parts = options(out=tmp_path / "parts", **given)
    at_once = run_training(whole)
    first = run_until(parts, stop_at)
    assert (first["status"], first["steps"]) == ("interrupted", stop_at)
    again = run_training(dataclasses.replace(parts, resume=True))
    assert again["status"] == "done"

    name = "model.safetensors" if given.get("full") else "adapter_model.safetensors"
    one, other = load_file(whole.out / name), load_file(parts.out / name)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    last = "checkpoints/step-00000006/optimizer.safetensors"
    one, other = load_file(whole.out / last), load_file(parts.out / last)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    timeless = {"seconds": 0, "path": ""}
    for kind in ("step", "eval"):
        assert [e | timeless for e in events(whole.out, kind)] == [e | timeless for e in events(parts.out, kind)]
    for key in ("steps", "examples", "tokens", "eval_loss_before", "eval_loss_after", "best_step"):
        assert at_once[key] == again[key]
    assert [e["first_step"] for e in events(parts.out, "started")] == [0, stop_at]


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(options, events, tmp_path):
    whole, killed = options(out=tmp_path / "whole", save_every=2), options(out=tmp_path / "killed", save_every=2)
    run_training(whole)

    def die(event):
        if isinstance(event, Stepped) and event.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_training(killed, [die])
    with (killed.out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # cut short, as a crash may leave it
    assert not (killed.out / "summary.json").exists()
    run_training(dataclasses.replace(killed, resume=True))
    assert [e["step"] for e in events(killed.out, "step")] == [1, 2, 3, 4, 5, 6]
    one, other = (load_file(o.out / "adapter_model.safetensors") for o in (whole, killed))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_resuming_twice_and_early_stop_survives_it(options, monkeypatch, run_until):
    from deltaw.train import loop

    given = options(eval_every=1, early_stop_patience=3, epochs=5)
    losses = iter([9, 5, 6, 7, 8, 1])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(losses), 10))
    run_until(given, 2)
    resumed = dataclasses.replace(given, resume=True)
    run_until(resumed, 1)
    summary = run_training(resumed)
    assert (summary["status"], summary["steps"], summary["best_step"]) == ("early stop", 4, 1)
    assert summary["eval_loss_after"] == 5


def test_resuming_another_run_is_refused_by_name(options, chats, write, tiny_base, tmp_path, run_until, listing):
    given = options()
    run_until(given, 2)
    before = listing(given.out)

    def refused(match, **change):
        with pytest.raises(UserError, match=match):
            run_training(dataclasses.replace(given, resume=True, **change))
        assert listing(given.out) == before

    refused(r"not the same run \(--r 4 → 8, --seed 0 → 3\)", r=8, seed=3)
    rows = Path(given.data).read_text()
    write("train.jsonl", chats(11))
    refused("other training data")
    Path(given.data).write_text(rows)
    rows = Path(given.eval_data).read_text()
    write("heldout.jsonl", chats(6))
    refused("other held-out data")
    Path(given.eval_data).write_text(rows)
    run_training(dataclasses.replace(given, resume=True, save_every=1, tensorboard=True))  # changes no number


def test_resuming_on_another_base_is_refused(options, tiny_base, tmp_path, run_until):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    given = options(model=str(base))
    run_until(given, 1)
    weights = load_file(base / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other base"):
        run_training(dataclasses.replace(given, resume=True))


def test_resuming_a_finished_run_says_so_and_changes_nothing(options, caplog, listing):
    given = options()
    summary = run_training(given)
    before = listing(given.out)
    with caplog.at_level("INFO", "deltaw"):
        assert run_training(dataclasses.replace(given, resume=True)) == summary
    assert "finished after 6 steps" in caplog.text
    with pytest.raises(UserError, match=r"that run is finished, and this would be another \(--epochs 2 → 3\)"):
        run_training(dataclasses.replace(given, resume=True, epochs=3))
    assert listing(given.out) == before


def test_resuming_where_there_is_nothing_to_resume(options):
    with pytest.raises(UserError, match="holds no run; start it without --resume"):
        run_training(options(resume=True))
    given = options(save_every=0, eval_data=None)
    run_training(given)
    (given.out / "summary.json").unlink()  # as if it had been killed
    with pytest.raises(UserError, match="no checkpoint to resume from; start it again with --overwrite"):
        run_training(dataclasses.replace(given, resume=True))


@pytest.mark.parametrize(
    "damage", ["cut optimizer", "cut adapter", "cut state", "empty state", "other tensors", "shape"]
)
def test_a_damaged_checkpoint_is_one_clear_error(options, damage, run_until):
    given = options()
    run_until(given, 2)
    (folder,) = (given.out / "checkpoints").iterdir()
    optimizer, adapter, state = (
        folder / n for n in ("optimizer.safetensors", "adapter_model.safetensors", "state.json")
    )
    tensors = load_file(adapter)
    match damage:
        case "cut optimizer":
            optimizer.write_bytes(optimizer.read_bytes()[:-100])
        case "cut adapter":
            adapter.write_bytes(adapter.read_bytes()[:50])
        case "cut state":
            state.write_text(state.read_text()[:40])
        case "empty state":
            state.write_text("{}")
        case "other tensors":
            save_file({"x": torch.zeros(2)}, adapter)
        case "shape":
            save_file({k: torch.zeros(3, 3) for k in tensors}, adapter)
    with pytest.raises(UserError, match=r"step-00000002: (not a readable checkpoint|holds other tensors)"):
        run_training(dataclasses.replace(given, resume=True))


def test_an_interrupted_run_says_so(options, events, run_until):
    given = options()
    summary = run_until(given, 2)
    assert (summary["status"], summary["steps"], summary["eval_loss_after"]) == ("interrupted", 2, None)
    assert events(given.out)[-1] == {"event": "stopped", "step": 2, "reason": "interrupted"}
    model, _ = load_base(given.model, dtype="float32")
    load_adapter(model, given.out)  # what was learnt so far can be used
