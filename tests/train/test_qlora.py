"""Whole runs over a base in 4 bits: the numbers of its dequantised weights, resumed, checkpointed, and told."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deltaw.adapters.merge import merge_and_unload
from deltaw.adapters.peft_format import load_adapter, read_adapter
from deltaw.errors import UserError
from deltaw.nn.load import base_bytes, load_base
from deltaw.nn.quantized import QuantizedModule
from deltaw.nn.quantized_base import quantized_base
from deltaw.nn.walk import adapted_layers
from deltaw.train.prepare import prepare
from deltaw.train.run import make_job, run_training

WEIGHTS = "adapter_model.safetensors"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def dequantised(tiny_base, tmp_path_factory):
    """A dense checkpoint of what NF4 leaves of the tiny base."""
    folder = tmp_path_factory.mktemp("dequantised")
    model, _ = load_base(str(tiny_base), quantization="nf4", dtype="float32")
    for name in [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]:
        layer = model.get_submodule(name)
        model.set_submodule(name, layer.as_dense(layer.weight))
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("given", [dict(lora_dropout=0.1), dict(use_dora=True)], ids=["lora", "dora"])
def test_training_over_4_bits_is_training_over_the_dequantised_weights(options, events, dequantised, tmp_path, given):
    short = dict(epochs=1, learning_rate=2e-3)
    nf4 = options(out=tmp_path / "nf4", quantization="nf4", **short, **given)
    dense = options(out=tmp_path / "dense", model=str(dequantised), **short, **given)
    ours, theirs = run_training(nf4), run_training(dense)
    assert ours["eval_loss_after"] < ours["eval_loss_before"]
    for key in ("eval_loss_before", "eval_loss_after"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    losses = [[e["loss"] for e in events(out, "step")] for out in (nf4.out, dense.out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, other = (load_file(out / WEIGHTS) for out in (nf4.out, dense.out))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0.05, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        pytest.param("nf4", dict(lora_dropout=0.2, use_dora=True), id="nf4, dora, dropout"),
        pytest.param("nf4", dict(init_lora_weights="loftq", optimizer="paged-adamw"), id="nf4, loftq, paged"),
        pytest.param(
            "fp4", dict(init_lora_weights="pissa", gradient_checkpointing=True), id="fp4, pissa, checkpointing"
        ),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(options, tmp_path, run_until, kind, given):
    whole = options(out=tmp_path / "whole", quantization=kind, **given)
    parts = options(out=tmp_path / "parts", quantization=kind, **given)
    run_training(whole)
    run_until(parts, 2)
    assert run_training(dataclasses.replace(parts, resume=True))["status"] == "done"
    for name in (WEIGHTS, "checkpoints/step-00000006/optimizer.safetensors"):
        assert same(load_file(whole.out / name), load_file(parts.out / name))
    stored = [read_adapter(run.out).provenance.quantized_base for run in (whole, parts)]
    assert stored[0] == stored[1] and (stored[0] is not None) == (given.get("init_lora_weights") == "loftq")
    with pytest.raises(UserError, match=f"--quantization {kind} → nf4-single"):
        run_training(dataclasses.replace(parts, quantization="nf4-single", resume=True))


@pytest.mark.parametrize("given", [dict(lora_dropout=0.3), dict(use_dora=True)], ids=["lora", "dora"])
def test_checkpointing_changes_no_number(options, tmp_path, given):
    plain = options(out=tmp_path / "plain", quantization="nf4", epochs=1, **given)
    checkpointed = dataclasses.replace(plain, out=tmp_path / "checkpointed", gradient_checkpointing=True)
    run_training(plain), run_training(checkpointed)
    assert same(load_file(plain.out / WEIGHTS), load_file(checkpointed.out / WEIGHTS))


def test_a_loftq_run_begins_nearer_to_the_dense_base_and_stays_with_its_own(options, tiny_base, tmp_path):
    dense = run_training(options(out=tmp_path / "dense", epochs=1))
    nf4 = run_training(options(out=tmp_path / "nf4", quantization="nf4", epochs=1))
    given = options(out=tmp_path / "loftq", quantization="nf4", init_lora_weights="loftq", r=16, epochs=1)
    loftq = run_training(given)
    far = [abs(run["eval_loss_before"] - dense["eval_loss_before"]) for run in (nf4, loftq)]
    assert far[1] < far[0]

    stored = read_adapter(given.out)
    model, _ = load_base(str(tiny_base), quantization="nf4", dtype="float32")
    assert stored.provenance.quantized_base == quantized_base(model)
    assert (stored.config.r, stored.provenance.base_sha256) == (16, loftq["base_sha256"])
    load_adapter(model, given.out)
    with pytest.raises(UserError, match="started by LoftQ"):
        load_adapter(load_base(str(tiny_base), dtype="float32")[0], given.out)
    load_adapter(merge_and_unload(model), tmp_path / "dense")  # what is dense now takes any other adapter


def test_the_summary_counts_what_is_there(options, tiny_base):
    given = options(quantization="nf4", epochs=1)
    summary = run_training(given)
    model, _ = load_base(str(tiny_base), quantization="nf4", dtype="float32")
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    codes = sum(t.nbytes for layer in layers for t in layer.buffers())
    assert summary["base_bytes"] == base_bytes(model) == sum(p.nbytes for p in model.parameters()) + codes
    assert summary["base_bytes"] <= sum(t.nbytes for t in tensors.values())
    dense, _ = load_base(str(tiny_base), dtype="float32")
    assert summary["total_parameters"] - summary["trainable_parameters"] == sum(p.numel() for p in dense.parameters())
    assert base_bytes(dense) - summary["base_bytes"] > 0.85 * 4 * sum(m.quantized.shape.numel() for m in layers)
    trained = summary["trainable_parameters"]
    assert summary["trained_bytes"] == 4 * trained
    assert summary["optimizer_bytes"] == 8 * trained + 4 * 28  # two moments, and a step count for each of 28 factors
    assert summary["adapter_bytes"] == (given.out / WEIGHTS).stat().st_size and summary["peak_rss_bytes"] > 0
    assert summary == json.loads((given.out / "summary.json").read_text())


def test_loftq_on_a_checkpoint_that_is_in_4_bits_already(options, tiny_base, tmp_path):
    folder = tmp_path / "four"
    model, tokenizer = load_base(str(tiny_base), quantization="nf4", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = options(model=str(folder), init_lora_weights="loftq")
    with pytest.raises(UserError, match=r"four is stored in 4 bits already, and doesn't say what"):
        run_training(given)
    assert not given.out.exists()
    assert run_training(options(model=str(folder), epochs=1))["status"] == "done"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_qlora_on_the_real_base(options, real_base):
    """SmolLM2 in NF4 with double quantisation and DoRA, checkpointing and the paged optimiser at once."""
    shared = dict(model="smollm2-135m", quantization="nf4", dtype="bfloat16", r=8, learning_rate=5e-4, max_steps=6)
    given = options(**shared, use_dora=True, gradient_checkpointing=True, optimizer="paged-adamw", eval_every=0)
    job = make_job(given, prepare(given))
    assert all(isinstance(layer.base_layer, QuantizedModule) for _, layer in adapted_layers(job.language_model.model))
    summary = run_training(given)
    assert summary["eval_loss_after"] < 0.8 * summary["eval_loss_before"]
    dense = sum(p.numel() * 2 for p in real_base[0].parameters())
    linear = dense / 2 - 49152 * 576 - 61 * 576  # all but the tied embedding and the norms
    assert summary["base_bytes"] < dense - 2 * linear + linear * 4.2 / 8
