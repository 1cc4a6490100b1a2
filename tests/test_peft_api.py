"""PEFT's functions and methods under PEFT's names, measured against PEFT where it has them."""

import copy
import dataclasses
import inspect
import io
import json
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import deltaw
from deltaw.nn.batch import checkpoint_context

QV = dict(r=4, target_modules=["q_proj", "v_proj"])


def random(**more):
    return deltaw.LoraConfig(**QV | dict(init_lora_weights=False) | more)


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a base and one with an adapter on it, and the model that both came from."""
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = deltaw.get_peft_model(base, random(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    return SimpleNamespace(base=tmp_path / "base", adapter=tmp_path / "adapter", model=model)


def test_paths_through_the_wrapper_are_pefts(tiny, ids):
    ours = deltaw.get_peft_model(tiny(), random(task_type="CAUSAL_LM"))
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**QV, task_type="CAUSAL_LM"))
    for model in (ours, theirs):
        assert type(model).__name__ == "PeftModelForCausalLM" and type(model.base_model).__name__ == "LoraModel"
        assert model.base_model.model is model.get_base_model()
        assert isinstance(model.base_model.model, PreTrainedModel)
        assert model.base_model.model.model.layers[0].self_attn.q_proj.in_features == 32
        assert model.model is model.base_model.model.model or model.model is model.base_model.model
        assert model.config.hidden_size == 32 and model.device.type == "cpu" and model.dtype == torch.float32
        assert model.get_input_embeddings().weight.shape == (97, 32)
        assert model.active_adapter == "default" and model.active_adapters == ["default"]
        assert model.modules_to_save is None and model.peft_config["default"].r == 4
        assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        assert model.num_parameters() == theirs.num_parameters()
        with pytest.raises(AttributeError, match="nonsense"):
            _ = model.base_model.nonsense
    with torch.no_grad():
        assert torch.equal(ours.base_model(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_methods_have_pefts_arguments():
    ours = deltaw.PeftModel
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter"):
        theirs = inspect.signature(getattr(peft.LoraModel, name)).parameters
        own = list(inspect.signature(getattr(ours, name)).parameters)
        assert own[: len(theirs)] == list(theirs), name
        assert own[len(theirs) :] == (["requantize"] if name == "merge_and_unload" else []), name
    for name in ("set_adapter", "delete_adapter", "disable_adapter", "get_base_model", "print_trainable_parameters"):
        theirs = inspect.signature(getattr(peft.PeftModel, name)).parameters
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(theirs), name
    assert list(inspect.signature(deltaw.get_peft_model).parameters) == list(
        inspect.signature(peft.get_peft_model).parameters
    )


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_it_is_pefts_class_to_those_who_ask_and_ours_all_the_same(tiny, ids):
    model = deltaw.get_peft_model(tiny(), random(task_type="CAUSAL_LM")).eval()
    assert isinstance(model, peft.PeftModel) and isinstance(model, torch.nn.Module)
    assert isinstance(model, deltaw.PeftModel) and isinstance(model, deltaw.PeftModelForCausalLM)
    assert not isinstance(model, deltaw.PeftModelForSeq2SeqLM) and not isinstance(model, PreTrainedModel)
    logits = model(input_ids=ids).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in copies:
        assert type(twin) is deltaw.PeftModelForCausalLM and torch.equal(twin(input_ids=ids).logits, logits)
        twin.delete_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_state_dicts_round_trip(tiny, ids):
    model, other = (deltaw.get_peft_model(tiny(), random()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("init", [False, "pissa"])
def test_an_adapters_tensors_out_and_in(tiny, ids, init):
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(**QV, init_lora_weights=init))
    tensors = {k: v.clone() for k, v in deltaw.get_peft_model_state_dict(model).items()}
    keys = peft.get_peft_model_state_dict(peft.get_peft_model(tiny(), peft.LoraConfig(**QV))).keys()
    assert tensors.keys() == keys
    logits = model(input_ids=ids).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    assert not torch.allclose(model(input_ids=ids).logits, logits)
    result = deltaw.set_peft_model_state_dict(model, tensors)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    with pytest.raises(deltaw.UserError, match="no adapter 'x' in this model"):
        deltaw.get_peft_model_state_dict(model, adapter_name="x")
    with pytest.raises(deltaw.UserError, match="not the tensor that adapter 'default' has there"):
        deltaw.set_peft_model_state_dict(model, {"nonsense": torch.zeros(1)})


def test_loading_over_an_adapter_keeps_its_parameters(saved, tiny, ids):
    logits = saved.model(input_ids=ids).logits
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(**QV)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    receipt = model.load_adapter(saved.adapter, "default", is_trainable=True)
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    assert receipt.num_parameters == sum(p.numel() for p in parameters)
    assert torch.equal(model(input_ids=ids).logits, logits)
    other = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(**QV | dict(lora_alpha=99)))
    with pytest.raises(deltaw.UserError, match="'default' is in the model with other settings"):
        other.load_adapter(saved.adapter, "default")
    stranger = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(r=4, target_modules=["k_proj"]))
    with pytest.raises(deltaw.UserError, match="with other settings"):
        stranger.load_adapter(saved.adapter, "default")


def test_options_of_loading(saved, tiny, ids, tmp_path):
    logits = saved.model(input_ids=ids).logits
    saved.adapter.rename(tmp_path / "inner")
    model = deltaw.PeftModel.from_pretrained(
        tiny(), tmp_path, subfolder="inner", token=None, device_map="auto", torch_dtype="auto"
    )
    assert type(model) is deltaw.PeftModelForCausalLM and not model.training
    assert torch.equal(model(input_ids=ids).logits, logits)
    doubled = dataclasses.replace(deltaw.PeftConfig.from_pretrained(tmp_path / "inner"), lora_alpha=16)
    model = deltaw.PeftModel.from_pretrained(tiny(), tmp_path / "inner", config=doubled)
    assert not torch.allclose(model(input_ids=ids).logits, logits)
    with pytest.raises(deltaw.UserError, match=r"key_mapping=.* is not supported when an adapter is loaded"):
        model.load_adapter(tmp_path / "inner", "b", key_mapping={"a": "b"})
    assert deltaw.load_peft_weights(tmp_path / "inner").keys() == deltaw.get_peft_model_state_dict(saved.model).keys()


def test_what_will_train_is_float32(tiny, tmp_path):
    model = deltaw.get_peft_model(tiny(dtype=torch.bfloat16), random(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    for is_trainable, cast, dtype in (
        (False, True, torch.bfloat16),
        (True, True, torch.float32),
        (True, False, torch.bfloat16),
    ):
        base = tiny(dtype=torch.bfloat16)
        loaded = deltaw.PeftModel.from_pretrained(
            base, tmp_path, is_trainable=is_trainable, autocast_adapter_dtype=cast
        )
        assert {p.dtype for n, p in loaded.named_parameters() if ".adapters." in n} == {dtype}
        assert loaded.training is is_trainable


def test_the_folder_of_an_adapter_is_enough(saved, ids):
    logits = saved.model(input_ids=ids).logits
    model = deltaw.AutoPeftModelForCausalLM.from_pretrained(saved.adapter, dtype=torch.float32)
    assert type(model) is deltaw.PeftModelForCausalLM and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, logits)
    with pytest.raises(deltaw.UserError, match="AutoPeftModelForSeq2SeqLM is for SEQ_2_SEQ_LM; the adapter's"):
        deltaw.AutoPeftModelForSeq2SeqLM.from_pretrained(saved.adapter)
    with pytest.raises(deltaw.UserError, match="names no class of transformers for its base; use one of AutoPeft"):
        deltaw.AutoPeftModel.from_pretrained(saved.adapter)
    with pytest.raises(deltaw.UserError, match=r"only used as AutoPeftModel.from_pretrained"):
        deltaw.AutoPeftModel()
    config = json.loads((saved.adapter / "adapter_config.json").read_text())
    mapped = config | {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM",
                       "parent_library": "transformers.models.llama.modeling_llama"}}  # fmt: skip
    (saved.adapter / "adapter_config.json").write_text(json.dumps(mapped))
    assert torch.equal(deltaw.AutoPeftModel.from_pretrained(saved.adapter)(input_ids=ids).logits, logits)
    for name, message in ((None, "names no base"), ("/nowhere", "base /nowhere can't be loaded")):
        (saved.adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(deltaw.UserError, match=message):
            deltaw.AutoPeftModelForCausalLM.from_pretrained(saved.adapter)


@pytest.mark.parametrize(
    ("place", "device"), [("auto", "auto"), ("cpu", "cpu"), ({"": "cpu"}, "cpu"), ({"": 0}, "cuda:0"), (None, "auto")]
)
def test_an_embedded_base_takes_what_tutorials_give(saved, tiny, monkeypatch, place, device):
    config = json.loads((saved.adapter / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": "smollm2-135m"}
    (saved.adapter / "adapter_config.json").write_text(json.dumps(named))
    asked = {}
    monkeypatch.setattr("deltaw.peft.auto.load_base", lambda name, **given: (asked.update(given) or tiny(), None))
    load = deltaw.AutoPeftModelForCausalLM.from_pretrained
    load(saved.adapter, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, device_map=place)
    assert asked == dict(dtype=torch.bfloat16, device=device)
    several = {"a": 0, "b": "cpu"}
    for options, message in ((dict(device_map=several), "several devices"), (dict(variant="x"), "variant")):
        with pytest.raises(deltaw.UserError, match=rf"dtype and one device only; leave .*{message}.* out"):
            load(saved.adapter, **options)


@pytest.fixture
def grown(saved):
    """A base with three more tokens than its folder has; the new rows are random."""
    base = AutoModelForCausalLM.from_pretrained(saved.base)
    base.resize_token_embeddings(100, mean_resizing=False)
    return base


def resized(saved):
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_pretrained(saved.base)
    base.resize_token_embeddings(100, mean_resizing=False)
    return base


@pytest.mark.parametrize("save", [True, "auto"])
def test_a_resized_vocabulary_goes_with_the_adapter(saved, grown, tmp_path, save):
    ids = torch.tensor([[5, 97, 98, 99]])
    model = deltaw.get_peft_model(grown, random(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "out", save_embedding_layers=save)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        other = resized(saved)
        plain = other(input_ids=ids).logits
        back = deltaw.PeftModel.from_pretrained(other, tmp_path / "out")
        assert torch.equal(back(input_ids=ids).logits, logits)
        with back.disable_adapter():  # the other base's embeddings are its own still
            assert torch.equal(back(input_ids=ids).logits, plain)
        theirs = peft.PeftModel.from_pretrained(resized(saved), tmp_path / "out")
        torch.testing.assert_close(theirs(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(deltaw.UserError, match=r"call model.resize_token_embeddings\(100\) first"):
        deltaw.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), tmp_path / "out")


def test_a_run_on_a_resized_base_is_taken_up_again(saved, grown, tmp_path):
    ids = torch.tensor([[5, 97, 98, 99]])
    model = deltaw.get_peft_model(grown, random()).eval()
    model.save_pretrained(tmp_path)
    again = deltaw.get_peft_model(resized(saved), deltaw.LoraConfig(**QV)).eval()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_embeddings_in_a_file_of_pefts_are_the_adapters_own(saved, grown, tmp_path):
    ids = torch.tensor([[5, 97, 98, 99]])
    config = peft.LoraConfig(**QV, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(grown, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = deltaw.PeftModel.from_pretrained(resized(saved), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_embeddings_are_written_only_where_they_must_be(saved, grown, tmp_path):
    def keys(folder):
        return [k for k in load_file(folder / "adapter_model.safetensors") if "embed" in k or "lm_head" in k]

    assert keys(saved.adapter) == []
    model = deltaw.get_peft_model(grown, random())
    model.save_pretrained(tmp_path / "never", save_embedding_layers=False)
    assert keys(tmp_path / "never") == []
    model.add_adapter("own", random(modules_to_save=["lm_head", "embed_tokens"]))
    model.save_pretrained(tmp_path / "own", selected_adapters=["own"])
    assert len(keys(tmp_path / "own" / "own")) == 2
    model.add_adapter("rows", deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "rows", selected_adapters=["rows"])
    assert len(keys(tmp_path / "rows" / "rows")) == 2
    adapted = deltaw.get_peft_model(resized(saved), deltaw.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match=r"embed_tokens was resized and is adapted: its new rows are not stored"):
        adapted.save_pretrained(tmp_path / "adapted")
    tokens = deltaw.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[97, 98, 99])
    deltaw.get_peft_model(resized(saved), tokens).save_pretrained(tmp_path / "tokens")
    assert not any(k.endswith("embed_tokens.weight") for k in keys(tmp_path / "tokens"))


@pytest.mark.parametrize("trained", [True, False])
def test_added_tokens_resize_the_base_first(tiny_base, tmp_path, trained):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<one>", "<two>"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = ["embed_tokens", "lm_head"] if trained else None
    model = deltaw.get_peft_model(base, random(modules_to_save=whole, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = deltaw.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("a <one> and <two>", return_tensors="pt").input_ids
    assert int(ids.max()) >= len(tokenizer) - 2
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


def test_classes_by_task():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))
    model = deltaw.get_peft_model(base, deltaw.LoraConfig(task_type="SEQ_CLS"))
    assert type(model) is deltaw.PeftModelForSequenceClassification and model.modules_to_save == {"score"}
    model.add_adapter("b", deltaw.LoraConfig(task_type="SEQ_CLS"))
    assert model.peft_config["b"].modules_to_save == ["score"]


def test_a_config_of_the_wrong_import_is_named(tiny):
    with pytest.raises(deltaw.UserError, match=r"peft_config is a peft.LoraConfig; expected deltaw.LoraConfig"):
        deltaw.get_peft_model(tiny(), peft.LoraConfig())
    for option in ("mixed", "low_cpu_mem_usage"):
        with pytest.raises(deltaw.UserError, match=rf"get_peft_model\({option}=True\) is not supported"):
            deltaw.get_peft_model(tiny(), deltaw.LoraConfig(), **{option: True})
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(), revision="v2")
    assert model.peft_config["default"].revision == "v2"


def test_other_methods_in_a_file_are_refused_by_name(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}')
    for read in (deltaw.PeftConfig.from_pretrained, lambda path: deltaw.PeftModel.from_pretrained(tiny(), path)):
        with pytest.raises(deltaw.UserError, match="peft_type='PROMPT_TUNING': only LORA adapters are supported"):
            read(tmp_path)


def test_convolutions_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4))
    with pytest.raises(deltaw.UserError, match=r"neither linear nor an embedding: 0 \(Conv2d\)"):
        deltaw.get_peft_model(model, deltaw.LoraConfig(target_modules=["0", "1"]))


def test_saving_refuses_what_it_would_not_do(tiny, tmp_path):
    model = deltaw.get_peft_model(tiny(), random())
    for option, message in (
        ({"safe_serialization": False}, "written as safetensors only"),
        ({"state_dict": {}}, r"state_dict=…\) is not supported"),
    ):
        with pytest.raises(deltaw.UserError, match=message):
            model.save_pretrained(tmp_path / "out", **option)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=None, save_embedding_layers="auto")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_layers_off_and_on_again(tiny, ids):
    model = deltaw.get_peft_model(tiny(), random()).eval()
    logits = model(input_ids=ids).logits
    model.disable_adapter_layers()
    model.disable_adapter_layers()
    assert torch.equal(model(input_ids=ids).logits, tiny()(input_ids=ids).logits)
    model.enable_adapter_layers()
    model.enable_adapter_layers()
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_deleting_the_active_adapter_activates_another(tiny):
    model = deltaw.get_peft_model(tiny(), random(), "a")
    model.add_adapter("b", random())
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_peft_config is model.peft_config["b"]
    model.delete_adapter("b")
    assert model.peft_config == {} and model.active_adapters == []


def test_what_is_deleted_while_switched_off_stays_away(tiny):
    model = deltaw.get_peft_model(tiny(), random(), "a")
    model.add_adapter("b", random())
    model.set_adapter(["a", "b"])
    with model.disable_adapter():
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    with model.disable_adapter():
        model.delete_adapter("b")
    assert model.active_adapters == [] and model.peft_config == {}


def test_merging_and_blending_through_the_wrapper(tiny, ids, capsys):
    model = deltaw.get_peft_model(tiny(), random(), "a").eval()
    model.add_adapter("b", random())
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="cat")
    assert model.active_adapters == ["a"]
    model.set_adapter("both", inference_mode=True)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, logits)
        merged = model.merge_and_unload(progressbar=True, adapter_names=["both"])
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert "merging both" in capsys.readouterr().out and type(merged) is type(tiny())
    with pytest.raises(deltaw.UserError, match="svd_driver"):
        model.add_weighted_adapter(["a"], [1.0], "c", svd_driver="gesvd")


def test_an_adapter_without_a_wrapper(tiny, ids):
    base = tiny()
    assert deltaw.inject_adapter_in_model(random(), base) is base
    assert not torch.equal(base(ids).logits, tiny()(ids).logits)


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_either_name(tiny, ids, name, use_reentrant):
    model = deltaw.get_peft_model(tiny(), random()).train()
    getattr(model, name)({"use_reentrant": use_reentrant})
    run = model.base_model.model.model.layers[0]._gradient_checkpointing_func
    assert run.keywords.get("context_fn") is (None if use_reentrant else checkpoint_context)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast_equals_pefts(tiny, ids, dtype, use_dora):
    config = QV | dict(target_modules="all-linear", use_dora=use_dora)
    ours = deltaw.get_peft_model(tiny("qwen2"), deltaw.LoraConfig(**config)).train()
    theirs = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(**config)).train()
    with torch.no_grad():
        for key, tensor in deltaw.get_peft_model_state_dict(ours).items():
            tensor.normal_(std=0.1) if "lora_" in key and "magnitude" not in key else tensor.mul_(1.1)
    peft.set_peft_model_state_dict(theirs, deltaw.get_peft_model_state_dict(ours))
    exact, grads, errors = ours(input_ids=ids).logits.detach(), [], []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype):
            out = model(input_ids=ids, labels=ids)
        assert out.logits.dtype == dtype
        out.loss.backward()
        errors.append((out.logits.detach() - exact).norm() / exact.norm())
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert {g.dtype for g in grads[-1]} == {torch.float32}
    norms = [sum(g.norm() ** 2 for g in grad).sqrt() for grad in grads]
    assert abs(norms[0] - norms[1]) < 0.02 * norms[1]
    assert errors[0] < 1.2 * errors[1] < 0.03


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_groups_are_pefts(tiny, use_dora):
    from peft.optimizers import create_loraplus_optimizer

    given = dict(QV, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"], use_dora=use_dora)
    rates = dict(lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=(0.9, 0.95))
    ours = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(**given))
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**given))
    groups = [
        [
            (g["lr"], g["weight_decay"], g["betas"], sorted(p.numel() for p in g["params"]))
            for g in optimizer.param_groups
        ]
        for optimizer in (
            deltaw.create_loraplus_optimizer(ours, torch.optim.AdamW, **rates),
            create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates),
        )
    ]
    assert [g[:3] for g in groups[0]] == [g[:3] for g in groups[1]]
    assert groups[0][:2] == groups[1][:2]  # A and embeddings; PEFT lets the copy of an RMS norm decay, we don't
    sizes = [sorted(size for group in optimizer for size in group[3]) for optimizer in groups]
    assert sizes[0] == sizes[1]
    ours.set_adapter("default", inference_mode=True)
    with pytest.raises(deltaw.UserError, match="nothing in this model requires a gradient"):
        deltaw.create_loraplus_optimizer(ours, torch.optim.AdamW, **rates)


def test_pushing_uploads_what_saving_writes(tiny, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, **given):
            calls.append((name, given))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, folder_path, **given):
            from pathlib import Path

            calls.append((sorted(p.name for p in Path(folder_path).iterdir()), given))
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = deltaw.get_peft_model(tiny(), random())
    assert model.push_to_hub("mine", private=True, token="t") == "done"
    assert calls[:2] == ["t", ("mine", {"private": True, "exist_ok": True})]
    files, given = calls[2]
    assert files == ["adapter_config.json", "adapter_model.safetensors"] and given["repo_id"] == "me/mine"


def test_switching_off_and_on_works_from_either_wrapper(tiny):
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.base_model.disable_adapter_layers()
    model.disable_adapter_layers()
    assert model.active_adapters == []
    model.enable_adapter_layers()
    assert model.active_adapters == ["default"]


def test_methods_of_peft_that_are_missing_say_what_to_do(tiny):
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    assert not hasattr(model, "get_layer_status")
    with pytest.raises(AttributeError, match=r"get_layer_status.*active_adapters"):
        model.base_model.get_layer_status()
