"""Adapters go in and come out without a trace; what is active, what trains, what a copy shares."""

import copy

import pytest
import torch
from torch import nn

import deltaw
from deltaw.nn import inject as inject_module
from deltaw.nn import walk as walk_module
from deltaw.nn.inject import activate, inject, restore
from deltaw.nn.lowrank import LowRank
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers, saved_modules

STARTS = {
    "kaiming": {},
    "gaussian": dict(init_lora_weights="gaussian"),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "modules_to_save": dict(target_modules="qv", modules_to_save=["lm_head"]),
    "head": dict(target_modules=["lm_head"]),
    "embedding": dict(target_modules=["embed_tokens"]),
}


def _config(architecture, **config):
    config = dict(r=4, target_modules="all-linear") | config
    if architecture == "gpt2" and config["target_modules"] == ["embed_tokens"]:
        config["target_modules"] = ["wte", "wpe"]
    return deltaw.LoraConfig(**config)


def _stir(model):
    """Every factor away from its start."""
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for adapter in layer.adapters.children():
                for parameter in adapter.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_step_0_is_the_base_to_the_bit(tiny, architecture, ids, start, dtype):
    model = tiny(architecture, dtype=dtype)
    base = model(ids).logits
    inject(model, _config(architecture, **STARTS[start]))
    if start == "dora" and dtype is torch.bfloat16:  # the bias stands outside the scale, so it is rounded in by itself
        torch.testing.assert_close(model(ids).logits, base, atol=0.01, rtol=0)
    else:
        assert torch.equal(model(ids).logits, base)


def test_a_random_start_is_not_the_base(tiny, architecture, ids):
    model = tiny(architecture)
    base = model(ids).logits
    inject(model, _config(architecture, init_lora_weights=False))
    assert not torch.equal(model(ids).logits, base)


def _portrait(model):
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]


@pytest.mark.parametrize("start", STARTS)
def test_restore_is_the_inverse_of_inject(tiny, architecture, ids, start):
    model = tiny(architecture)
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays frozen, the rest thaws again
    before, logits = _portrait(model), model(ids).logits
    inject(model, _config(architecture, **STARTS[start]))
    inject(model, deltaw.LoraConfig(target_modules="mlp"), "second")
    _stir(model)
    assert not torch.equal(model(ids).logits, logits)
    restore(model)
    assert _portrait(model) == before
    assert torch.equal(model(ids).logits, logits)
    assert not state_of(model).configs and not [name for name in model.__dict__ if "deltaw" in name]


def test_restoring_one_leaves_the_others(tiny, ids):
    model = tiny()
    inject(model, _config("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]), "first")
    _stir(model)
    alone = model(ids).logits
    inject(model, _config("llama", init_lora_weights=False), "second")
    restore(model, "second")
    assert state_of(model).active.names == ()
    activate(model, ["first"])
    assert torch.equal(model(ids).logits, alone)
    assert {n.rpartition(".")[2] for n, _ in adapted_layers(model)} == {"q_proj"}
    with pytest.raises(deltaw.UserError, match="no adapter 'second' in this model \\(it has first\\)"):
        restore(model, "second")


def test_only_the_active_adapter_trains_and_the_base_never(tiny):
    model = tiny()
    inject(model, _config("llama"), "first")
    inject(model, _config("llama", modules_to_save=["lm_head"]), "second")
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    activate(model, ["first"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".first." in name for name in trained)
    assert len(trained) == sum(1 for name, _ in model.named_parameters() if ".first." in name)


def test_an_adapter_for_use_only_stays_frozen_through_switching(tiny):
    model = tiny()
    inject(model, _config("llama"), "used", trainable=False)
    inject(model, _config("llama"), "trained")
    activate(model, ["used"])
    assert not any(p.requires_grad for p in model.parameters())
    activate(model, ["trained", "used"])
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"trained"}
    activate(model, ["used"], trainable=True)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["train", "keys", "weight", "forward", "a-b_c@2+"])
def test_awkward_names_are_names(tiny, ids, name):
    model = tiny()
    inject(model, _config("llama", init_lora_weights=False, modules_to_save=["lm_head"]), name)
    model.train().eval()
    model(ids).logits.sum().backward()
    assert all(name in layer.adapters for _, layer in adapted_layers(model))
    restore(model, name)


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "ä", "x" * 200, "../up", "a b"])
def test_names_that_cannot_be_a_folder_or_a_key_are_refused(tiny, name):
    model = tiny()
    with pytest.raises(deltaw.UserError, match="adapter name"):
        inject(model, _config("llama"), name)
    assert not list(adapted_layers(model))


def test_names_once_each(tiny):
    model = tiny()
    inject(model, _config("llama"), "a")
    with pytest.raises(deltaw.UserError, match="already in the model"):
        inject(model, _config("llama"), "a")
    with pytest.raises(deltaw.UserError, match="one is named twice"):
        activate(model, ["a", "a"])
    with pytest.raises(deltaw.UserError, match="no adapter 'b'"):
        activate(model, ["a", "b"])
    assert state_of(model).active.names == ("a",)


@pytest.mark.parametrize("others", [False, True])
def test_an_inject_that_fails_midway_leaves_the_model_as_it_was(tiny, ids, monkeypatch, others):
    model = tiny()
    if others:
        inject(model, _config("llama", init_lora_weights=False), "there")
    before, logits = _portrait(model), model(ids).logits
    made = []

    def fail_at_the_third(layer, config, **facts):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError
        return LowRank(torch.zeros(2, layer.in_features), torch.zeros(layer.out_features, 2), scaling=1.0)

    monkeypatch.setattr(inject_module, "fresh_adapter", fail_at_the_third)
    with pytest.raises(MemoryError):
        inject(model, _config("llama", target_modules="qv", modules_to_save=["lm_head"]), "new")
    assert _portrait(model) == before
    assert torch.equal(model(ids).logits, logits)
    assert list(state_of(model).configs) == (["there"] if others else [])


def test_modules_saved_whole_and_adapted_layers_keep_apart(tiny):
    model = tiny()
    inject(model, _config("llama", target_modules=["q_proj"], modules_to_save=["mlp"]), "first")
    assert len(list(saved_modules(model))) == 2
    with pytest.raises(deltaw.UserError, match="q_proj is adapted or saved"):
        inject(model, _config("llama", target_modules=["k_proj"], modules_to_save=["q_proj"]), "second")
    with pytest.raises(deltaw.UserError, match="self_attn is adapted or saved"):
        inject(model, _config("llama", target_modules=["lm_head"], modules_to_save=["self_attn"]), "second")
    with pytest.raises(deltaw.UserError, match="no module is called up_proj"):
        inject(model, _config("llama", target_modules=["up_proj"]), "second")
    assert list(state_of(model).configs) == ["first"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [{}, dict(use_dora=True), dict(target_modules=["embed_tokens"])])
def test_factors_are_float32_at_least_and_do_not_promote(tiny, architecture, ids, dtype, config):
    model = tiny(architecture, dtype=dtype)
    inject(model, _config(architecture, **config))
    _stir(model)
    own = torch.promote_types(dtype, torch.float32)
    factors = [p for _, layer in adapted_layers(model) for p in layer.adapters.parameters()]
    assert {p.dtype for p in factors} == {own}
    outputs = []
    for _, layer in adapted_layers(model):
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    model(ids).logits.sum().backward()
    assert {*outputs} == {dtype}
    assert all(p.grad.dtype == own for p in factors)


def test_two_active_adapters_add_up(tiny, ids):
    model = tiny()
    inject(model, _config("llama", target_modules=["lm_head"], r=2, init_lora_weights=False), "a")
    inject(model, _config("llama", target_modules=["lm_head"], r=5, init_lora_weights=False), "b")
    logits = {}
    for names in ([], ["a"], ["b"], ["a", "b"]):
        activate(model, names)
        logits[tuple(names)] = model(ids).logits
    expected = logits["a",] + logits["b",] - logits[()]
    torch.testing.assert_close(logits["a", "b"], expected, atol=1e-5, rtol=1e-5)


def test_a_dora_adapter_is_active_alone(tiny):
    model = tiny()
    inject(model, _config("llama", use_dora=True), "d")
    inject(model, _config("llama"), "b")
    with pytest.raises(deltaw.UserError, match="'d' has a DoRA magnitude"):
        activate(model, ["b", "d"])
    assert state_of(model).active.names == ("b",)


@pytest.mark.parametrize("config", [{}, dict(use_dora=True), dict(bias="all", modules_to_save=["lm_head"])])
def test_a_deep_copy_shares_nothing(tiny, ids, config):
    model = tiny("qwen2")
    inject(model, _config("qwen2", **config))
    _stir(model)
    logits = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, logits)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    _stir(twin)
    activate(twin, [])
    assert torch.equal(model(ids).logits, logits)
    assert state_of(model).active.names == ("default",)
    activate(twin, ["default"])
    restore(model)
    assert not torch.equal(twin(ids).logits, logits) and not torch.equal(twin(ids).logits, model(ids).logits)


def test_a_model_with_dora_can_be_pickled(tiny, ids, tmp_path):
    model = tiny()
    inject(model, _config("llama", use_dora=True))
    _stir(model)
    logits = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(ids).logits, logits)


def test_tied_weights_and_padding_are_untouched_by_training(tiny, ids):
    model = tiny("qwen2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = ["embed_tokens", "lm_head", "q_proj"]
    inject(model, deltaw.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_saved_copy_of_a_tied_head_is_cut_loose(tiny, ids):
    model = tiny("qwen2")
    inject(model, deltaw.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    (_, saved), *_ = saved_modules(model)
    with torch.no_grad():
        saved.copies["default"].weight.add_(1.0)
    assert not torch.equal(saved.copies["default"].weight, model.model.embed_tokens.weight)
    assert saved.base_layer.weight is model.model.embed_tokens.weight


def test_layers_answer_for_their_base(tiny):
    model = tiny("gpt2")
    inject(model, deltaw.LoraConfig(target_modules=["c_attn", "wte"]))
    layers = dict(adapted_layers(model))
    linear, embedding = layers["transformer.h.0.attn.c_attn"], layers["transformer.wte"]
    assert (linear.in_features, linear.out_features) == (32, 96)
    assert linear.weight is linear.base_layer.weight and linear.bias is linear.base_layer.bias
    assert (embedding.num_embeddings, embedding.embedding_dim) == (97, 32)
    assert embedding.weight is model.lm_head.weight
    assert isinstance(model.get_input_embeddings(), type(embedding))
    assert "active=['default']" in repr(linear)
    assert isinstance(linear, nn.Module) and linear.adapter("default").rank == 8


def test_switching_does_not_walk_through_the_model(tiny, ids, monkeypatch):
    model = tiny()
    for name in "ab":
        inject(model, _config("llama", init_lora_weights=False, modules_to_save=["lm_head"]), name)
    logits = model(ids).logits
    for module in (inject_module, walk_module):
        monkeypatch.setattr(module, "logical_modules", None)
    activate(model, ["a"])
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "lora" in n} == {"a"}
    assert not torch.equal(model(ids).logits, logits)
    activate(model, ["b"])
    assert torch.equal(model(ids).logits, logits)
