"""Adapters on bitsandbytes' live layers: the numbers of a dense model that has the dequantised weights."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import deltaw
from deltaw.nn.bnb import BnbWeight, is_quantized, num_elements
from deltaw.nn.storage import frozen_weight, is_linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
]
CONFIGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
TARGETS = ["q_proj", "v_proj", "up_proj", "lm_head"]


@pytest.fixture(scope="module")
def folder(wide_base):
    return wide_base


def load(folder, kind, dtype=torch.float32):
    given = CONFIGS[kind] | ({"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in CONFIGS[kind] else {})
    config = BitsAndBytesConfig(**given)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def dense_twin(model, folder):
    """A dense model with the quantised one's weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if is_quantized(layer):
            twin.get_submodule(name).weight.data = BnbWeight(layer).dequantize().detach().float()
    return twin


def lora(**more):
    return deltaw.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **more)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_training_on_a_quantised_base_is_training_on_its_dequantised_weights(folder, ids, kind, use_dora):
    model = deltaw.prepare_model_for_kbit_training(load(folder, kind), use_gradient_checkpointing=False)
    models = [dense_twin(model, folder), model]
    seen = []
    for base in models:
        torch.manual_seed(3)
        adapted = deltaw.get_peft_model(base, lora(use_dora=use_dora)).train()
        out = adapted(input_ids=ids, labels=ids)
        out.loss.backward()
        seen.append((out.logits, {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}))
    (dense_logits, dense), (logits, grads) = seen
    torch.testing.assert_close(logits, dense_logits, atol=2e-4, rtol=1e-3)
    assert dense.keys() == grads.keys() and len(grads) == (3 if use_dora else 2) * 7
    for name, grad in grads.items():
        torch.testing.assert_close(grad, dense[name], atol=2e-4, rtol=2e-2, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_base_rows_are_the_quantised_base_to_the_bit(folder, ids, kind):
    model = deltaw.get_peft_model(load(folder, kind), lora(), "a").eval()
    rows = model(input_ids=ids, adapter_names=["a", "__base__"]).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert torch.equal(rows[1], base[1]) and not torch.allclose(rows[0], base[0])


def test_a_layer_repacked_for_inference_can_train_again(folder, ids):
    """bitsandbytes repacks 4-bit weights on processors with AVX512-BF16 when they are used in evaluation mode."""
    model = load(folder, "nf4", torch.bfloat16).eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    adapted = deltaw.get_peft_model(deltaw.prepare_model_for_kbit_training(model), lora(task_type="CAUSAL_LM"))
    states = [m.weight.quant_state for m in adapted.modules() if isinstance(m, Linear4bit)]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    for _ in range(2):
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad(), adapted.eval().disable_adapter():
            after = adapted(input_ids=ids).logits
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(after, before.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", CONFIGS)
def test_preparing_casts_what_is_not_quantised_and_checkpoints(folder, ids, kind):
    model = deltaw.prepare_model_for_kbit_training(load(folder, kind, torch.bfloat16))
    assert not any(p.requires_grad for p in model.parameters()) and model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8 if kind == "int8" else torch.uint8}
    assert model.lm_head.weight.dtype == torch.float32 and type(model.lm_head) is nn.Linear
    adapted = deltaw.get_peft_model(model, lora()).train()
    adapted(input_ids=ids, labels=ids, adapter_names=["default", "__base__"]).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_preparing_a_dense_model_only_freezes_and_casts(tiny):
    model = deltaw.prepare_model_for_kbit_training(tiny(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("prepared", [True, False])
def test_merging_leaves_a_dense_model_that_transformers_loads(folder, ids, tmp_path, kind, prepared):
    model = load(folder, kind, torch.bfloat16)
    model = deltaw.prepare_model_for_kbit_training(model) if prepared else model
    adapted = deltaw.get_peft_model(model, lora()).eval()
    with torch.no_grad():
        apart = adapted(input_ids=ids).logits.float()
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(input_ids=ids).logits.float(), apart, atol=0.06, rtol=0.06)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(input_ids=ids).logits.float(), apart)
        merged = adapted.merge_and_unload()
        logits = merged(input_ids=ids).logits
        torch.testing.assert_close(logits.float(), apart, atol=0.06, rtol=0.06)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_what_a_quantised_layer_says_of_itself(folder):
    model = load(folder, "nf4")
    layer = model.model.layers[0].mlp.up_proj
    storage = frozen_weight(layer)
    assert is_linear(layer) and isinstance(storage, BnbWeight)
    assert (storage.out_features, storage.in_features) == storage.dequantize().shape == (128, 64)
    assert num_elements(layer.weight) == 128 * 64 == 2 * layer.weight.numel()
    dense = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(p.numel() for p in dense.parameters())
    adapted = deltaw.get_peft_model(model, deltaw.LoraConfig(target_modules=["q_proj"]))
    trainable, everything = adapted.get_nb_trainable_parameters()
    assert everything - trainable == total


def test_layers_that_are_no_frozen_weight(folder):
    assert not is_linear(Linear8bitLt(8, 8, has_fp16_weights=True))

    class Other(Linear4bit):
        def forward(self, x):
            return super().forward(x) * 2

    assert not is_linear(Other(64, 64))
    for layer in (Linear4bit(64, 64), Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(deltaw.UserError, match="not quantised yet"):
            frozen_weight(layer).dequantize()


def test_restoring_and_copying_keep_the_live_layers(folder, ids):
    model = load(folder, "nf4").eval()
    layers = [m for m in model.modules() if is_quantized(m)]
    adapted = deltaw.get_peft_model(model, lora())
    logits = adapted(input_ids=ids).logits
    assert torch.equal(copy.deepcopy(adapted)(input_ids=ids).logits, logits)
    assert [m for m in adapted.unload().modules() if is_quantized(m)] == layers
