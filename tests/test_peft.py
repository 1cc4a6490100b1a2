"""``PeftModel``: several adapters, mixed batches row by row, and errors that leave things as they were."""

import copy
from contextlib import suppress

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import deltaw
from deltaw.nn.batch import checkpoint_context
from deltaw.nn.linear import AdaptedLinear
from deltaw.nn.walk import adapted_layers
from deltaw.ops import frozen

ROWS = ["a", "__base__", "d", "a", "b", "__base__"]
A, B, D = dict(r=2), dict(r=5, lora_alpha=3), dict(r=4, use_dora=True)


@pytest.fixture
def six():
    """Six rows of nine tokens."""
    return torch.randint(97, (6, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mixed(tiny):
    """A model with LoRA adapters a and b and a DoRA adapter d, every B non-zero; a is active."""

    def make(architecture="llama", **config):
        model = None
        for name, own in (("a", A), ("b", B), ("d", D)):
            given = deltaw.LoraConfig(**dict(target_modules="all-linear", init_lora_weights=False) | config | own)
            if model is None:
                model = deltaw.get_peft_model(tiny(architecture), given, name)
            else:
                model.add_adapter(name, given)
        return model

    return make


def _alone(model, ids, names):
    """Each row through the model with its own adapter, one after the other."""
    out = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                out.append(model(input_ids=row[None]).logits)
        else:
            model.set_adapter(name)
            out.append(model(input_ids=row[None]).logits)
    model.set_adapter("a")
    return torch.cat(out)


def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(mixed, architecture, six):
    model = mixed(architecture)
    rows = model(input_ids=six, adapter_names=ROWS).logits
    torch.testing.assert_close(rows, _alone(model, six, ROWS), atol=1e-5, rtol=1e-5)
    together = model(input_ids=six).logits
    assert (rows - together)[[1, 2, 4]].abs().amax((1, 2)).min() > 1e-3


def test_base_rows_are_the_base_to_the_bit(mixed, architecture, six):
    model = mixed(architecture)
    rows = model(input_ids=six, adapter_names=ROWS).logits
    with model.disable_adapter():
        base = model(input_ids=six).logits
    if architecture == "gpt2":  # with a DoRA row in the batch the bias is added by itself, which rounds differently
        torch.testing.assert_close(rows[[1, 5]], base[[1, 5]], atol=1e-6, rtol=0)
        rows = model(input_ids=six, adapter_names=["a" if n == "d" else n for n in ROWS]).logits
    assert torch.equal(rows[[1, 5]], base[[1, 5]])
    assert torch.equal(model(input_ids=six, adapter_names=["__base__"] * 6).logits, base)


def test_a_mixed_batch_takes_one_frozen_product_a_module(mixed, six, monkeypatch):
    model, products = mixed(), []
    multiply = frozen.DenseWeight.multiply

    def counted(self, x, bias=None):
        products.append(len(x))
        return multiply(self, x, bias)

    model(input_ids=six, adapter_names=ROWS)  # DoRA's norms, products of their own, are taken here
    for _, layer in adapted_layers(model.get_base_model()):
        layer.adapters.requires_grad_(False)
    model(input_ids=six, adapter_names=ROWS)
    monkeypatch.setattr(frozen.DenseWeight, "multiply", counted)
    model(input_ids=six, adapter_names=ROWS)
    num_modules = sum(1 for _ in adapted_layers(model.get_base_model()))
    assert products == [six.numel()] * num_modules
    products.clear()
    model.generate(input_ids=six, adapter_names=ROWS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert products == [six.numel()] * num_modules + [len(six)] * 2 * num_modules  # prefill, then a token each


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(mixed, six):
    model, grads = mixed(), []
    for names in (ROWS, None):
        model.zero_grad()
        logits = model(input_ids=six, adapter_names=names).logits if names else _alone(model, six, ROWS)
        logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if ".adapters.a." in n})
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_modules_saved_whole_go_by_row(tiny, six):
    model = deltaw.get_peft_model(tiny(), deltaw.LoraConfig(target_modules="qv", modules_to_save=["lm_head"]), "a")
    model.add_adapter("b", deltaw.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    with torch.no_grad():
        model.base_model.lm_head.copies["a"].weight.mul_(2)
    names = ["b", "a", "__base__", "a", "b", "__base__"]
    rows = model(input_ids=six, adapter_names=names).logits
    torch.testing.assert_close(rows, _alone(model, six, names), atol=1e-5, rtol=1e-5)


def test_generate_with_adapter_names(mixed, six):
    model = mixed()
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = model.generate(input_ids=six, adapter_names=ROWS, **given)
    for row, name in enumerate(ROWS):
        one = six[row : row + 1]
        alone = model.generate(input_ids=one, adapter_names=[name], **given)
        assert torch.equal(together[row], alone[0])
    beams = model.generate(input_ids=six, adapter_names=ROWS, num_beams=2, **given)
    for row, name in enumerate(ROWS):
        alone = model.generate(input_ids=six[row : row + 1], adapter_names=[name], num_beams=2, **given)
        assert torch.equal(beams[row], alone[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "nobody", "b", "a", "a", "a"], "no adapter nobody; loaded are a, b, d"),
        (["a"] * 5, "5 names, which 54 rows"),
        (["a"] * 7, "7 names, which 54 rows"),
        ([], "adapter_names is empty"),
    ],
)
def test_bad_adapter_names(mixed, six, names, message):
    model = mixed()
    before = model(input_ids=six).logits
    with pytest.raises(ValueError, match=message):
        model(input_ids=six, adapter_names=names)
    assert torch.equal(model(input_ids=six).logits, before)


@pytest.mark.parametrize("active", ["owner", "a"])
def test_an_owner_of_biases_does_not_lend_them_to_other_rows(tiny, ids, active):
    model = deltaw.get_peft_model(tiny("gpt2"), deltaw.LoraConfig(target_modules=["c_attn"], bias="all"), "owner")
    model.add_adapter("a", deltaw.LoraConfig(target_modules=["c_fc"]))
    model.set_adapter(active)
    names = ["a", "__base__"] if active == "owner" else ["owner", "a"]
    with pytest.raises(deltaw.UserError, match="'owner' has biases of its own"):
        model(input_ids=ids, adapter_names=names)
    model.set_adapter("a")
    model(input_ids=ids, adapter_names=["a", "__base__"])


def _gradients(model, ids, names):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids, adapter_names=names).loss
    loss.backward()  # outside the context that knew the names
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("names", [None, ROWS])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_changes_no_gradient(mixed, six, names, dropout):
    model = mixed(lora_dropout=dropout).train()
    for p in (p for n, p in model.named_parameters() if ".adapters." in n):
        p.requires_grad_(True)
    plain = _gradients(model, six, names)
    model.activation_checkpointing_enable()
    runs = []
    hook = next(m for _, m in adapted_layers(model.get_base_model())).register_forward_hook(lambda *_: runs.append(1))
    checkpointed = _gradients(model, six, names)
    hook.remove()
    assert len(runs) == 2  # it did run again
    assert plain.keys() == checkpointed.keys()
    assert any(".d." in n for n in plain) is (names is not None)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_that_would_forget_the_names_is_refused(mixed, six):
    model = mixed().train()
    model.base_model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(deltaw.UserError, match=r"needs PeftModel.activation_checkpointing_enable\(\)"):
        model(input_ids=six, adapter_names=ROWS)
    model.base_model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
    model(input_ids=six, adapter_names=ROWS)
    model.base_model.activation_checkpointing_enable({"use_reentrant": False})
    model.eval()(input_ids=six, adapter_names=ROWS)


def test_disable_adapter_gives_back_what_was_active(mixed, six):
    model = mixed()
    model.set_adapter(["a", "b"])
    before = model(input_ids=six).logits
    trained = [p.requires_grad for p in model.parameters()]
    with suppress(RuntimeError), model.disable_adapter():
        assert model.active_adapters == []
        with pytest.raises(deltaw.UserError, match="no adapter is active"):
            _ = model.active_adapter
        raise RuntimeError
    assert torch.equal(model(input_ids=six).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trained
    with pytest.warns(UserWarning, match="2 adapters are active"):
        assert model.active_adapter == "a"


def test_loaded_adapters_are_frozen_until_they_are_set_to_train(mixed, tiny, tmp_path, six):
    mixed().save_pretrained(tmp_path)
    model = deltaw.PeftModel.from_pretrained(tiny(), tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    assert model.active_adapters == ["default"]
    with model.disable_adapter():
        pass
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("b")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.load_adapter(tmp_path / "d", "d", is_trainable=True)
    assert model.active_adapters == ["b"]
    model.delete_adapter("default")
    assert list(model.peft_config) == ["b", "d"]
    torch.testing.assert_close(model(input_ids=six).logits, _b_alone(mixed(), six), atol=0, rtol=0)


def _b_alone(model, ids):
    model.set_adapter("b")
    return model(input_ids=ids).logits


def test_unload_gives_the_model_that_came(tiny, ids):
    base = tiny()
    logits, kinds = base(ids).logits, [type(m) for m in base.modules()]
    model = deltaw.get_peft_model(base, deltaw.LoraConfig(init_lora_weights=False))
    assert not torch.equal(model(input_ids=ids).logits, logits)
    assert model.unload() is base is model.get_base_model()
    assert torch.equal(base(ids).logits, logits) and [type(m) for m in base.modules()] == kinds


def test_a_second_get_peft_model_is_refused(mixed):
    model = mixed()
    with pytest.raises(deltaw.UserError, match="has adapters already"):
        deltaw.get_peft_model(model.base_model, deltaw.LoraConfig())
    with pytest.raises(deltaw.UserError, match="'a' is already in the model"):
        model.add_adapter("a", deltaw.LoraConfig())
    assert model.active_adapters == ["a"]


def test_the_wrapper_answers_for_its_model(mixed, six):
    model = mixed()
    assert model.config is model.base_model.config and model.device.type == "cpu"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=six).logits, model(input_ids=six).logits)
    assert isinstance(next(m for _, m in adapted_layers(twin.get_base_model())), AdaptedLinear)


def test_classification_heads_train_whole_without_touching_the_config():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))
    config = deltaw.LoraConfig(task_type=deltaw.TaskType.SEQ_CLS)
    model = deltaw.get_peft_model(base, config)
    assert config.modules_to_save is None
    assert model.peft_config["default"].modules_to_save == ["score"]
    assert any("score" in n and p.requires_grad for n, p in model.named_parameters())


def test_saving_writes_what_was_asked_for(mixed, tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    with pytest.raises(deltaw.UserError, match="no adapter 'x'"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])
    (tmp_path / "file").touch()
    with pytest.raises(deltaw.UserError, match="no folder can be made there"):
        model.save_pretrained(tmp_path / "file", selected_adapters=["b"])
