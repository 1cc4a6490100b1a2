"""Single trained rows of embeddings and heads: what PEFT computes, and what its files say."""

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import deltaw
from deltaw.adapters.merge import merge, merge_and_unload, unmerge
from deltaw.adapters.peft_format import adapter_tensors, load_adapter, read_adapter, save_adapter
from deltaw.errors import UserError
from deltaw.nn.batch import BASE, Batch, batch
from deltaw.nn.inject import activate, inject, restore
from deltaw.nn.state import state_of
from deltaw.nn.tokens import TokenLayer, TokenRows, TokenTarget, check_apart, token_targets

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings")
Q = {"llama": "q_proj", "qwen2": "q_proj", "gpt2": "c_attn"}
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt2": "wte"}
IDS = torch.tensor([[90, 3, 90, 5, 1, 17, 5, 33, 4], [4, 8, 3, 3, 3, 60, 61, 62, 90]])
TOKENS = [90, 3, 5]
CLOSE = dict(atol=1e-5, rtol=1e-5)


def _config(architecture, **more):
    return dict(r=4, target_modules=[Q[architecture]]) | more


def _inject(model, name="default", *, indices=TOKENS, seed=5, **config):
    """An adapter with random rows."""
    config = dict(target_modules=["q_proj"], trainable_token_indices=indices) | config
    inject(model, deltaw.LoraConfig(**config), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


CASES = {
    "a list": lambda a: TOKENS,
    "by name": lambda a: {EMBEDDING[a]: TOKENS},
    "the head alone": lambda a: {"lm_head": TOKENS},
    "both alike": lambda a: {EMBEDDING[a]: TOKENS, "lm_head": TOKENS},
    "both, each its own": lambda a: {EMBEDDING[a]: TOKENS, "lm_head": [7, 5]},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_peft_s(twins, architecture, case):
    pair = twins(architecture, **_config(architecture, trainable_token_indices=CASES[case](architecture)))
    pair.check_logits_and_gradients(IDS)
    assert pair.ours.get_nb_trainable_parameters() == pair.theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(tiny, architecture, case, tmp_path):
    config = _config(architecture, trainable_token_indices=CASES[case](architecture))
    ours = deltaw.get_peft_model(tiny(architecture), deltaw.LoraConfig(**config))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "ours")
    torch.testing.assert_close(_logits(theirs), _logits(ours), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = deltaw.PeftModel.from_pretrained(tiny(architecture), tmp_path / "theirs")
    assert torch.equal(_logits(again), _logits(ours))
    stored = [read_adapter(tmp_path / name) for name in ("ours", "theirs")]
    assert stored[0].others.keys() == stored[1].others.keys()
    assert stored[0].config.trainable_token_indices == stored[1].config.trainable_token_indices


def test_rows_start_as_the_base_s_and_step_0_is_the_base(tiny):
    model = tiny("qwen2")
    before, rows = _logits(model), model.get_input_embeddings().weight[TOKENS].clone()
    inject(model, deltaw.LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    layer = model.get_input_embeddings()
    assert isinstance(layer, TokenLayer) and torch.equal(layer.adapter("default").trainable_tokens_delta, rows)
    torch.testing.assert_close(_logits(model), before)  # the head's own product is of another shape
    assert layer.embedding_dim == 32 and not layer.base_layer.weight.requires_grad


def test_a_tied_head_predicts_by_the_rows_that_are_read(tiny):
    model = _inject(tiny("qwen2"))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.adapter("default") is embedding.adapter("default")
    assert torch.equal(embedding(torch.tensor(TOKENS)), embedding.adapter("default").trainable_tokens_delta)
    hidden = torch.randn(2, 32)
    expected = hidden @ embedding.weight.T
    torch.testing.assert_close(head(hidden), expected)
    assert torch.equal(head.weight, embedding.weight)
    assert [k for k in adapter_tensors(model) if "token" in k] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]


def test_a_bias_of_the_head_stays():
    linear = nn.Linear(4, 6)
    layer = TokenLayer(linear, "head", state_of(linear).active)
    layer.adapters["a"] = TokenRows(torch.randn(2, 4), TokenTarget((5, 1), ("head",)))
    layer.active.names = ("a",)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, linear.bias))


def test_the_padding_token_s_row_gets_no_gradient_from_lookups(tiny):
    model = tiny("llama")
    model.get_input_embeddings().padding_idx = 3
    _inject(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    by_row = model.get_input_embeddings().adapter("default").trainable_tokens_delta.grad.abs().amax(1)
    assert by_row[1] == 0 and by_row[0] > 0 and by_row[2] > 0


def test_embeddings_that_were_made_to_require_gradients(tiny):
    """As preparing for quantised training does, before adapters come."""
    model = tiny()
    model.enable_input_require_grads()
    _inject(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().adapter("default").trainable_tokens_delta.grad.any()


def test_a_scaled_embedding():
    def base():
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=97, num_key_value_heads=1, **sizes)).eval()

    ours = _inject(base())
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    peft.set_peft_model_state_dict(theirs, adapter_tensors(ours))
    assert not torch.equal(_logits(ours), _logits(base()))
    torch.testing.assert_close(_logits(ours), _logits(theirs), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_mixed_batch_gives_each_row_its_own(tiny, architecture):
    model = _inject(tiny(architecture), "a")
    _inject(model, "b", indices=[5, 61], seed=6)
    alone = {}
    for name in ("a", "b"):
        activate(model, [name])
        alone[name] = _logits(model)
    activate(model, [])
    alone[BASE] = _logits(model)
    assert torch.equal(alone[BASE], _logits(tiny(architecture)))
    for names in (("a", "b"), ("b", BASE), (BASE, "a"), ("b", "b")):
        with batch(Batch(adapters=names)):
            mixed = _logits(model)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


def test_restoring_gives_the_base_back(tiny):
    model = tiny("qwen2")
    modules, before = dict(model.named_modules()), _logits(model)
    _inject(model, "a")
    _inject(model, "b", indices=[1], seed=6)
    restore(model, "a")
    assert isinstance(model.get_output_embeddings(), TokenLayer)
    restore(model, "b")
    assert dict(model.named_modules()) == modules and torch.equal(_logits(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_merging(tiny, architecture):
    model = _inject(tiny(architecture))
    base, adapted = _logits(tiny(architecture)), _logits(model)
    merge(model, safe=True)
    torch.testing.assert_close(_logits(model), adapted, **CLOSE)
    unmerge(model)
    assert torch.equal(_logits(model), adapted)
    activate(model, [])
    assert torch.equal(_logits(model), base)
    plain = merge_and_unload(model, ["default"])
    assert type(plain.get_input_embeddings()) is nn.Embedding and type(plain.lm_head) is nn.Linear
    torch.testing.assert_close(_logits(plain), adapted, **CLOSE)
    is_tied = architecture == "qwen2"
    assert plain.config.tie_word_embeddings is is_tied
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is is_tied


def test_several_at_once_where_no_row_is_replaced_twice(tiny):
    model = _inject(_inject(tiny(), "a"), "b", indices=[1, 17], seed=6)
    _inject(model, "c", indices=[17], seed=7)
    activate(model, ["a", "b"])
    weight = model.get_input_embeddings().weight
    layer = model.get_input_embeddings()
    assert torch.equal(weight[TOKENS], layer.adapter("a").trainable_tokens_delta)
    assert torch.equal(layer(torch.tensor([17])), layer.adapter("b").trainable_tokens_delta[1:])
    with pytest.raises(UserError, match=r"'b' and 'c' both replace row 17 of model.embed_tokens"):
        activate(model, ["b", "c"])
    assert state_of(model).active.names == ("a", "b")


def test_rows_of_tied_modules_count_as_replaced():
    rows = [TokenRows(torch.zeros(1, 2), TokenTarget((4,), modules)) for modules in (("e", "head"), ("head",))]
    with pytest.raises(UserError, match="row 4 of head"):
        check_apart(zip("ab", rows, strict=True))
    check_apart(zip("aa", rows, strict=True))


def test_rows_are_found_for_any_ids():
    rows = TokenRows(torch.arange(8.0).view(4, 2), TokenTarget((7, 0, 9, 3), ("e",)))
    ids = torch.arange(12, dtype=torch.int32)
    is_here, slot = rows.slots(ids)
    assert ids[is_here].tolist() == [0, 3, 7, 9]
    assert slot[is_here].tolist() == [1, 3, 0, 2]


def test_bfloat16_has_float32_rows_and_keeps_its_dtype(tiny):
    model = _inject(tiny(dtype=torch.bfloat16))
    assert model.get_input_embeddings().adapter("default").trainable_tokens_delta.dtype == torch.float32
    assert _logits(model).dtype == torch.bfloat16
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().adapter("default").trainable_tokens_delta.grad.dtype == torch.float32


MISTAKES = {
    "out of range": (dict(trainable_token_indices=[97]), "97 is not a row of model.embed_tokens; give ids from 0"),
    "no such name": (dict(trainable_token_indices={"emb": [1]}), "no embedding is called 'emb'; this model has model"),
    "not rows of tokens": (dict(trainable_token_indices={"norm": [1]}), "no embedding is called 'norm'"),
    "named twice": (
        dict(trainable_token_indices={"embed_tokens": [1], "model.embed_tokens": [2]}),
        "model.embed_tokens is named twice",
    ),
    "adapted too": (dict(trainable_token_indices=[1], target_modules=["embed_tokens"]), "in another way already"),
    "saved too": (dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]), "in another way already"),
    "tied to an adapted head": (dict(trainable_token_indices=[1], target_modules=["lm_head"]), "lm_head is adapted"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_the_model_alone(tiny, case):
    config, message = MISTAKES[case]
    model = tiny("qwen2")
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        inject(model, deltaw.LoraConfig(**dict(target_modules=["q_proj"]) | config))
    assert dict(model.named_modules()) == modules and all(p.requires_grad for p in model.parameters())


def test_rows_and_other_adapters_of_one_embedding_are_refused(tiny):
    model = _inject(tiny("qwen2"), "a")
    for config in (dict(target_modules=["embed_tokens"]), dict(modules_to_save=["lm_head"])):
        with pytest.raises(UserError, match=r"embed_tokens|lm_head"):
            inject(model, deltaw.LoraConfig(**dict(target_modules=["q_proj"]) | config), "b")
    assert list(state_of(model).configs) == ["a"]


def test_ids_that_come_twice():
    bases = {"e": nn.Embedding(4, 2)}
    with pytest.raises(UserError, match="a token of e comes twice"):
        token_targets([1, 1], bases, "e")
    with pytest.raises(UserError, match="-1 is not a row"):
        token_targets([-1], bases, "e")
    assert token_targets(None, bases, "e") == []


def test_files_that_do_not_fit(tiny, tmp_path):
    save_adapter(_inject(tiny()), tmp_path)
    stored = read_adapter(tmp_path)
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    for tensor, message in ((None, "model.embed_tokens missing"), (torch.zeros(2, 32), r"is \(2, 32\)")):
        others = {} if tensor is None else {key: tensor}
        damaged = type(stored)(stored.path, stored.config, stored.factors, others, stored.provenance, 0)
        with pytest.raises(UserError, match=message):
            load_adapter(tiny(), damaged)
    config = deltaw.LoraConfig(**stored.config.to_dict() | dict(trainable_token_indices=None))
    without = type(stored)(stored.path, config, stored.factors, stored.others, stored.provenance, 0)
    with pytest.raises(UserError, match="the model has no such tensor"):
        load_adapter(tiny(), without)
