"""The loss of a packed batch is the model's own, whatever way it takes; layout never changes it."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GraniteConfig, MambaConfig

from deltaw.config import LoraConfig
from deltaw.nn.inject import inject
from deltaw.nn.walk import adapted_layers
from deltaw.ops.dropout import DropoutKey
from deltaw.train.evaluate import mean_loss
from deltaw.train.forward import evaluation_mode, examine, training_mode

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
OTHERS = {
    # name: (config, packs, has a plain head)
    "gemma2": (lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=8, final_logit_softcapping=2.0), True, False),
    "granite": (lambda: GraniteConfig(**SIZES, logits_scaling=3.0), True, False),
    "bloom": (lambda: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0), False, True),
    "mamba": (lambda: MambaConfig(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2), False, True),
}


def _adapted(model, **given):
    torch.manual_seed(1)
    inject(model, LoraConfig(**dict(r=4, target_modules="all-linear", init_lora_weights=False) | given))
    return model


def _by_hand(model, examples):
    """(summed loss, number of targets) from the model's own logits, an example at a time."""
    total, count = 0.0, 0
    for tokens in examples:
        with torch.no_grad():
            logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0].float()
        for at, (token, is_target) in enumerate(zip(tokens.input_ids, tokens.supervised, strict=True)):
            if is_target and at > 0:
                total -= logits[at - 1].log_softmax(0)[token].item()
                count += 1
    return total, count


def _summed(language_model, examples, max_tokens):
    with torch.no_grad():
        return sum(language_model.loss(packed).item() for packed in language_model.pack(examples, max_tokens))


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_loss_is_the_models_own(tiny, architecture, examples, max_tokens):
    model, batch = _adapted(tiny(architecture)), examples(7)
    language_model = examine(model)
    assert language_model.packs and language_model.has_plain_head
    assert _summed(language_model, batch, max_tokens) == pytest.approx(_by_hand(model, batch)[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_models_that_need_another_way_get_it_and_are_right(name, examples):
    make, packs, has_plain_head = OTHERS[name]
    torch.manual_seed(0)
    model = _adapted(AutoModelForCausalLM.from_config(make()).eval())
    language_model = examine(model)
    assert (language_model.packs, language_model.has_plain_head) == (packs, has_plain_head)
    batch = examples(6, shortest=9)
    assert _summed(language_model, batch, 10_000) == pytest.approx(_by_hand(model, batch)[0], rel=1e-5)


def test_an_adapted_or_trained_head_takes_the_general_way(tiny, examples):
    model = _adapted(tiny("llama"), target_modules=["q_proj", "lm_head"])
    language_model = examine(model)
    assert not language_model.has_plain_head
    assert _summed(language_model, examples(4), 1000) == pytest.approx(_by_hand(model, examples(4))[0], rel=1e-5)
    whole = tiny("llama")
    assert not examine(whole).has_plain_head  # every weight trains, the head too


def test_absolute_positions_restart_with_each_example(tiny, examples):
    model = examine(tiny("gpt2"))
    twice = [examples(1, shortest=12)[0]] * 2
    assert _summed(model, twice, 1000) == pytest.approx(2 * _summed(model, twice[:1], 1000), rel=1e-6)


def test_gradient_checkpointing_gives_the_same_numbers(tiny, architecture, examples):
    # Backward runs a layer again, with the masks and the borders of its first run although both contexts have ended.
    model = _adapted(tiny(architecture), lora_dropout=0.3, use_dora=True)
    language_model = examine(model)
    found = []
    for checkpointing in (False, True):
        with training_mode(language_model, checkpointing=checkpointing):
            for packed in language_model.pack(examples(6), 30):
                loss = language_model.loss(packed, DropoutKey(0, 1, packed.row_offset))
                loss.backward()
        found.append((loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)))
        model.zero_grad()
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*found, strict=True))


@pytest.mark.parametrize(("kind", "share"), [("llama", 1.4), ("gpt2", 3)])
def test_checkpointing_keeps_fewer_activations(tiny, examples, kind, share):
    """Selective in a Llama, whole layers in a GPT-2. (Half with an MLP as wide as SmolLM2's; here it is narrow.)"""
    model = _adapted(tiny(kind))
    language_model = examine(model)
    kept = []
    for checkpointing in (False, True):
        sizes = {}  # by memory, since q, k and v save one input

        def save(t, sizes=sizes):
            if not isinstance(t, torch.nn.Parameter):
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            training_mode(language_model, checkpointing=checkpointing),
            torch.autograd.graph.saved_tensors_hooks(save, lambda t: t),
        ):
            loss = language_model.loss(language_model.pack(examples(6), 1000)[0])
        kept.append(sum(sizes.values()))
        del loss  # until here what is saved keeps its place in memory
    assert kept[1] <= kept[0] / share


def test_modes_leave_the_model_as_they_found_it(tiny):
    model = _adapted(tiny(), lora_dropout=0.5)
    language_model = examine(model)
    before = model.config._attn_implementation
    with training_mode(language_model, checkpointing=True):
        assert all(layer.training for _, layer in adapted_layers(model))
        with evaluation_mode(model):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
        assert all(layer.training for _, layer in adapted_layers(model))
    assert not any(module.training for module in model.modules())
    assert model.config._attn_implementation == before
    assert not model.is_activation_checkpointing


def test_evaluation_weighs_tokens_not_batches(tiny, examples):
    model = _adapted(tiny(), lora_dropout=0.5)
    language_model = examine(model)
    uneven = [*examples(3), *examples(2, shortest=40, seed=5)]
    total, count = _by_hand(model, uneven)
    for max_tokens in (1, 25, 10_000):
        told = []
        loss, supervised = mean_loss(language_model, uneven, max_tokens, lambda *p, told=told: told.append(p))
        assert supervised == count
        assert loss == pytest.approx(total / count, rel=1e-6)
        assert told[-1] == (len(told), len(told))
    means = [mean_loss(language_model, [tokens], 100)[0] for tokens in uneven]
    assert not math.isclose(sum(means) / len(means), total / count, rel_tol=1e-4)  # the mistake would show


def test_evaluation_of_nothing_supervised_is_finite(tiny, examples):
    silent = [type(t)(input_ids=t.input_ids, supervised=[False] * len(t.input_ids), origin="x") for t in examples(2)]
    assert mean_loss(examine(tiny()), silent, 100) == (0.0, 0)


def test_a_head_with_a_bias(tiny, examples):
    model = tiny("gpt2")
    model.lm_head = torch.nn.Linear(32, 97)
    language_model = examine(model.requires_grad_(False))
    assert language_model.has_plain_head
    packed = language_model.pack(examples(3), 1000)[0]
    logits = torch.cat([model(torch.tensor([t.input_ids])).logits[0] for t in examples(3)])
    wanted = F.cross_entropy(logits[packed.target_rows_S], packed.targets_S, reduction="sum")
    torch.testing.assert_close(language_model.loss(packed), wanted)
