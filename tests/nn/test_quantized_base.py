"""A quantised base: who it is, what it was made from, and adapters that belong to it (LoftQ)."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from deltaw.adapters.blend import blend
from deltaw.adapters.peft_format import load_adapter, read_adapter, save_adapter
from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject, restore
from deltaw.nn.load import forget_base, load_base
from deltaw.nn.load_quantized import load_quantized
from deltaw.nn.quantized_base import quantized_base
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers
from deltaw.ops.quantized import METHODS

IDS = torch.arange(3, 12)[None]


def lora(**given):
    return LoraConfig(**dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="loftq") | given)


def load(folder, quantization="nf4"):
    return load_base(str(folder), quantization=quantization, dtype="float32")[0]


def errors(model, dense):
    """‖W − W_q‖ and ‖W − (W_q + s·B·A)‖ of each adapted layer."""
    for name, layer in adapted_layers(model):
        own = dense.get_submodule(name)
        w = own.weight.T if type(own).__name__ == "Conv1D" else own.weight
        lost = w.float() - layer.storage.dequantize().float()
        yield lost.norm().item(), (lost - layer.adapter("default").delta()).norm().item()


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int4"])
def test_loftq_makes_good_part_of_what_quantising_lost(tiny_base, kind):
    model, dense = load(tiny_base, kind), load(tiny_base, None)
    inject(model, lora())
    found = list(errors(model, dense))
    assert len(found) == 14 and all(0 < after < 0.9 * before for before, after in found)
    with torch.no_grad():
        restored = (model(IDS).logits - dense(IDS).logits).norm()
        restore(model)
        quantised = (model(IDS).logits - dense(IDS).logits).norm()
    assert restored < 0.9 * quantised


def test_a_head_that_stays_dense_starts_as_over_a_dense_base(tiny_base):
    model = load(tiny_base)
    before = model(IDS).logits
    inject(model, lora(target_modules=["lm_head", "v_proj"]))
    parts = {name: layer.adapter("default").start for name, layer in adapted_layers(model)}
    assert parts.pop("lm_head") is not None and set(parts.values()) == {None}
    assert not torch.equal(model(IDS).logits, before)
    model = load(tiny_base)
    inject(model, lora(target_modules=["lm_head"]))
    assert not state_of(model).bound


def test_conv1d_s_weights_are_read_as_they_lie(tmp_path, tiny_base):
    sizes = dict(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    for file in tiny_base.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, dense = load(tmp_path), load(tmp_path, None)
    inject(model, lora(target_modules=["c_attn", "c_proj"]))
    assert all(after < before for before, after in errors(model, dense))


def test_dora_s_magnitude_is_that_of_the_effective_start(tiny_base):
    plain, dora = load(tiny_base), load(tiny_base)
    inject(plain, lora())
    inject(dora, lora(use_dora=True))
    with torch.no_grad():
        torch.testing.assert_close(dora(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_goes_with_the_base_that_it_was_started_on(tiny_base, tmp_path):
    model = load(tiny_base)
    inject(model, lora())
    logits = model(IDS).logits
    save_adapter(model, tmp_path / "a")
    stored = read_adapter(tmp_path / "a")
    assert (stored.config.r, stored.config.init_lora_weights, stored.config.loftq_config) == (4, True, {})
    assert stored.provenance.quantized_base == quantized_base(load(tiny_base)) == state_of(model).bound["default"]
    assert stored.provenance.quantization == "nf4"

    again = load(tiny_base)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS).logits, logits)
    sha256 = stored.provenance.quantized_sha256[:12]
    with pytest.raises(UserError, match=rf"started by LoftQ.*nf4, sha256 {sha256}….*this base is dense.*--quantiz"):
        load_adapter(load(tiny_base, None), tmp_path / "a")
    other = load(tiny_base, "nf4-single")
    theirs = quantized_base(other).sha256[:12]
    with pytest.raises(UserError, match=rf"{sha256}….*another quantised one \(nf4-single, sha256 {theirs}…\)"):
        load_adapter(other, tmp_path / "a")
    assert not state_of(other).configs

    load_adapter(other, tmp_path / "a", allow_other_base=True)
    save_adapter(other, tmp_path / "b")  # where it belongs doesn't change by that
    assert read_adapter(tmp_path / "b").provenance.quantized_base == stored.provenance.quantized_base


def test_the_hash_knows_the_base_whatever_file_it_came_from(tiny_base, tmp_path):
    model = load(tiny_base)
    inject(model, lora())
    save_adapter(model, tmp_path / "a")
    other = load(tiny_base)
    other.__dict__["_deltaw_base"] = dataclasses.replace(other.__dict__["_deltaw_base"], name="a copy in 4 bits")
    other.__dict__["_deltaw_base"].__dict__["sha256"] = "0" * 64
    load_adapter(other, tmp_path / "a")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.base_layer.codes[0] ^= 1
    with pytest.raises(UserError, match="another quantised one"):
        load_adapter(other, tmp_path / "a", "second")


def test_what_is_made_of_it_is_bound_too_and_what_goes_is_not(tiny_base):
    model = load(tiny_base)
    inject(model, lora())
    inject(model, lora(init_lora_weights=True), "other")
    blend(model, ["default", "other"], [1.0, 0.5], "both", method="cat")
    bound = state_of(model).bound
    assert bound.keys() == {"default", "both"} and bound["both"] == bound["default"]
    restore(model, "default")
    assert bound.keys() == {"both"}


def test_merged_layers_are_known_by_what_they_were(tiny_base):
    from deltaw.adapters.merge import merge

    model = load(tiny_base)
    before = quantized_base(model)
    inject(model, lora())
    merge(model)
    assert quantized_base(model) == before


def test_bitsandbytes_holds_the_same_base(wide_base):
    def theirs(**given):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **given)
        return AutoModelForCausalLM.from_pretrained(wide_base, quantization_config=config, dtype=torch.float32)

    files, config = sorted(wide_base.glob("*.safetensors")), AutoConfig.from_pretrained(wide_base)
    for double, kind in ((True, "nf4"), (False, "nf4-single")):
        ours, _ = load_quantized(files, config, torch.float32, METHODS[kind])
        assert quantized_base(theirs(bnb_4bit_use_double_quant=double)) == quantized_base(ours)
    model = theirs()
    with pytest.raises(UserError, match=r"this base doesn't say what .*_proj was quantised from; load the dense"):
        inject(model, lora())
    assert not state_of(model).configs


def test_no_4_bits_no_identity(tiny):
    assert quantized_base(tiny()) is None


def test_a_base_without_its_original_is_refused_by_name(tiny_base, tmp_path):
    model = load(tiny_base)
    forget_base(model)
    with pytest.raises(UserError, match=r"loftq.*this base doesn't say what model.layers.0.*--quantization nf4"):
        inject(model, lora())

    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "deltaw"}}))
    with pytest.raises(UserError, match=r"copy is stored in 4 bits already, and doesn't say what"):
        inject(model, lora())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="can't be read again"):
        inject(model, lora())
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model.layers.0.self_attn.q_proj.weight to compare"):
        inject(model, lora())
    assert not state_of(model).configs
