"""Merging into a 4-bit base: dense or quantised anew, and what either loses."""

import logging

import pytest
import torch
from torch import nn

from deltaw.adapters import parity
from deltaw.adapters.merge import merge, merge_and_unload, unmerge
from deltaw.adapters.merge_loss import MergeLoss
from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.load import base_info, load_base
from deltaw.nn.quantized import QuantizedLinear, QuantizedModule
from deltaw.nn.storage import frozen_weight
from deltaw.nn.walk import adapted_layers
from deltaw.ops.nf4 import dequantize, quantize

IDS = torch.arange(3, 40)[None]


def load(folder, quantization="nf4", dtype="float32", **given):
    return load_base(str(folder), quantization=quantization, dtype=dtype, **given)[0]


def adapted(model, size=0.05, **given):
    inject(model, LoraConfig(**dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False) | given))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=size)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int4"])
@pytest.mark.parametrize("given", [{}, dict(use_dora=True)], ids=["lora", "dora"])
def test_merging_and_unmerging_over_4_bits(tiny_base, kind, given):
    model = adapted(load(tiny_base, kind), **given)
    apart = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(logits(model), apart)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for _, layer in adapted_layers(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_merged_before", [False, True])
def test_a_dense_model_comes_out_that_says_the_same(tiny_base, dtype, is_merged_before, caplog):
    model = adapted(load(tiny_base, dtype=dtype), target_modules=["q_proj", "up_proj"])
    source = parity.reference_logits(model, IDS[0])
    if is_merged_before:
        merge(model)
    loss = MergeLoss()
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        plain = merge_and_unload(model, loss=loss)
    found = parity.parity_of(source, parity.window_logits(plain, IDS[0]))
    parity.require(found, parity.tolerance_for(getattr(torch, dtype)), what="merge")
    assert not [m for m in plain.modules() if isinstance(m, QuantizedModule)] and base_info(plain) is None
    assert {p.dtype for p in plain.parameters()} == {getattr(torch, dtype)}
    assert getattr(plain.config, "quantization_config", None) is None
    assert set(loss.layers) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")}
    assert loss.weight_error == 0 if dtype == "float32" else 1e-4 < loss.weight_error < 4e-3
    assert loss.change_error >= loss.weight_error
    assert f"merged into 4 quantised layers, kept as {dtype}: rounding moves the weights by" in caplog.text


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantised_anew_by_the_same_method(tiny_base, kind, caplog):
    model = adapted(load(tiny_base, kind, "bfloat16"), target_modules=["q_proj"])
    before = {name: m.codes.clone() for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    deltas = {name: layer.adapter("default").delta() for name, layer in adapted_layers(model)}
    bases = {name: dequantize(layer.base_layer.quantized, torch.float32) for name, layer in adapted_layers(model)}
    merge(model)  # what is rounded to bfloat16 there takes no part
    loss = MergeLoss()
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        plain = merge_and_unload(model, requantize=True, loss=loss)
    lost = weight = change = 0.0
    for name, delta in deltas.items():
        layer = plain.get_submodule(name)
        expected = quantize(bases[name] + delta, kind, double=kind == "nf4")
        assert isinstance(layer, QuantizedLinear) and torch.equal(layer.codes, expected.packed)
        assert layer.quantized.dtype == torch.bfloat16
        lost += (dequantize(expected) - bases[name] - delta).norm().item() ** 2
        weight += (bases[name] + delta).norm().item() ** 2
        change += delta.norm().item() ** 2
    assert loss.weight_error == pytest.approx((lost / weight) ** 0.5, rel=1e-4)
    assert loss.change_error == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    assert f"kept as {kind.upper()}" in caplog.text and "of what the adapter changed" in caplog.text
    untouched = [n for n in before if "q_proj" not in n]
    after = {name.replace(".base_layer", ""): m for name, m in plain.named_modules() if isinstance(m, QuantizedModule)}
    assert untouched and all(torch.equal(before[name], after[name].codes) for name in untouched)
    assert base_info(plain) is None and plain.config.quantization_config


def test_small_changes_drown_in_quantising_anew(tiny_base, caplog):
    small = adapted(load(tiny_base), size=1e-3)
    source = parity.reference_logits(small, IDS[0])
    loss = MergeLoss()
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        plain = merge_and_unload(small, requantize=True, loss=loss)
    assert loss.change_error > 1 and "rounding moves the weights further than the adapter did" in caplog.text
    assert parity.parity_of(source, parity.window_logits(plain, IDS[0])).mean_kl > 0
    assert loss.worst in loss.layers


def test_what_can_t_be_quantised_anew(tiny_base, tiny):
    with pytest.raises(UserError, match="requantize: the base's layers are dense; expected a base loaded with"):
        merge_and_unload(adapted(tiny()), requantize=True)


def test_an_embedding_in_4_bits_and_its_head(wide_tied, ids):
    def model():
        return load(wide_tied, quantize_head=True)

    one = adapted(model(), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match=r"requantize: model.embed_tokens is an embedding in 4 bits"):
        merge_and_unload(one, requantize=True)
    apart = logits(one)
    plain = merge_and_unload(one)
    torch.testing.assert_close(logits(plain), apart, rtol=1e-4, atol=1e-4)
    assert not plain.config.tie_word_embeddings and plain.lm_head.weight is not plain.model.embed_tokens.weight

    two = adapted(model(), target_modules=["q_proj"])
    apart = logits(two)
    plain = merge_and_unload(two)
    torch.testing.assert_close(logits(plain), apart, rtol=1e-4, atol=1e-4)
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight
    assert type(plain.model.embed_tokens) is nn.Embedding

    three = merge_and_unload(adapted(model(), target_modules=["q_proj"]), requantize=True)
    assert three.config.tie_word_embeddings and logits(three).isfinite().all()


@pytest.fixture(scope="module")
def wide_tied(tiny_base, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(tiny_base)
    config.tie_word_embeddings, config.hidden_size, config.intermediate_size = True, 64, 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def test_figures_of_nothing():
    assert str(MergeLoss()) == "nothing that was quantised was merged into" and MergeLoss().weight_error == 0


def test_merged_layers_are_frozen_weights_of_their_kind(tiny_base):
    model = adapted(load(tiny_base))
    merge(model)
    layers = [layer for _, layer in adapted_layers(model)]
    assert all(type(layer.base_layer) is nn.Linear for layer in layers)
    assert all(frozen_weight(layer.base_layer).dequantize().dtype == torch.float32 for layer in layers)
