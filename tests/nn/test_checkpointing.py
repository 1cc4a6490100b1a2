"""A checkpointed layer runs a second time in backward, when the facts about its batch are no longer said."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

import deltaw
from deltaw.nn.attention import use_packed_attention
from deltaw.nn.batch import Batch, batch, checkpoint_context
from deltaw.nn.inject import inject
from deltaw.nn.walk import adapted_layers
from deltaw.ops.dropout import DropoutKey

FACTS = {
    "packed": dict(lengths=(4, 5)),
    "packed, dropout": dict(lengths=(4, 5), dropout=DropoutKey(seed=1, step=2, first_row=9)),
    "packed, an adapter each": dict(lengths=(4, 5), adapters=("b", "a")),
    "all": dict(lengths=(4, 5), adapters=("a", "__base__"), dropout=DropoutKey(seed=1, step=2)),
}


@pytest.mark.parametrize("config", [{}, dict(use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FACTS)
def test_gradients_are_equal_although_the_context_has_ended(tiny, architecture, ids, name, config):
    model = tiny(architecture)
    for adapter in "ab":
        given = dict(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.4) | config
        inject(model, deltaw.LoraConfig(r=3, **given), adapter)
    for _, layer in adapted_layers(model):
        layer.training = True  # the adapters' dropout alone; the base stays in evaluation mode
        layer.adapters.requires_grad_(True)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    runs, grads = [], []
    counted = next(layer for _, layer in adapted_layers(model))
    counted.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = checkpointing
        model.zero_grad()
        runs.clear()
        torch.manual_seed(0)  # masks without a key come from torch's generator
        with use_packed_attention(model):
            with batch(Batch(**FACTS[name])):
                loss = model(ids[:1], position_ids=positions, use_cache=False).logits.square().mean()
            loss.backward()
        assert len(runs) == 1 + checkpointing
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = grads
    assert plain and plain.keys() == checkpointed.keys()
    for key, grad in plain.items():
        assert torch.equal(checkpointed[key], grad), key
