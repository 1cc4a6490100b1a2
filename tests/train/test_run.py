"""Whole runs: what is trained, what is told, and what lies in --out afterwards."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltaw.adapters.peft_format import load_adapter
from deltaw.nn.load import load_base
from deltaw.train.evaluate import mean_loss
from deltaw.train.events import Started, Stopped, Warned
from deltaw.train.forward import LanguageModel, examine
from deltaw.train.prepare import prepare
from deltaw.train.run import run_training

SUMMARY_KEYS = {
    *("steps", "examples", "tokens", "supervised_tokens", "train_seconds", "examples_per_second", "tokens_per_second"),
    *("eval_loss_before", "eval_loss_after", "peak_rss_bytes", "trainable_parameters", "total_parameters"),
    *("adapter_bytes", "base_bytes", "data_sha256", "base_sha256", "config"),
}


def test_what_a_run_leaves_behind(options, events):
    given = options(lora_alpha=8)
    summary = run_training(given)
    assert sorted(p.name for p in given.out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "summary.json",
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


# --- what is told ---


def test_cut_and_emptied_examples_are_told(options, write, chats, events):
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "yes"}]}
    given = options(data=write("long.jsonl", [*chats(4), long]), eval_data=None, max_steps=1)
    run_training(given)
    messages = [e["message"] for e in events(given.out, "warning")]
    assert messages[0].startswith("1 of 5 training examples are longer than --max-length and lose")
    assert "long.jsonl:5" in messages[1] and "larger --max-length keeps them" in messages[1]


def test_a_run_shorter_than_its_warm_up_is_told(options):
    told = []
    run_training(options(max_steps=2, warmup_steps=2), [told.append])
    (message,) = [e.message for e in told if isinstance(e, Warned)]
    assert "all 2 steps lie in the warm-up" in message and "--warmup-steps 2" in message


def test_modules_that_learnt_nothing_are_named(options):
    told = []
    shy = options(learning_rate=1e-45, max_steps=1, warmup_steps=0, target_modules="q_proj,v_proj")
    run_training(shy, [told.append])
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
def test_tensorboard_sees_every_step_once(options, run_until):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = options(tensorboard=True, save_every=2)
    run_until(given, 3)
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
