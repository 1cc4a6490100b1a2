"""Lean layers against the general path of the same model: logits and every gradient, whatever is asked of them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltaw
from deltaw.nn.attention import use_packed_attention
from deltaw.nn.batch import Batch, batch, checkpoint_context
from deltaw.nn.families import LeanLayer, decoder, lean, plain, recompute_mlp
from deltaw.nn.inject import inject, restore
from deltaw.nn.walk import adapted_layers
from deltaw.ops.dropout import DropoutKey

_SIZES = dict(
    vocab_size=97, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=4, head_dim=10,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
_ALTERNATING = dict(use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"] * 2)
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**_SIZES | dict(num_hidden_layers=4), **_ALTERNATING, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES | dict(num_hidden_layers=4), **_ALTERNATING, attention_bias=True),
    "gemma": lambda: GemmaConfig(**_SIZES),
}
LORA = dict(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
each_family = pytest.mark.parametrize("family", CONFIGS)


def _base(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms start at one and biases at zero, where little shows
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def _adapted(family="llama", dtype=torch.float32, **config):
    model = _base(family, dtype)
    torch.manual_seed(1)
    inject(model, deltaw.LoraConfig(**LORA | config))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    return model


@pytest.fixture
def counted(monkeypatch):
    """How many forwards of layers took the lean path."""
    runs, attend = [], decoder._attend

    def counting(*args, **kwargs):
        runs.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(decoder, "_attend", counting)
    return runs


def _padded(model):
    """What a Trainer's collator sends: rows of several lengths, padded on the right, with labels."""
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 8:] = 0, 0
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)


def _packed(model, dropout=None):
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    with batch(Batch(lengths=(7, 1, 12), dropout=dropout)), use_packed_attention(model):
        return model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)


def _run(model, forward=_padded):
    """Logits, and the gradient of whatever is trained."""
    model.zero_grad()
    torch.manual_seed(5)  # masks without a key come from torch's generator
    out = forward(model)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(mine, theirs, tolerance=1e-5):
    """Each tensor within ``tolerance`` of its twin, by their norms."""
    (logits, grads), (twin_logits, twin_grads) = mine, theirs
    assert grads and grads.keys() == twin_grads.keys()
    for name, twin in [("logits", twin_logits), *twin_grads.items()]:
        one = logits if name == "logits" else grads[name]
        assert (one - twin).norm() <= tolerance * max(twin.norm().item(), 1e-2), name


def _check(model, counted, forward=_padded, *, lean_layers=None, tolerance=1e-5):
    """The model as it is against itself without lean layers; ``lean_layers``: how many should have been lean."""
    counted.clear()
    mine = _run(model, forward)
    assert len(counted) == (len(model.model.layers) if lean_layers is None else lean_layers)
    plain(model)
    counted.clear()
    theirs = _run(model, forward)
    assert not counted
    lean(model)
    _assert_same(mine, theirs, tolerance)
    return mine


@pytest.mark.parametrize("forward", [_padded, _packed])
@each_family
def test_equals_the_general_path(level, counted, family, forward):
    _, grads = _check(_adapted(family), counted, forward)
    assert all(grad.any() for grad in grads.values())


CASES = {
    "dora": dict(use_dora=True),
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "one of the mlp": dict(target_modules=["up_proj"]),
    "the mlp": dict(target_modules=["gate_proj", "up_proj", "down_proj"]),
    "out": dict(target_modules=["o_proj", "down_proj"]),
    "a start": dict(init_lora_weights="pissa"),
    "trained biases": dict(bias="all"),
    "an embedding too": dict(target_modules=["embed_tokens", "q_proj"]),
    "rsLoRA, ranks": dict(use_rslora=True, rank_pattern={"q_proj": 1, "down_proj": 7}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_whatever_is_adapted(counted, family, case):
    _check(_adapted(family, **CASES[case]), counted)
    _check(_adapted(family, **CASES[case]), counted, _packed)


@each_family
def test_dropout_has_the_masks_of_the_general_path(counted, family):
    model = _adapted(family, lora_dropout=0.4, use_dora=True)
    for _, layer in adapted_layers(model):
        layer.training = True
    key = DropoutKey(seed=1, step=2, first_row=9)
    _check(model, counted, lambda m: _packed(m, key))


@each_family
def test_bfloat16_is_as_far_from_the_truth_as_the_general_path(level, counted, family):
    exact = _run(_adapted(family))
    model = _adapted(family, torch.bfloat16)
    mine = _run(model)
    assert counted
    plain(model)
    theirs = _run(model)
    for one, twin, true in [
        (mine[0], theirs[0], exact[0]),
        *((mine[1][n], theirs[1][n], g) for n, g in exact[1].items()),
    ]:
        errors = [(t.float() - true.float()).norm() / true.norm() for t in (one, twin)]
        assert errors[0] < 1.5 * errors[1] + 0.01


def test_rows_of_several_adapters(counted):
    model = _adapted()
    inject(model, deltaw.LoraConfig(**LORA | dict(target_modules=["v_proj", "up_proj"])), "second")
    for _, layer in adapted_layers(model):
        layer.adapters.requires_grad_(True)

    def forward(model):
        with batch(Batch(adapters=("second", "__base__", "default"))):
            return _padded(model)

    _check(model, counted, forward)


@each_family
def test_no_gradient_goes_below_the_lowest_adapter(counted, family):
    model = _adapted(family, layers_to_transform=[2])
    _, grads = _check(model, counted)
    assert all(".layers.2." in name for name in grads)
    out = _padded(model)
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    out = _padded(model)
    assert seen == [False] and out.logits.requires_grad


def test_a_model_between_adapters_is_the_base(counted):
    """Nothing is trained: the lean path may run, and gives the base's own logits."""
    model, base = _adapted(), _base("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with batch(Batch(adapters=("__base__",) * 3)):
        torch.testing.assert_close(_padded(model).logits, _padded(base).logits, atol=1e-5, rtol=1e-5)
    assert counted


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_the_mlp_gives_the_same_gradients(counted, family, packed):
    model = _adapted(family, lora_dropout=0.4)
    for _, layer in adapted_layers(model):
        layer.training = True
    forward = (lambda m: _packed(m, DropoutKey(seed=1, step=2))) if packed else _padded
    once = _run(model, forward)
    layers = [m for m in model.modules() if isinstance(m, LeanLayer)]
    with recompute_mlp(layers):
        twice = _run(model, forward)
    assert torch.equal(once[0], twice[0])
    for name, grad in once[1].items():
        assert torch.equal(twice[1][name], grad), name
    assert not any("recomputes_mlp" in vars(layer) for layer in layers)


def test_recomputing_where_the_general_path_runs(counted):
    model = _adapted(modules_to_save=["input_layernorm"])
    once = _run(model)
    with recompute_mlp([m for m in model.modules() if isinstance(m, LeanLayer)]):
        _assert_same(_run(model), once, 0)
    assert not counted


def _hook(model):
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda m, args, y: y * 2)


def _pre_hook(model):
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda m, args: None)


def _own_forward(model):
    projection = model.model.layers[1].self_attn.o_proj
    forward = projection.forward
    projection.forward = lambda x: 2 * forward(x)


def _train_a_norm(model):
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)


def _other_norm(model):
    layer = model.model.layers[1]
    layer.input_layernorm = nn.RMSNorm(36)
    layer.input_layernorm.requires_grad_(False)


def _wide_norm(model):
    model.model.layers[1].input_layernorm.double()


def _attention_dropout(model):
    model.model.layers[1].self_attn.attention_dropout = 0.3
    model.model.layers[1].self_attn.training = True


@pytest.mark.parametrize("change", [_hook, _pre_hook, _own_forward, _train_a_norm, _other_norm, _attention_dropout])
def test_one_layer_with_something_of_its_own_takes_the_general_path(counted, change):
    model = _adapted()
    change(model)
    _check(model, counted, lean_layers=2)


@pytest.mark.parametrize("saved", [["input_layernorm"], ["q_norm"], ["v_proj"], ["mlp"]], ids=str)
def test_saved_modules_inside_take_the_general_path(counted, saved):
    model = _adapted("qwen3", target_modules=["q_proj", "k_proj"], modules_to_save=saved)
    _check(model, counted, lean_layers=0)


def test_a_hook_on_all_modules(counted):
    model, seen = _adapted(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        _run(model)
    finally:
        handle.remove()
    assert not counted and model.model.layers[0].mlp.gate_proj in seen


def test_without_gradients_and_with_a_cache_the_layer_is_its_own(counted):
    model = _adapted()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    cached = model(input_ids=ids[:, :5], use_cache=True)
    last = model(input_ids=ids[:, 5:], past_key_values=cached.past_key_values).logits
    assert not counted
    torch.testing.assert_close(last[:, 0], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 10)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@each_family
def test_hidden_states_and_attentions_are_what_they_were(family, implementation):
    model, twin = _adapted(family), _adapted(family)
    plain(twin)
    ids = torch.arange(3, 12)[None]
    wanted = dict(output_hidden_states=True, output_attentions=implementation == "eager", use_cache=False)
    outs = []
    for m in (model, twin):
        m.set_attn_implementation(implementation)
        outs.append(m(input_ids=ids, **wanted))
    for kind in ["hidden_states", "attentions"][: 1 + wanted["output_attentions"]]:
        mine, theirs = outs[0][kind], outs[1][kind]
        assert len(mine) == len(theirs) == len(model.model.layers) + (kind == "hidden_states")
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        grads = [torch.autograd.grad(o[kind][-1].square().sum(), [p for p in m.parameters() if p.requires_grad],
                                     allow_unused=True, retain_graph=True)
                 for o, m in zip(outs, (model, twin), strict=True)]  # fmt: skip
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@each_family
def test_padding_on_the_left_and_both_attentions(counted, family, implementation):
    model = _adapted(family)
    model.set_attn_implementation(implementation)

    def forward(model):
        ids = torch.arange(3, 21).view(2, 9)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        labels = ids.masked_fill(mask == 0, -100)
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)

    _check(model, counted, forward)


def test_attention_of_the_users_own(counted, monkeypatch):
    """Set on transformers' table and no further; it is told all that the layer's own forward tells it."""
    told, model = [], _adapted()

    def mine(module, query, key, value, mask, **kwargs):
        told.append(sorted(kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "mine", mine)
    model.config._attn_implementation = "mine"
    _check(model, counted, _padded)
    assert len(told) == 6 and told[:3] == told[3:] and "position_ids" in told[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_transformers(counted, reentrant):
    model = _adapted(lora_dropout=0.4)
    model.train()
    once = _run(model)
    how = {"use_reentrant": reentrant} | ({} if reentrant else {"context_fn": checkpoint_context})
    model.activation_checkpointing_enable(how)
    model.enable_input_require_grads()
    counted.clear()
    again = _run(model)
    assert len(counted) == (3 if reentrant else 6)  # a reentrant one runs first without gradients
    _assert_same(again, once)


def test_autocast_takes_the_general_path(counted):
    model = _adapted()

    def forward(model):
        with torch.autocast("cpu", torch.bfloat16):
            return _padded(model)

    _check(model, counted, forward, lean_layers=0)


def test_restoring_gives_the_classes_back():
    model = _base("llama")
    before = [type(m) for m in model.modules()]
    inject(model, deltaw.LoraConfig(**LORA))
    inject(model, deltaw.LoraConfig(**LORA), "second")
    assert all(isinstance(layer, LeanLayer) for layer in model.model.layers)
    restore(model, "second")
    assert all(isinstance(layer, LeanLayer) for layer in model.model.layers)
    restore(model)
    assert [type(m) for m in model.modules()] == before
    model = deltaw.get_peft_model(model, deltaw.LoraConfig(**LORA)).unload()
    assert [type(m) for m in model.modules()] == before
    model = deltaw.get_peft_model(model, deltaw.LoraConfig(**LORA)).merge_and_unload()
    assert [type(m) for m in model.modules()] == before


@each_family
def test_names_are_those_of_the_family(family):
    model, base = _adapted(family), _base(family)
    layer, own = model.model.layers[0], base.model.layers[0]
    assert type(layer).__name__ == type(own).__name__ and isinstance(layer, type(own))
    assert lean(model) is None and type(layer).__mro__.count(LeanLayer) == 1


def test_copies_and_pickles(counted, tmp_path):
    model = _adapted(use_dora=True)
    expected = _run(model)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for twin in copies:
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        counted.clear()
        _assert_same(_run(twin), expected, 0)
        assert len(counted) == 3
        plain(twin)
        assert not any(isinstance(m, LeanLayer) for m in twin.modules())
    assert all(isinstance(m, LeanLayer) for m in model.model.layers)


def test_the_lean_classes_are_found_by_name_and_no_others():
    assert decoder.LlamaDecoderLayer is type(_adapted().model.layers[0])
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchDecoderLayer'"):
        _ = decoder.NoSuchDecoderLayer


def test_saving(tmp_path):
    model = deltaw.get_peft_model(_base("llama"), deltaw.LoraConfig(**LORA))
    _run(model.get_base_model())
    model.save_pretrained(tmp_path / "adapter")
    again = deltaw.PeftModel.from_pretrained(_base("llama"), tmp_path / "adapter")
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(base(input_ids=ids).logits, _base("llama")(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gemma2", "gemma3", "opt", "qwen3_moe"])
def test_other_families_stay_as_they_are(tiny, architecture):
    model = tiny(architecture)
    lean(model)
    assert not any(isinstance(m, LeanLayer) for m in model.modules())


def test_merged_adapters(counted):
    model = deltaw.get_peft_model(_base("llama"), deltaw.LoraConfig(**LORA))
    ids = torch.arange(3, 12)[None]
    apart = model(input_ids=ids).logits
    model.merge_adapter()
    counted.clear()
    merged = model(input_ids=ids, use_cache=False).logits
    assert counted
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
