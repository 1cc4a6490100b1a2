"""Layers in 4 bits: they stand where dense ones stood, and adapters stand on them as on their dense copy."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.nn.inject import inject, restore
from deltaw.nn.load import base_bytes, load_base
from deltaw.nn.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    TiedHead,
    num_quantized,
    quantized_bytes,
    quantized_modules,
)
from deltaw.nn.storage import frozen_weight, is_linear
from deltaw.nn.walk import parameter_counts
from deltaw.ops.quantized import METHODS, QuantizedWeight


def _dense_twin(model, dense):
    """``dense`` with the quantised model's weights."""
    for name, module in quantized_modules(model):
        old = dense.get_submodule(name)
        old.weight.data = module.weight.T.contiguous() if isinstance(old, Conv1D) else module.weight
    return dense


def _layer(kind="nf4", *, bias=True):
    torch.manual_seed(0)
    dense = nn.Linear(40, 24, bias=bias)
    return QuantizedLinear.of(dense, METHODS[kind].quantize(dense.weight.detach())), dense


def test_it_computes_what_a_dense_layer_with_its_weight_does():
    layer, dense = _layer()
    dense.weight.data = layer.weight
    x = torch.randn(2, 5, 40, requires_grad=True)
    torch.testing.assert_close(layer(x), dense(x))
    layer(x).square().sum().backward()
    got, x.grad = x.grad, None
    dense(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    assert is_linear(layer) and isinstance(frozen_weight(layer), QuantizedWeight)
    assert "40, 24, bias=True, nf4, block_size=64, double=True" in repr(layer)


def test_nothing_of_it_can_be_trained_by_mistake():
    layer, _ = _layer()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(True)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_leaves_codes_and_scales_as_they_are(dtype):
    layer, _ = _layer()
    before = layer.weight
    cast = copy.deepcopy(layer).to(dtype)
    assert torch.equal(cast.weight, before) and cast.bias.dtype == dtype
    assert {b.dtype for b in cast.buffers()} == {torch.uint8, torch.float32}
    assert cast(torch.ones(1, 40, dtype=dtype)).dtype == dtype
    assert cast.to("meta").codes.is_meta and cast.nested_scales.dtype == torch.float32


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_its_state_goes_round(kind, bias):
    layer, _ = _layer(kind, bias=bias)
    other = QuantizedLinear.of(nn.Linear(40, 24, bias=bias), METHODS[kind].quantize(torch.randn(24, 40)))
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(layer.state_dict() | {"more": torch.ones(1)})
    with pytest.raises(RuntimeError, match="bytes, where a weight of this shape has"):
        other.load_state_dict(layer.state_dict() | {"weight.absmax": torch.ones(99)})


def test_a_copy_is_a_copy():
    layer, _ = _layer()
    other = copy.deepcopy(layer)
    other.codes.zero_()
    assert not torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("conv1d", [False, True])
def test_it_becomes_the_dense_layer_that_it_stands_for(conv1d):
    dense = Conv1D(24, 40) if conv1d else nn.Linear(40, 24)
    w_NK = dense.weight.detach().T if conv1d else dense.weight.detach()
    layer = QuantizedLinear.of(dense, METHODS["nf4"].quantize(w_NK))
    again = layer.as_dense(layer.weight)
    assert type(again) is type(dense) and again.weight.shape == dense.weight.shape and again.bias is dense.bias
    x = torch.randn(3, 40)
    torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma2", "qwen3_moe"])
def test_an_adapter_learns_as_on_the_dense_copy(saved, ids, arch, use_dora):
    model, _ = load_base(saved(arch), quantization="nf4")
    dense, _ = load_base(saved(arch))
    assert num_quantized(model) > 0
    seen = []
    for base in (_dense_twin(model, dense), model):
        torch.manual_seed(3)
        inject(base, deltaw.LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, init_lora_weights=False))
        logits = base(input_ids=ids).logits
        logits.square().mean().backward()
        seen.append((logits, {n: p.grad for n, p in base.named_parameters() if p.grad is not None}))
    (wanted_logits, wanted), (logits, grads) = seen
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
    assert wanted.keys() == grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_doras_norm_is_computed_once_for_a_frozen_adapter(saved, ids, monkeypatch):
    from deltaw.nn import dora

    model, _ = load_base(saved("llama"), quantization="nf4")
    config = deltaw.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
    inject(model, config, trainable=False)
    counted = []
    monkeypatch.setattr(dora, "adapted_norm", lambda *a, f=dora.adapted_norm: counted.append(a) or f(*a))
    for _ in range(3):
        model(input_ids=ids)
    assert len(counted) == 2  # one a layer


def test_restoring_gives_the_quantised_layers_back(saved, ids):
    model, _ = load_base(saved("llama"), quantization="nf4")
    before, layers = model(input_ids=ids).logits, [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    inject(model, deltaw.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(model(input_ids=ids).logits, before)
    restore(model)
    assert [m for m in model.modules() if isinstance(m, QuantizedLinear)] == layers
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("head", [False, True])
def test_merging_leaves_a_dense_model_that_transformers_loads(saved, ids, tmp_path, arch, head):
    from transformers import AutoModelForCausalLM

    model, _ = load_base(saved(arch), quantization="nf4", quantize_head=head)
    peft = deltaw.get_peft_model(model, deltaw.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        apart = peft(input_ids=ids).logits
        peft.merge_adapter()
        torch.testing.assert_close(peft(input_ids=ids).logits, apart, atol=1e-4, rtol=1e-4)
        peft.unmerge_adapter()
        assert torch.equal(peft(input_ids=ids).logits, apart)
        merged = peft.merge_and_unload()
        logits = merged(input_ids=ids).logits
        torch.testing.assert_close(logits, apart, atol=1e-4, rtol=1e-4)
        assert not any(isinstance(m, QuantizedModule) for m in merged.modules())
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(input_ids=ids).logits, logits)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "gemma3"])
def test_a_table_that_embedding_and_head_share(saved, ids, arch):
    model, _ = load_base(saved(arch), quantization="nf4", quantize_head=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, TiedHead)
    dense, _ = load_base(saved(arch))
    twin = _dense_twin(model, dense)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    torch.testing.assert_close(model(input_ids=ids).logits, twin(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert parameter_counts(model)[1] == parameter_counts(twin)[1]
    assert len([k for k in model.state_dict() if "lm_head" in k]) == 0
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other.get_output_embeddings().quantized.packed is other.get_input_embeddings().codes
    assert other(input_ids=ids).logits.dtype == torch.bfloat16
    # An adapter on the table itself, as on a dense one.
    name = next(n for n, m in model.named_modules() if m is embedding).rpartition(".")[2]
    seen = []
    for base in (model, twin):
        torch.manual_seed(1)
        inject(base, deltaw.LoraConfig(r=2, target_modules=[name], init_lora_weights=False))
        seen.append(base(input_ids=ids).logits)
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)


def test_counts(saved):
    folder = saved("llama")
    dense, _ = load_base(folder)
    model, _ = load_base(folder, quantization="nf4-single")
    assert parameter_counts(model) == (0, parameter_counts(dense)[1])
    peft = deltaw.get_peft_model(model, deltaw.LoraConfig(target_modules=["q_proj"]))
    trainable, everything = peft.get_nb_trainable_parameters()
    assert everything - trainable == parameter_counts(dense)[1]
    restore(model)
    stored = quantized_bytes(model)
    assert stored == sum(m.codes.nbytes + m.scales.nbytes for _, m in quantized_modules(model))
    assert stored * 8 / num_quantized(model) == pytest.approx(4.5, abs=0.01)
    assert base_bytes(model) == stored + sum(p.nbytes for p in model.parameters())


def test_preparing_for_training_casts_checkpoints_and_leaves_codes(saved, ids):
    model, _ = load_base(saved("qwen2"), quantization="nf4", quantize_head=True, dtype="bfloat16")
    before = [m.weight.float() for _, m in quantized_modules(model)]
    model = deltaw.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(m.weight.float(), w) or m.weight.dtype == torch.float32 for (_, m), w in
               zip(quantized_modules(model), before, strict=True))  # fmt: skip
    adapted = deltaw.get_peft_model(model, deltaw.LoraConfig(target_modules="all-linear")).train()
    out = adapted(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
