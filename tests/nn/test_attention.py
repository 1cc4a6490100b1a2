"""Packed attention inside real architectures: each example as if alone, nothing leaks, nothing else changes."""

from contextlib import suppress

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    MistralConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from deltaw.nn.attention import NAME, use_packed_attention
from deltaw.nn.batch import Batch, batch

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
    attn_implementation="eager",
)
OTHERS = {
    "gemma2": lambda: Gemma2Config(
        **SIZES, attn_logit_softcapping=1.5, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SIZES),
}
LENGTHS = (5, 1, 11)


@pytest.fixture(params=["llama", "qwen2", "gpt2", *OTHERS])
def model(request, tiny):
    if request.param not in OTHERS:
        return tiny(request.param)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[request.param]()).eval()


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(97, (length,), generator=generator) for length in LENGTHS]


def _packed(model, examples, **kwargs):
    positions = torch.cat([torch.arange(len(example)) for example in examples])[None]
    lengths = tuple(len(example) for example in examples)
    with use_packed_attention(model), batch(Batch(lengths=lengths)):
        return model(torch.cat(examples)[None], position_ids=positions, use_cache=False, **kwargs).logits[0]


def test_perturbing_one_document_moves_no_bit_of_the_next(model, examples):
    before = _packed(model, examples)
    after = _packed(model, [(examples[0] + 1) % 97, *examples[1:]])
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


def test_the_window_and_the_softcap_matter(examples):
    torch.manual_seed(0)
    config = OTHERS["gemma2"]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    packed = _packed(model, examples)
    model.config.sliding_window = 100  # the mask's word, which is the one that counts
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (_packed(model, examples) - packed).abs().max() > 1e-3


def test_the_model_s_own_attention_is_back_afterwards(model, examples):
    before, ids = model.config._attn_implementation, torch.stack([examples[0]] * 2)
    logits = model(ids).logits
    with suppress(RuntimeError), use_packed_attention(model):
        assert model.config._attn_implementation == NAME
        raise RuntimeError
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, logits)


def test_without_lengths_it_is_ordinary_attention(model, examples):
    ids = torch.stack([examples[2], examples[2].flip(0)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if model.config.model_type == "gemma2":  # torch's SDPA has no softcap, and transformers says so
        with use_packed_attention(model), pytest.raises(ValueError, match="softcap"):
            model(ids, attention_mask=mask)
        return
    model.set_attn_implementation("sdpa")
    own = model(ids, attention_mask=mask).logits
    with use_packed_attention(model):
        ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], own[mask.bool()], atol=1e-5, rtol=1e-5)


def test_several_rows_or_a_cache_are_refused(tiny, ids):
    model = tiny()
    with use_packed_attention(model), batch(Batch(lengths=(4, 5))):
        with pytest.raises(ValueError, match="this batch has 2 rows"):
            model(ids, use_cache=False)
        with pytest.raises(ValueError, match="9 tokens in all, in a batch of 8"):
            model(ids[:1, :8], use_cache=False)
    cache = model(ids[:1]).past_key_values
    with (
        use_packed_attention(model),
        batch(Batch(lengths=(4, 5))),
        pytest.raises(ValueError, match="9 tokens, which see 18"),
    ):
        model(ids[:1], past_key_values=cache)


def test_attention_dropout_is_refused(tiny, ids):
    model = tiny("gpt2").train()
    with pytest.raises(ValueError, match="can't do dropout"):
        _packed(model, [ids[0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda c: ModernBertForMaskedLM(
            ModernBertConfig(**c, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
        ),
        lambda c: BertLMHeadModel(BertConfig(**c, is_decoder=False)),
    ],
    ids=["modernbert", "bert"],
)
def test_attention_in_both_directions_is_refused(make, ids):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = make(sizes).eval()
    with (
        use_packed_attention(model),
        batch(Batch(lengths=(4, 5))),
        pytest.raises(ValueError, match="attention in both directions"),
    ):
        model(ids[:1])
