"""Adapters into models: whatever doesn't fit is refused by name (PEFT's files, bit for bit: tests/interop)."""

import json
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.adapters.peft_format import WEIGHTS_NAME, adapter_tensors, load_adapter, save_adapter
from deltaw.config import CONFIG_NAME
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.load import BaseInfo
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding"
)


def _tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def _config(folder, **fields):
    raw = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(raw | fields))


def _equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)


def test_the_base_s_own_embedding_in_pefts_file_is_recognised_and_not_another(tiny, stir, ids, tmp_path):
    theirs = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny("qwen2")
    receipt = load_adapter(model, tmp_path)
    assert receipt.ignored == ("model.embed_tokens.weight",) and "not needed: model.embed" in str(receipt)
    torch.testing.assert_close(model(ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight \(trained, but"):
        load_adapter(tiny("qwen2", seed=1), tmp_path)


def test_another_base_is_refused_with_both_names(tiny, tmp_path):
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        file.write_text(file.name)
    one, two = tiny(), tiny()
    inject(one, deltaw.LoraConfig())
    one.__dict__["_deltaw_base"] = BaseInfo("first/base", tmp_path, (files[0],))
    two.__dict__["_deltaw_base"] = BaseInfo("second/base", tmp_path, (files[1],))
    save_adapter(one, tmp_path / "a")
    with pytest.raises(UserError, match=r"trained on first/base \(sha256 .*this base is second/base \(sha256"):
        load_adapter(two, tmp_path / "a")
    assert not list(adapted_layers(two))
    receipt = load_adapter(two, tmp_path / "a", allow_other_base=True)
    assert receipt.num_parameters > 0 and "default: " in str(receipt)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MISFITS = {
    "missing A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), "q_proj: lora_A missing"),
    "missing module": (
        lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"],
        "q_proj: named by the config, without weights",
    ),
    "no tensors": (lambda t: t.clear(), "named by the config, without weights"),
    "unknown module": (
        lambda t: t.update({"base_model.model.model.layers.9.q.lora_A.weight": torch.ones(4, 32)}),
        "the model has no such module",
    ),
    "module not named": (
        lambda t: t.update({k.replace("v_proj", "k_proj"): v.clone() for k, v in t.items() if "v_proj" in k}),
        "k_proj: weights, but not named by the config",
    ),
    "unknown tensor": (lambda t: t.update({"base_model.model.extra.bias": torch.ones(3)}), "no such tensor"),
    "trained but not declared": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}),
        "lm_head.weight .trained, but neither",
    ),
    "magnitude without dora": (
        lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)}),
        "lora_magnitude_vector not expected",
    ),
    "wrong shape": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 31)}),
        r"q_proj.lora_A is \(4, 31\) .* needs \(4, 32\)",
    ),
    "wrong rank": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(5, 32)}), r"is \(5, 32\)"),
    "whole numbers": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "torch.int8"),
    "wrong prefix": (
        lambda t: [t.update({k.removeprefix("base_model."): t.pop(k)}) for k in [*t]],
        "keys must start with 'base_model.model.'",
    ),
    "the same twice": (
        lambda t: t.update({f"{Q0}.lora_A": t[f"{Q0}.lora_A.weight"].clone()}),
        "stands for the same tensor as another key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_named_and_the_model_stays(tiny, ids, saved, name):
    change, message = MISFITS[name]
    _tensors(saved, change)
    model = tiny()
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(UserError, match=message):
        load_adapter(model, saved)
    assert [(n, type(m)) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters()) and not state_of(model).configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r=8), r"is \(4, 32\) .* with r=8 needs \(8, 32\)"),
        (dict(r=10**9), "r=1000000000"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(use_dora=True), "lora_magnitude_vector missing"),
        (dict(target_modules=["q_proj"]), "v_proj: weights, but not named by the config"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), "k_proj: named by the config, without weights"),
        (dict(rank_pattern={"q_proj": 2}), r"with r=2 needs \(2, 32\)"),
        (dict(rank_pattern={r"((?:.|..|...)*)\1(?<!j)": 4}), "takes too long to match"),
        (dict(target_modules=r"((?:.|..|...)*)\1(?<!j)"), "takes too long to match"),
        (dict(modules_to_save=["lm_head"]), "lm_head.weight missing"),
        (dict(layers_to_transform=[0]), "layers.1.*weights, but not named"),
        (dict(new_thing=True), "unknown field 'new_thing'"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(tiny, saved, fields, message):
    _config(saved, **fields)
    model = tiny()
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        load_adapter(model, saved)
    assert time.process_time() - started < 1
    assert not list(adapted_layers(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_asked_for_of_a_base_that_has_none(tiny, saved, bias):
    _config(saved, bias=bias)  # PEFT takes that without a word, so such adapters are about
    model = tiny()
    load_adapter(model, saved)
    assert list(adapted_layers(model)) and not state_of(model).biases


def test_a_bias_that_is_missing_or_left_over_is_named(tiny, adapted, tmp_path):
    adapted(tiny("gpt2"), dict(target_modules=["c_attn"], bias="lora_only")).save_pretrained(tmp_path)
    key = "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"
    whole = load_file(tmp_path / WEIGHTS_NAME)
    _tensors(tmp_path, lambda t: t.pop(key))
    with pytest.raises(UserError, match=r"h.0.attn.c_attn.bias missing"):
        load_adapter(tiny("gpt2"), tmp_path)
    save_file(whole | {"base_model.model.transformer.h.0.ln_1.bias": torch.ones(32)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"h.0.ln_1.bias \(trained, but"):
        load_adapter(tiny("gpt2"), tmp_path)


def test_part_of_a_module_saved_whole_is_not_enough(tiny, adapted, tmp_path):
    adapted(tiny("gpt2"), dict(modules_to_save=["ln_f"])).save_pretrained(tmp_path)
    _tensors(tmp_path, lambda t: t.pop("base_model.model.transformer.ln_f.bias"))
    with pytest.raises(UserError, match=r"transformer.ln_f.bias missing"):
        load_adapter(tiny("gpt2"), tmp_path)


def test_modules_that_hold_modules_are_saved_whole_too(tiny, adapted, ids, tmp_path):
    ours = adapted(tiny(), dict(target_modules="qv", modules_to_save=["layers.1.mlp"]))
    ours.save_pretrained(tmp_path)
    again = deltaw.PeftModel.from_pretrained(tiny(), tmp_path)
    again.load_adapter(tmp_path, "second")  # over the copies of the first
    for name in ("default", "second"):
        again.set_adapter(name)
        assert torch.equal(again(input_ids=ids).logits, ours(input_ids=ids).logits)
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_heads_that_peft_names_by_guesswork_may_be_missing(tiny, ids, saved):
    _config(saved, modules_to_save=["classifier", "score"])
    assert load_adapter(tiny(), saved).num_parameters > 0


def test_loaded_adapters_keep_their_dtype_and_trained_ones_are_float32(tiny, adapted, ids, saved):
    trained = adapted(tiny(dtype=torch.bfloat16), {})
    assert {t.dtype for t in adapter_tensors(trained.get_base_model()).values()} == {torch.float32}
    _tensors(saved, lambda t: t.update({k: v.half() for k, v in t.items()}))
    for base in (torch.float32, torch.bfloat16):
        model = tiny(dtype=base)
        assert load_adapter(model, saved).dtype == torch.float16
        assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float16}
        assert model(ids).logits.dtype == base
        save_adapter(model, saved.parent / "again")
        assert _equal(load_file(saved.parent / "again" / WEIGHTS_NAME), load_file(saved / WEIGHTS_NAME))


def test_a_copy_to_train_leaves_the_file_alone(tiny, stir, ids, saved):
    before = (saved / WEIGHTS_NAME).read_bytes()
    model = tiny()
    load_adapter(model, saved, trainable=True)
    stir(model)
    assert (saved / WEIGHTS_NAME).read_bytes() == before
