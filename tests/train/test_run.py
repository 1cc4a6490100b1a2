"""Whole runs: what lies in --out afterwards, and that a run that was stopped is the run that never was."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.adapters.peft_format import load_adapter
from deltaw.errors import UserError
from deltaw.nn.load import load_base
from deltaw.train import run as module
from deltaw.train.evaluate import mean_loss
from deltaw.train.events import Started, Stepped, Stopped, Warned
from deltaw.train.forward import LanguageModel, examine
from deltaw.train.run import prepare, run_training

SUMMARY_KEYS = {
    *("steps", "examples", "tokens", "supervised_tokens", "train_seconds", "examples_per_second", "tokens_per_second"),
    *("eval_loss_before", "eval_loss_after", "peak_rss_bytes", "trainable_parameters", "total_parameters"),
    *("adapter_bytes", "base_bytes", "data_sha256", "base_sha256", "config"),
}


class Stop:
    """Watches a run, and asks it to stop after so many steps."""

    def __init__(self, after):
        self.after, self.steps = after, 0

    def __call__(self, event):
        self.steps += isinstance(event, Stepped)

    def __bool__(self):
        return self.steps >= self.after


def _run_until(options, step):
    stop = Stop(step)
    return run_training(options, [stop], stop.__bool__)


def _listing(out):
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def _steps(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_what_a_run_leaves_behind(options, events):
    given = options(lora_alpha=8)
    summary = run_training(given)
    assert sorted(p.name for p in given.out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "summary.json",
    ]  # fmt: skip
    assert summary == json.loads((given.out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["status"], summary["steps"], summary["examples"]) == ("done", 6, 20)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["adapter_bytes"] == (given.out / "adapter_model.safetensors").stat().st_size
    assert summary["config"] == given.to_dict()
    assert all(len(summary[key]) == 64 for key in ("data_sha256", "base_sha256"))
    steps = events(given.out, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    for key, of_step in (
        ("tokens", "num_tokens"),
        ("supervised_tokens", "num_supervised"),
        ("train_seconds", "seconds"),
    ):
        assert summary[key] == pytest.approx(sum(s[of_step] for s in steps))
    assert events(given.out)[0]["event"] == "started" and events(given.out)[-1]["event"] == "stopped"
    stored = load_file(given.out / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert sum(t.numel() for t in stored.values()) == summary["trainable_parameters"]
    config = json.loads((given.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(given.model))


def test_the_loss_before_and_after_is_that_of_the_files(options):
    given = options()
    summary = run_training(given)
    model, _ = load_base(given.model, dtype="float32")
    held_out = prepare(given).eval.examples
    assert mean_loss(examine(model), held_out, 64)[0] == pytest.approx(summary["eval_loss_before"], rel=1e-6)
    load_adapter(model, given.out)
    assert mean_loss(examine(model), held_out, 64)[0] == pytest.approx(summary["eval_loss_after"], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [{}, dict(use_dora=True, use_rslora=True, target_modules="q_proj,down_proj")])
def test_real_peft_reads_it_with_equal_logits(options, given):
    peft = pytest.importorskip("peft")
    made = options(**given)
    run_training(made)
    ids = torch.arange(5, 25)[None]
    ours, _ = load_base(made.model, dtype="float32")
    before = ours(ids).logits
    load_adapter(ours, made.out)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.model), made.out).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        assert (ours(ids).logits - before).abs().max() > 1e-3


def test_the_seed_decides_everything(options, tmp_path):
    def trained(name, **given):
        made = options(out=tmp_path / name, lora_dropout=0.2, **given)
        run_training(made)
        return load_file(made.out / "adapter_model.safetensors")

    one, again, other = trained("a", seed=1), trained("b", seed=1), trained("c", seed=2)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


# --- resuming ---


@pytest.mark.parametrize(
    ("given", "stop_at"),
    [
        pytest.param(dict(lora_dropout=0.2, use_dora=True), 2, id="dora, dropout, inside an epoch"),
        pytest.param(dict(lora_dropout=0.2), 3, id="at the border of an epoch"),
        pytest.param(dict(save_every=0, eval_every=2, gradient_accumulation=2, batch_size=2), 5, id="short last step"),
        pytest.param(dict(full=True, learning_rate=1e-3), 4, id="full"),
        pytest.param(dict(full=True, dtype="bfloat16", learning_rate=1e-4), 4, id="full in bfloat16"),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(options, events, tmp_path, given, stop_at):
    whole = options(out=tmp_path / "whole", **given)
    parts = options(out=tmp_path / "parts", **given)
    at_once = run_training(whole)
    first = _run_until(parts, stop_at)
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


def test_resuming_twice_and_early_stop_survives_it(options, monkeypatch):
    from deltaw.train import loop

    given = options(eval_every=1, early_stop_patience=3, epochs=5)
    losses = iter([9, 5, 6, 7, 8, 1])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(losses), 10))
    _run_until(given, 2)
    resumed = dataclasses.replace(given, resume=True)
    _run_until(resumed, 1)
    summary = run_training(resumed)
    assert (summary["status"], summary["steps"], summary["best_step"]) == ("early stop", 4, 1)
    assert summary["eval_loss_after"] == 5


def test_resuming_another_run_is_refused_by_name(options, chats, write, tiny_base, tmp_path):
    given = options()
    _run_until(given, 2)
    before = _listing(given.out)

    def refused(match, **change):
        with pytest.raises(UserError, match=match):
            run_training(dataclasses.replace(given, resume=True, **change))
        assert _listing(given.out) == before

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


def test_resuming_on_another_base_is_refused(options, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    given = options(model=str(base))
    _run_until(given, 1)
    weights = load_file(base / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other base"):
        run_training(dataclasses.replace(given, resume=True))


def test_resuming_a_finished_run_says_so_and_changes_nothing(options, caplog):
    given = options()
    summary = run_training(given)
    before = _listing(given.out)
    with caplog.at_level("INFO", "deltaw"):
        assert run_training(dataclasses.replace(given, resume=True)) == summary
    assert "finished after 6 steps" in caplog.text
    with pytest.raises(UserError, match=r"that run is finished, and this would be another \(--epochs 2 → 3\)"):
        run_training(dataclasses.replace(given, resume=True, epochs=3))
    assert _listing(given.out) == before


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
def test_a_damaged_checkpoint_is_one_clear_error(options, damage):
    given = options()
    _run_until(given, 2)
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


def test_an_interrupted_run_says_so(options, events):
    given = options()
    summary = _run_until(given, 2)
    assert (summary["status"], summary["steps"], summary["eval_loss_after"]) == ("interrupted", 2, None)
    assert events(given.out)[-1] == {"event": "stopped", "step": 2, "reason": "interrupted"}
    model, _ = load_base(given.model, dtype="float32")
    load_adapter(model, given.out)  # what was learnt so far can be used


# --- checkpoints ---


def test_the_newest_two_checkpoints_and_the_best_are_kept(options, monkeypatch):
    from deltaw.train import loop

    losses = iter([9, 5, 6, 7, 8, 9, 10])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(losses), 10))
    given = options(save_every=1, eval_every=1)
    at_best = {}

    def keep(event):
        if event.kind == "checkpoint" and event.step == 1:
            at_best.update(load_file(Path(event.path) / "adapter_model.safetensors"))

    summary = run_training(given, [keep])
    assert _steps(given.out) == ["step-00000001", "step-00000005", "step-00000006"]
    assert (summary["best_step"], summary["eval_loss_after"], summary["eval_loss_last"]) == (1, 5, 10)
    final = load_file(given.out / "adapter_model.safetensors")
    assert all(torch.equal(final[k], at_best[k]) for k in final)  # the best is what is handed over


def test_without_held_out_data_the_last_is_handed_over(options):
    given = options(eval_data=None, save_every=4)
    summary = run_training(given)
    assert _steps(given.out) == ["step-00000004", "step-00000006"]
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


def test_a_run_is_not_written_over_unasked(options):
    given = options(max_steps=1)
    run_training(given)
    (given.out / "notes.txt").write_text("mine")
    (given.out / "tokenizer.json").write_text("mine too")
    before = _listing(given.out)
    with pytest.raises(UserError, match=r"already holds a run \(summary.json\); add --resume or --overwrite"):
        run_training(given)
    assert _listing(given.out) == before
    run_training(dataclasses.replace(given, overwrite=True, max_steps=2, seed=1))
    assert (given.out / "notes.txt").read_text() == "mine"
    assert (given.out / "tokenizer.json").read_text() == "mine too"
    assert _steps(given.out) == ["step-00000002"]


def test_overwriting_a_full_run_takes_its_model_away(options):
    given = options(max_steps=1, full=True)
    run_training(given)
    (given.out / "notes.txt").write_text("mine")
    run_training(dataclasses.replace(given, full=False, overwrite=True))
    assert sorted(p.name for p in given.out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "notes.txt", "summary.json",
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


def test_options_that_cannot_be_met_cost_no_old_run(options, write, monkeypatch):
    given = options(max_steps=1)
    run_training(given)
    before = _listing(given.out)
    bad = write("bad.jsonl", [{"messages": []}])
    for change, message in [
        (dict(data=bad), "bad line in .*bad.jsonl"),
        (dict(eval_data=bad), "bad line in .*bad.jsonl"),
        (dict(data="nope.jsonl"), "no such file"),
        (dict(model="nope"), "no such model"),
        (dict(target_modules="nope"), "nope"),
        (dict(max_length=9999), "the model takes at most 512 tokens"),
        (dict(max_length=2), "nothing to learn"),
    ]:
        with pytest.raises(UserError, match=message):
            run_training(dataclasses.replace(given, overwrite=True, **change))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_training(dataclasses.replace(given, overwrite=True, tensorboard=True))
    monkeypatch.setattr(module, "load_base", _without_checkpointing)
    with pytest.raises(UserError, match="no gradient checkpointing; leave --gradient-checkpointing out"):
        run_training(dataclasses.replace(given, overwrite=True, gradient_checkpointing=True))
    assert _listing(given.out) == before


def _without_checkpointing(*args, **kwargs):
    model, tokenizer = load_base(*args, **kwargs)
    model.__dict__["supports_gradient_checkpointing"] = False
    return model, tokenizer


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written_is_refused_at_once(options, tmp_path, out, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("read everything first"))
    with pytest.raises(UserError, match=r"--out .*(a file|can't be written)"):
        run_training(options(out=tmp_path / out))


# --- what is told ---


def test_cut_and_emptied_examples_are_told(options, write, chats, events):
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "yes"}]}
    given = options(data=write("long.jsonl", [*chats(4), long]), eval_data=None, max_steps=1)
    run_training(given)
    messages = [e["message"] for e in events(given.out, "warning")]
    assert messages[0].startswith("1 of 5 training examples are longer than --max-length and lose")
    assert "long.jsonl:5" in messages[1] and "larger --max-length keeps them" in messages[1]


def test_modules_that_learnt_nothing_are_named(options):
    told = []
    run_training(options(learning_rate=1e-45, max_steps=1, target_modules="q_proj,v_proj"), [told.append])
    (message,) = [e.message for e in told if isinstance(e, Warned)]
    assert message == (
        "4 modules learnt nothing (B is still zero): model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj, "
        "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj"
    )


def test_no_such_warning_after_an_honest_run(options):
    told = []
    run_training(options(max_steps=2), [told.append])
    assert not [e for e in told if isinstance(e, Warned)]
    assert isinstance(told[0], Started) and isinstance(told[-1], Stopped)


def test_a_bad_step_is_recorded_as_null(options, events, monkeypatch):
    honest = LanguageModel.loss

    def loss(self, packed, dropout=None):
        value = honest(self, packed, dropout)
        return value * float("nan") if dropout is not None and dropout.step == 1 else value

    monkeypatch.setattr(LanguageModel, "loss", loss)
    given = options(max_steps=3)
    summary = run_training(given)
    assert summary["skipped_steps"] == 1
    assert [e["is_skipped"] for e in events(given.out, "step")] == [False, True, False]
    assert events(given.out, "step")[1]["loss"] is None


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_sees_every_step_once(options):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = options(tensorboard=True, save_every=2)
    _run_until(given, 3)
    run_training(dataclasses.replace(given, resume=True))
    seen = EventAccumulator(str(given.out / "tensorboard")).Reload()
    assert [s.step for s in seen.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in seen.Scalars("eval/loss")] == [0, 3, 6]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(seen.Tags()["scalars"])


def test_gradient_checkpointing_trains_the_same_adapter(options, tmp_path):
    plain = options(out=tmp_path / "plain", lora_dropout=0.1, max_steps=3)
    checkpointed = options(out=tmp_path / "checkpointed", lora_dropout=0.1, max_steps=3, gradient_checkpointing=True)
    run_training(plain), run_training(checkpointed)
    one, other = (load_file(o.out / "adapter_model.safetensors") for o in (plain, checkpointed))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_bfloat16_base_trains_float32_adapters(options):
    given = options(dtype="bfloat16")
    summary = run_training(given)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert {t.dtype for t in load_file(given.out / "adapter_model.safetensors").values()} == {torch.float32}
