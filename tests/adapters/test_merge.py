"""Merged weights compute what the adapters did; unmerging gives the base back bit for bit; nothing else moves."""

import copy
import weakref

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.adapters.merge import merge, merge_and_unload, merged_names, unmerge
from deltaw.adapters.peft_format import adapter_tensors, load_adapter, save_adapter
from deltaw.errors import UserError
from deltaw.nn import bnb, merged
from deltaw.nn.batch import Batch, batch
from deltaw.nn.inject import activate, inject, restore
from deltaw.nn.linear import AdaptedLinear
from deltaw.nn.load import BaseInfo, base_info
from deltaw.nn.lowrank import LowRank
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model (has|with) `tie_word_embeddings"
)
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
CONFIGS = {
    "lora": lambda a: {},
    "rslora": lambda a: dict(use_rslora=True, lora_alpha=3),
    "dora": lambda a: dict(use_dora=True),
    "patterns": lambda a: dict(rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 9}),
    "embedding": lambda a: dict(target_modules=[EMBEDDING[a]]),
    "head": lambda a: dict(target_modules=["lm_head"]),
    "bias all": lambda a: dict(bias="all"),
    "modules_to_save": lambda a: dict(modules_to_save=["lm_head"]),
    "embedding dora": lambda a: dict(target_modules=[EMBEDDING[a]], use_dora=True),
    "tokens": lambda a: dict(trainable_token_indices={EMBEDDING[a]: [3, 1, 40]}),
}
CLOSE = dict(atol=1e-5, rtol=1e-5)


def _stir(model, seed=5):
    """Every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def _add(model, name="default", *, seed=5, **config):
    """A random adapter."""
    config = dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False) | config
    inject(model, deltaw.LoraConfig(**config), name)
    _stir(model, seed)
    return model


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def _bits(model):
    """Every tensor of the model, cloned, and which parameter object stands where."""
    return {k: v.clone() for k, v in model.state_dict().items()}, {
        k: id(p) for k, p in model.named_parameters(remove_duplicate=False)
    }


def _same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_and_unmerge(tiny, architecture, ids, name):
    if architecture == "llama" and "bias" in name:
        pytest.skip("no biases")
    model = _add(tiny(architecture), **CONFIGS[name](architecture))
    base = _logits(tiny(architecture), ids)
    before, kept = _logits(model, ids), _bits(model)
    assert (before - base).abs().max() > 1e-2

    merge(model)
    assert merged_names(model) == ("default",)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    weights = _bits(model)
    merge(model)
    _same(weights, _bits(model))

    unmerge(model)
    assert merged_names(model) == ()
    _same(kept, _bits(model))
    assert torch.equal(_logits(model, ids), before)
    restore(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tiny(architecture).state_dict().items())
    assert torch.equal(_logits(model, ids), base)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_and_unload(tiny, architecture, ids, name, tmp_path):
    if architecture == "llama" and "bias" in name:
        pytest.skip("no biases")
    model = tiny(architecture)
    kinds = {k: type(m) for k, m in model.named_modules()}
    keys = list(model.state_dict())
    before = _logits(_add(model, **CONFIGS[name](architecture)), ids)
    assert merge_and_unload(model) is model
    assert not state_of(model).configs
    assert {k: type(m) for k, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, ids), _logits(model, ids))


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "patterns", "embedding", "bias all"])
def test_merged_weights_are_peft_s(tiny, architecture, name):
    if architecture == "llama" and "bias" in name:
        pytest.skip("no biases")
    config = dict(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    config |= CONFIGS[name](architecture)
    ours = deltaw.get_peft_model(tiny(architecture), deltaw.LoraConfig(**config))
    _stir(ours)
    theirs = peft.get_peft_model(tiny(architecture), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, adapter_tensors(ours.get_base_model()))
    for key, tensor in adapter_tensors(ours.get_base_model()).items():
        if key.endswith(".bias"):
            theirs.get_parameter(key).data.copy_(tensor)
    ours, theirs = merge_and_unload(ours.get_base_model()), theirs.merge_and_unload()
    wanted = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    if name == "embedding":
        wanted["lm_head.weight"] = tiny(architecture).lm_head.weight  # PEFT moves a tied head along
    for key, mine in ours.state_dict().items():
        torch.testing.assert_close(mine, wanted[key], **CLOSE, msg=key)


@pytest.mark.parametrize("other", ["mistral", "gemma2", "phi3", "gpt_neox", "opt", "qwen3_moe", "t5", "bert_mlm"])
def test_other_architectures(tiny, ids, other):
    model = _add(tiny(other))
    given = dict(decoder_input_ids=ids) if other == "t5" else {}
    before = model(input_ids=ids, **given).logits
    merge(model)
    torch.testing.assert_close(model(input_ids=ids, **given).logits, before, atol=1e-4, rtol=1e-4)
    unmerge(model)
    assert torch.equal(model(input_ids=ids, **given).logits, before)
    merge_and_unload(model)
    torch.testing.assert_close(model(input_ids=ids, **given).logits, before, atol=1e-4, rtol=1e-4)


def test_scaled_embedding_of_gemma3(tiny, ids):
    model = _add(tiny("gemma3"), target_modules=["embed_tokens"])
    before = _logits(model, ids)
    merge(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    merge_and_unload(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_come_apart_and_together(tiny, ids, target):
    model = tiny("qwen2")
    original = model.lm_head.weight
    values = original.detach().clone()
    before = _logits(_add(model, target_modules=[target]), ids)
    merge(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    other = model.model.embed_tokens if target == "lm_head" else model.lm_head
    assert other.weight is original and torch.equal(original, values)
    assert model.config.tie_word_embeddings
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is original
    merge_and_unload(model)
    assert not model.config.tie_word_embeddings
    assert torch.equal(other.weight, values)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


def test_a_tie_that_no_adapter_touches_stays(tiny):
    model = merge_and_unload(_add(tiny("qwen2")))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_trained_rows_of_tied_weights_stay_tied(tiny, ids):
    model = _add(tiny("qwen2"), trainable_token_indices=[3, 1, 40])
    before = _logits(model, ids)
    merge(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    merge_and_unload(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bare_parameters(tiny, ids):
    model = _add(tiny("qwen3_moe"), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    before = _logits(model, ids)
    merge(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    unmerge(model)
    assert torch.equal(_logits(model, ids), before)
    merge_and_unload(model)
    assert not any("adapters" in name for name, _ in model.named_modules())
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


QUANTISED = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 twice": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(wide_base):
    return wide_base


class TestQuantised:
    """bitsandbytes' layers become dense where adapters are merged into them."""

    @pytest.fixture(params=QUANTISED)
    def model(self, request, folder):
        how = BitsAndBytesConfig(**QUANTISED[request.param])
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()

    def test_merge_and_unmerge(self, model, ids):
        base = _logits(model, ids)  # lets bitsandbytes repack its weights where the processor likes them otherwise
        kept = {n: m for n, m in model.named_modules() if bnb.is_quantized(m)}
        _add(model, target_modules=["q_proj", "up_proj"], bias="lora_only")
        before = _logits(model, ids)
        assert (before - base).abs().max() > 1e-2
        merge(model, safe=True)
        layers = dict(adapted_layers(model))
        assert all(type(layer.base_layer) is nn.Linear for layer in layers.values())
        assert all(layer.base_layer.weight.dtype == model.dtype for layer in layers.values())
        assert not torch.equal(_logits(model, ids), before)
        torch.testing.assert_close(_logits(model, ids), before, atol=2e-2, rtol=2e-2)
        unmerge(model)
        assert all(layer.base_layer is kept[name] for name, layer in layers.items())
        assert torch.equal(_logits(model, ids), before)

    def test_merge_and_unload_makes_all_dense(self, model, ids, tmp_path):
        _add(model, target_modules=["q_proj", "up_proj"], bias="lora_only")
        layer = dict(adapted_layers(model))["model.layers.0.mlp.up_proj"]
        before = _logits(model, ids)
        exact = layer.storage.dequantize().float() + layer.adapter("default").delta()
        merge_and_unload(model)
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(model.dtype))
        assert not any(bnb.is_quantized(m) for m in model.modules())
        torch.testing.assert_close(_logits(model, ids), before, atol=5e-2, rtol=5e-2)
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert getattr(again.config, "quantization_config", None) is None
        assert torch.equal(_logits(again, ids), _logits(model, ids))


@pytest.mark.parametrize("how", QUANTISED)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_transposed_layer_comes_back_from_bitsandbytes(tmp_path, ids, how):
    """transformers puts bitsandbytes' layers where GPT-2 has Conv1D, whose weight lies the other way round."""
    sizes = dict(vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    given = dict(quantization_config=BitsAndBytesConfig(**QUANTISED[how]), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **given).eval()
    assert bnb.is_quantized(model.transformer.h[0].mlp.c_fc)
    _add(model, target_modules=["c_attn", "c_fc"])
    before = _logits(model, ids)
    merge(model)
    torch.testing.assert_close(_logits(model, ids), before, atol=5e-2, rtol=5e-2)
    plain = merge_and_unload(model)
    assert {type(m) for n, m in plain.transformer.named_modules() if n.endswith(("c_attn", "c_proj", "c_fc"))} == {
        Conv1D
    }
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(_logits(again, ids), _logits(plain, ids))
    torch.testing.assert_close(_logits(again, ids), before, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("is_dora", [False, True])
def test_rows_at_a_time_are_the_whole(monkeypatch, is_dora):
    """Whatever the number of rows, and however W lies; and in W's own layout."""
    torch.manual_seed(0)
    w_NK = torch.randn(40, 7).bfloat16()
    magnitude_N = torch.rand(40) if is_dora else None
    adapters = [LowRank(torch.randn(3, 7), torch.randn(40, 3), scaling=0.5, magnitude_N=magnitude_N)]
    if not is_dora:
        adapters.append(LowRank(torch.randn(2, 7).double(), torch.randn(40, 2).double(), scaling=-2.0))
    exact = w_NK.double() + sum(adapter.delta().double() for adapter in adapters)
    if is_dora:
        exact *= (magnitude_N / exact.norm(dim=1))[:, None]
    for block in (1, 7 * 16, 10**6):
        monkeypatch.setattr(merged, "_BLOCK", block)
        for w in (w_NK, w_NK.T.contiguous().T):
            with torch.no_grad():
                found = merged.merged_weight(w, adapters)
            assert found.dtype == w.dtype and found.stride() == w.stride()
            torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-8)


def test_several_add_up_in_any_order(tiny, ids):
    model = _add(_add(tiny(), "a"), "b", seed=6, r=2, target_modules=["q_proj", "up_proj"])
    base = tiny()
    activate(model, ["a", "b"])
    before = _logits(model, ids)
    merge(model)
    assert merged_names(model) == ("a", "b")
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
    together = model.model.layers[0].mlp.up_proj.weight.clone()
    unmerge(model)
    merge(model, ["a"])
    merge(model, ["b"])
    assert merged_names(model) == ("a", "b") == state_of(model).active.names
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, together)
    layer = dict(adapted_layers(model))["model.layers.0.mlp.up_proj"]
    exact = base.model.layers[0].mlp.up_proj.weight + layer.adapter("a").delta() + layer.adapter("b").delta()
    torch.testing.assert_close(together, exact.detach(), atol=1e-7, rtol=1e-6)
    unmerge(model)
    assert torch.equal(_logits(model, ids), before)


def test_only_the_named_are_merged(tiny, ids):
    model = _add(_add(tiny(), "a"), "b", seed=6)
    activate(model, ["a"])
    alone = _logits(model, ids)
    activate(model, ["b"])
    merge(model, ["a"])
    torch.testing.assert_close(_logits(model, ids), alone, **CLOSE)
    torch.testing.assert_close(_logits(merge_and_unload(model), ids), alone, **CLOSE)


def test_unload_after_merge_keeps_what_is_merged(tiny, ids):
    model = _add(_add(tiny(), "a"), "b", seed=6, target_modules=["q_proj"])
    merge(model, ["a"])
    before = _bits(model)[0]
    weights = {k.replace(".base_layer", ""): v for k, v in before.items() if "adapters" not in k}
    plain = merge_and_unload(model)
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())
    again = _add(_add(tiny(), "a"), "b", seed=6, target_modules=["q_proj"])
    activate(again, ["a", "b"])
    both = _logits(again, ids)
    merge(again, ["a"])
    torch.testing.assert_close(_logits(merge_and_unload(again, ["b"]), ids), both, **CLOSE)


def test_a_start_that_is_not_zero(tiny, ids):
    model = tiny()

    def make(layer):
        draw = torch.Generator().manual_seed(len(layer.name))
        shapes = [(4, layer.in_features), (layer.out_features, 4)] * 2
        a, b, a0, b0 = (torch.randn(shape, generator=draw) * 0.2 for shape in shapes)
        return LowRank(a, b, scaling=1.5, start=(a0, b0))

    inject(model, deltaw.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), make=make)
    before = _logits(model, ids)
    merge(model)
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computed_wide_and_cast_once(tiny, dtype):
    model = _add(_add(tiny(dtype=dtype), "a"), "b", seed=6)
    w = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    layer = dict(adapted_layers(model))["model.layers.0.mlp.up_proj"]
    wide = torch.promote_types(dtype, torch.float32)
    exact = sum((layer.adapter(n).delta().detach() for n in "ab"), torch.zeros((), dtype=wide)) + w.to(wide)
    merge(model, ["a", "b"])
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(dtype))
    unmerge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, w)


def test_a_model_that_is_cast_or_switched_meanwhile(tiny, ids):
    model, plain = _add(tiny("qwen2"), target_modules=["q_proj", "lm_head"]), tiny("qwen2")
    merge(model)
    model.to(torch.bfloat16).train()
    merge(_add(model, "other", seed=6), ["default"])
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "adapters" not in n)
    unmerge(model)
    restore(model)
    plain.to(torch.bfloat16)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_copy_of_a_merged_model_unmerges_by_itself(tiny, ids):
    model = _add(tiny("qwen2"), target_modules=["q_proj", "lm_head"])
    before = _logits(model, ids)
    merge(model)
    twin = copy.deepcopy(model)
    unmerge(twin)
    assert torch.equal(_logits(twin, ids), before)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.model.embed_tokens.weight
    assert merged_names(model) == ("default",)


class TestWhatEndsIt:
    @pytest.fixture
    def model(self, tiny):
        return _add(_add(tiny(), "a"), "b", seed=6)

    def test_switching(self, model, ids):
        activate(model, ["a"])
        alone = _logits(model, ids)
        merge(model, ["b"])
        activate(model, ["a"])
        assert merged_names(model) == ()
        assert torch.equal(_logits(model, ids), alone)

    def test_disabling(self, model, tiny, ids):
        merge(model)
        activate(model, [])
        assert torch.equal(_logits(model, ids), _logits(tiny(), ids))

    def test_adding_sees_the_base_s_own_weights(self, model, tiny, ids):
        merge(model, ["a"])
        inject(model, deltaw.LoraConfig(target_modules=["q_proj"], use_dora=True), "c")
        assert merged_names(model) == ()
        torch.testing.assert_close(_logits(model, ids), _logits(tiny(), ids), **CLOSE)

    def test_an_addition_that_fails_its_checks_does_not(self, model):
        merge(model, ["a"])
        with pytest.raises(UserError, match="already in the model"):
            inject(model, deltaw.LoraConfig(target_modules=["q_proj"]), "b")
        assert merged_names(model) == ("a",)

    def test_deleting(self, model, tiny, ids):
        merge(model, ["b"])
        restore(model, "b")
        assert "b" not in state_of(model).configs
        assert torch.equal(_logits(model, ids), _logits(tiny(), ids))

    def test_saving_does_not_and_loading_does(self, model, tmp_path):
        before = {k: v.clone() for k, v in adapter_tensors(model, "a").items()}
        merge(model, ["a"])
        save_adapter(model, tmp_path, "a")
        assert merged_names(model) == ("a",)
        load_adapter(model, tmp_path, "again")
        assert merged_names(model) == ()
        assert all(torch.equal(v, before[k]) for k, v in adapter_tensors(model, "again").items())

    def test_a_mixed_batch_is_refused(self, model, ids):
        merge(model, ["a"])
        with (
            batch(Batch(adapters=("a", "b"))),
            pytest.raises(UserError, match="adapter_names: a is merged into the weights of all rows; unmerge it first"),
        ):
            model(input_ids=ids)


class TestRefused:
    def test_names(self, tiny):
        model = tiny()
        with pytest.raises(UserError, match="no adapter is active, so there is nothing to merge"):
            merge(model)
        _add(model, "a")
        for function in (merge, merge_and_unload):
            with pytest.raises(UserError, match=r"no adapter x in this model to merge \(it has a\); load it first"):
                function(model, ["x"])
            with pytest.raises(UserError, match="nothing to merge"):
                function(model, [])
        activate(model, [])
        with pytest.raises(UserError, match="nothing to merge"):
            merge_and_unload(model)

    def test_dora_beside_another(self, tiny):
        model = _add(_add(tiny(), "a"), "dora", use_dora=True, seed=6)
        kept = _bits(model)
        with pytest.raises(UserError, match="'dora' has a DoRA magnitude"):
            merge(model, ["a", "dora"])
        merge(model, ["a"])
        with pytest.raises(UserError, match="'dora' has a DoRA magnitude"):
            merge(model, ["dora"])
        assert merged_names(model) == ("a",)
        activate(model, ["dora"])
        _same(kept, _bits(model))

    @pytest.mark.parametrize("function", [merge, merge_and_unload])
    @pytest.mark.parametrize("value", [float("nan"), 1e30])
    def test_safe_names_the_module_and_changes_nothing(self, tiny, function, value):
        model = _add(tiny(dtype=torch.float16))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.adapter("default").lora_B[3, 1] = value
        kept = _bits(model)
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
            function(model, safe=True)
        assert all(torch.equal(v, kept[0][k]) for k, v in model.state_dict().items() if "lora" not in k)
        assert merged_names(model) == () and state_of(model).active.names == ("default",)
        function(model)

    def test_safe_passes_what_is_sound(self, tiny, ids):
        model = _add(tiny())
        before = _logits(model, ids)
        merge(model, safe=True)
        torch.testing.assert_close(_logits(model, ids), before, **CLOSE)
        unmerge(model)
        torch.testing.assert_close(_logits(merge_and_unload(model, safe=True), ids), before, **CLOSE)

    def test_memory_that_runs_out_leaves_all_as_it_was(self, tiny, monkeypatch):
        model = _add(_add(tiny(), "a"), "b", seed=6)
        merge(model, ["a"])
        kept, calls = _bits(model), []

        def fail_at_third(self):
            calls.append(self)
            if len(calls) == 3:
                raise MemoryError
            return self.lora_A, self.lora_B

        monkeypatch.setattr(LowRank, "joined", fail_at_third)
        with pytest.raises(MemoryError):
            merge(model, ["b"])
        _same(kept, _bits(model))
        assert merged_names(model) == ("a",)


def test_what_required_a_gradient_does_again_and_nothing_else(tiny):
    model = tiny("qwen2")
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    _add(model, target_modules=["up_proj", "q_proj"], modules_to_save=["norm"])
    merge_and_unload(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_a_merged_model_is_no_longer_its_base(tiny):
    model = tiny()
    model.__dict__["_deltaw_base"] = BaseInfo("tiny", None, ())
    _add(model)
    merge(model)
    assert base_info(model) is not None
    merge_and_unload(model)
    assert base_info(model) is None


def test_merged_weights_take_the_memory_of_the_originals(tiny, architecture, ids, monkeypatch):
    model = _add(tiny(architecture))
    before, where = _logits(model, ids), {n: layer.weight.data_ptr() for n, layer in adapted_layers(model)}
    alive, merged_layer = [], AdaptedLinear.merged_layer

    def watch(self, base, names):
        out = merged_layer(self, base, names)
        alive.append(weakref.ref(out.weight))
        assert sum(weight() is not None for weight in alive) == 1
        return out

    monkeypatch.setattr(AdaptedLinear, "merged_layer", watch)
    merge_and_unload(model)
    assert {name: model.get_submodule(name).weight.data_ptr() for name in where} == where
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


def test_layers_with_a_forward_of_their_own(tiny, ids):
    """accelerate's hooks bind the layer that they were put on."""
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.up_proj.forward = layer.mlp.up_proj.forward
    before = _logits(_add(model), ids)
    merge(model, "default")
    torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


def test_gradients_pass_through_merged_layers(tiny, ids):
    model = _add(tiny())
    grads = []
    for step in (lambda: None, lambda: merge(model)):
        step()
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_under_inference_mode(tiny, ids):
    model = _add(tiny())
    with torch.inference_mode():
        merge(model)
    assert not any(p.is_inference() for p in model.parameters())
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer, nn.Linear)
