"""LoRA and DoRA on embeddings and on heads that are tied to them."""

import peft
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import deltaw
from deltaw.adapters.merge import merge, merge_and_unload
from deltaw.adapters.peft_format import adapter_tensors
from deltaw.nn.batch import BASE, Batch, batch
from deltaw.nn.embedding import AdaptedEmbedding
from deltaw.nn.inject import activate, inject
from deltaw.nn.lowrank import Active, LowRank

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding"
)
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
CLOSE = dict(atol=1e-5, rtol=1e-5)
CONFIGS = {
    "lora": dict(),
    "dora": dict(use_dora=True),
    "dora, random start, rslora": dict(use_dora=True, init_lora_weights=False, use_rslora=True),
}


def _targets(architecture, where):
    return [EMBEDDING[architecture], "lm_head"] if where == "both" else [where or EMBEDDING[architecture]]


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("where", [None, "lm_head", "both"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_peft_s(twins, architecture, ids, name, where):
    pair = twins(architecture, r=4, target_modules=_targets(architecture, where), **CONFIGS[name])
    pair.check_logits_and_gradients(ids)


@pytest.mark.parametrize("where", [None, "lm_head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_0_is_the_base_and_files_go_both_ways(tiny, ids, architecture, name, where, tmp_path):
    config = dict(r=4, target_modules=_targets(architecture, where), **CONFIGS[name])
    ours = deltaw.get_peft_model(tiny(architecture), deltaw.LoraConfig(**config))
    if config.get("init_lora_weights", True):
        torch.testing.assert_close(_logits(ours, ids), _logits(tiny(architecture), ids))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "ours")
    torch.testing.assert_close(_logits(theirs, ids), _logits(ours, ids), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = deltaw.PeftModel.from_pretrained(tiny(architecture), tmp_path / "theirs")
    torch.testing.assert_close(_logits(again, ids), _logits(ours, ids), **CLOSE)
    mine, back = adapter_tensors(ours.get_base_model()), adapter_tensors(again.get_base_model())
    assert mine.keys() == back.keys() and all(torch.equal(mine[key], back[key]) for key in mine)


def test_dora_is_its_definition():
    """y = W'[ids] with W'ᵀ row-normalised to m: one magnitude for each hidden unit, over the whole vocabulary."""
    embedding = torch.nn.Embedding(11, 6)
    layer = AdaptedEmbedding(embedding, "e", Active(("a",)))
    a, b, m = torch.randn(2, 11), torch.randn(6, 2), torch.rand(6)
    layer.adapters["a"] = LowRank(a, b, scaling=0.7, magnitude_N=m)
    changed = embedding.weight + 0.7 * (b @ a).T
    expected = m * changed / changed.norm(dim=0)
    ids = torch.randint(11, (2, 5))
    torch.testing.assert_close(layer(ids), expected[ids])
    torch.testing.assert_close(layer.merged_layer(embedding, ["a"])(ids), expected[ids])


def test_dora_of_a_scaled_embedding():
    def base():
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval()

    config = dict(r=2, target_modules=["embed_tokens"], use_dora=True, init_lora_weights=False)
    ours = deltaw.get_peft_model(base(), deltaw.LoraConfig(**config))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    with torch.no_grad():
        ours.get_base_model().get_input_embeddings().adapter("default").lora_magnitude_vector.mul_(1.5)
    peft.set_peft_model_state_dict(theirs, adapter_tensors(ours.get_base_model()))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(_logits(ours, ids), _logits(theirs, ids), **CLOSE)


def test_the_padding_token_gets_no_gradient(tiny, ids):
    model = tiny()
    padding = int(ids[0, 0])
    model.get_input_embeddings().padding_idx = padding
    inject(model, deltaw.LoraConfig(target_modules=["embed_tokens"]))
    model(input_ids=ids, labels=ids).loss.backward()
    by_token = model.get_input_embeddings().adapter("default").lora_A.grad.abs().amax(0)
    assert by_token[padding] == 0 and by_token[int(ids[0, 1])] > 0


@pytest.mark.parametrize("is_dora", [False, True])
def test_a_mixed_batch_gives_each_row_its_own(tiny, ids, is_dora):
    model, generator = tiny("qwen2"), torch.Generator().manual_seed(3)
    for name in ("a", "b"):
        inject(model, deltaw.LoraConfig(target_modules=["embed_tokens", "lm_head"], use_dora=is_dora), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    alone = {}
    for name in ("a", "b"):
        activate(model, [name])
        alone[name] = _logits(model, ids)
    activate(model, [])
    alone[BASE] = _logits(model, ids)
    for names in (("a", "b"), ("b", BASE)):
        with batch(Batch(adapters=names)):
            mixed = _logits(model, ids)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_an_adapter_of_the_head_moves_the_head_alone(tiny, ids, architecture):
    model = tiny(architecture)
    embedding, base = model.get_input_embeddings(), _logits(model, ids)
    rows = embedding.weight.clone()
    inject(model, deltaw.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    adapted = _logits(model, ids)
    assert not torch.equal(adapted, base)
    assert model.get_input_embeddings() is embedding and torch.equal(embedding.weight, rows)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"lm_head.adapters.default.lora_{part}" for part in "AB"
    ]
    merge(model)
    assert torch.equal(model.get_input_embeddings().weight, rows)
    torch.testing.assert_close(_logits(model, ids), adapted, **CLOSE)
    plain = merge_and_unload(model)
    assert torch.equal(plain.get_input_embeddings().weight, rows)
    assert not plain.config.tie_word_embeddings or architecture == "llama"
    torch.testing.assert_close(_logits(plain, ids), adapted, **CLOSE)
