"""Trained biases belong to one adapter; without it the base is the base, to the bit."""

import pytest
import torch

import deltaw
from deltaw.nn.inject import activate, inject, restore
from deltaw.nn.state import state_of


def _biases(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("bias")}


@pytest.fixture(params=["all", "lora_only"])
def trained(request, tiny, ids):
    """(model with a stepped adapter that owns biases, base logits)."""
    model = tiny("gpt2")
    base = model(ids).logits
    inject(model, deltaw.LoraConfig(target_modules=["c_attn"], bias=request.param), "owner")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model, base


def test_which_biases_train(tiny):
    for which, wanted in (("all", 2 * 6 + 1), ("lora_only", 2)):
        model = tiny("gpt2")
        inject(model, deltaw.LoraConfig(target_modules=["c_attn"], bias=which))
        assert sum(p.requires_grad for p in _biases(model).values()) == wanted


def test_switching_off_gives_the_base_to_the_bit_and_on_gives_it_back(trained, ids):
    model, base = trained
    adapted = model(ids).logits
    assert not torch.equal(adapted, base)
    for _ in range(2):
        activate(model, [])
        assert torch.equal(model(ids).logits, base)
        assert not any(p.requires_grad for p in model.parameters())
        activate(model, ["owner"])
        assert torch.equal(model(ids).logits, adapted)
        assert any(p.requires_grad for p in _biases(model).values())


def test_another_adapter_stands_on_the_base_s_own_biases(trained, tiny, ids):
    model, _ = trained
    torch.manual_seed(9)
    inject(model, deltaw.LoraConfig(target_modules=["c_fc"], init_lora_weights=False), "other")
    fresh = tiny("gpt2")
    torch.manual_seed(9)
    inject(fresh, deltaw.LoraConfig(target_modules=["c_fc"], init_lora_weights=False), "other")
    assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_restore_while_active_gives_the_base_to_the_bit(trained, ids):
    model, base = trained
    restore(model)
    assert torch.equal(model(ids).logits, base)
    assert all(p.requires_grad for p in model.parameters())


def test_one_owner_at_a_time(trained):
    model, _ = trained
    with pytest.raises(deltaw.UserError, match="'owner' already trains the biases"):
        inject(model, deltaw.LoraConfig(target_modules=["c_fc"], bias="all"), "second")
    assert list(state_of(model).configs) == ["owner"]
    restore(model, "owner")
    inject(model, deltaw.LoraConfig(target_modules=["c_fc"], bias="all"), "second")


def test_a_module_saved_whole_brings_its_own_bias(tiny):
    model = tiny("gpt2")
    inject(model, deltaw.LoraConfig(target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"]))
    assert "transformer.ln_f.bias" not in state_of(model).biases["default"].parameters
    assert not model.transformer.ln_f.base_layer.bias.requires_grad
    assert model.transformer.ln_f.copies["default"].bias.requires_grad
