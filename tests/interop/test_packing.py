"""Examples laid end to end train as each alone does, whatever an architecture does in its attention and positions.

What these models have beside plain causal attention: sliding windows shorter than the examples (Mistral, Phi-3, every
second layer of Gemma 2 and 3), soft-capped scores and logits (Gemma 2), learned positions (GPT-2, OPT), norms of
queries and keys (Qwen 3, Gemma 3), scaled embeddings (Gemma), routed experts (Qwen 3 MoE).
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config, DogeConfig, Llama4TextConfig, PhimoeConfig

import deltaw
from deltaw.data.render import Tokens
from deltaw.nn.inject import inject
from deltaw.ops.dropout import DropoutKey
from deltaw.train.forward import LanguageModel, examine, training_mode

LENGTHS = (13, 5, 1, 17)
CAPPED = ("gemma2",)
"""Whose logits are more than ``head(hidden)``."""

SIZES = dict(
    **dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4),
    **dict(num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2),
)
OTHERS = {
    # what is unlike others: (config, packs)
    "in chunks": (
        lambda: Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=4, num_local_experts=2), False
    ),
    "a window in the mask alone": (lambda: PhimoeConfig(**SIZES, sliding_window=4, num_local_experts=2), True),
    "a mask that depends on the values": (lambda: DogeConfig(**SIZES, sliding_window=4), False),
    "values of another size": (
        lambda: DeepseekV3Config(
            **SIZES, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=4,
            first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16,
        ),
        True,
    ),
}  # fmt: skip


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(5)
    return [
        Tokens(
            input_ids=torch.randint(3, 97, (length,), generator=generator).tolist(),
            supervised=[at > 1 for at in range(length)],
            origin=f"x:{length}",
        )
        for length in LENGTHS
    ]


@pytest.fixture
def model(decoder, helpers):
    """A model with a DoRA adapter away from its start; its attention is the plainest."""
    model = decoder.base()
    targets = decoder.names.all_linear
    inject(model, deltaw.LoraConfig(r=4, target_modules=targets, use_dora=True, lora_dropout=0.3))
    helpers.stir(p for p in model.parameters() if p.requires_grad)
    model.set_attn_implementation("eager")
    return model


def _own_loss(model, tokens):
    """Summed loss of one example, from the model's own logits."""
    logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0, :-1]
    targets = torch.tensor(tokens.input_ids[1:], dtype=torch.long)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses[torch.tensor(tokens.supervised[1:], dtype=torch.bool)].sum()


def _loss_and_gradients(model, losses):
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = sum(losses)
    return loss.detach(), torch.autograd.grad(loss, trained)


def _assert_close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for mine, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_what_is_found_out_of_a_model(decoder, model):
    found = examine(model)
    assert found.packs
    assert found.has_plain_head is (decoder.architecture not in CAPPED)


def test_loss_and_gradients_equal_the_models_own_on_each_example(model, examples):
    packing = examine(model)
    packed = packing.pack(examples, 1000)
    assert [p.lengths for p in packed] == [LENGTHS]
    own = (_own_loss(model, tokens) for tokens in examples)
    _assert_close(_loss_and_gradients(model, map(packing.loss, packed)), _loss_and_gradients(model, own))


def test_dropout_and_checkpointing_do_not_see_the_layout(model, examples):
    def train(language_model, checkpointing):
        with training_mode(language_model, checkpointing=checkpointing):
            packed = language_model.pack(examples, 1000)
            return _loss_and_gradients(model, [language_model.loss(p, DropoutKey(3, 4, p.row_offset)) for p in packed])

    packing = examine(model)
    wanted = train(LanguageModel(model=model, packs=False, has_plain_head=False), False)
    _assert_close(train(packing, False), wanted)
    _assert_close(train(packing, True), wanted)


def test_an_adapted_heads_dropout_does_not_see_the_layout(bench_of, examples):
    model = bench_of("llama").base()
    inject(model, deltaw.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.3))
    packing, found = examine(model), []
    for language_model in (packing, replace(packing, packs=False)):
        with training_mode(language_model, checkpointing=False):
            packed = language_model.pack(examples, 1000)
            losses = [language_model.loss(p, DropoutKey(3, 4, p.row_offset)) for p in packed]
            found.append(_loss_and_gradients(model, losses))
    _assert_close(*found)


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_attention(name, examples):
    config, packs = OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), attn_implementation="eager").eval()
    found = examine(model)
    assert found.packs is packs
    with torch.no_grad():
        losses = [found.loss(packed) for packed in found.pack(examples, 1000)]
        torch.testing.assert_close(sum(losses), sum(_own_loss(model, tokens) for tokens in examples))


def test_nothing_leaks_to_the_next_example(model, examples):
    # The first example has no targets: whatever it is, loss and gradients are the second's, to the bit.
    first, *_, second = examples
    silent = [
        Tokens(input_ids=ids, supervised=[False] * len(ids), origin="x")
        for ids in (first.input_ids, first.input_ids[::-1])
    ]
    packing = examine(model)
    one, other = (_loss_and_gradients(model, map(packing.loss, packing.pack([s, second], 1000))) for s in silent)
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("bert_mlm", "its tokens see those that come after"), ("t5", "it reads its input with an encoder")],
)
def test_models_that_do_not_predict_the_next_token_are_refused(tiny, architecture, reason):
    with pytest.raises(deltaw.UserError, match=f"is not a causal language model: {reason}"):
        examine(tiny(architecture))
