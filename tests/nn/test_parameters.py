"""LoRA on bare parameters, fused experts above all: what PEFT computes, what its files say, and the fast way's twin."""

import dataclasses

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen3MoeConfig,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import deltaw
from deltaw.adapters.merge import merge, merge_and_unload, unmerge
from deltaw.adapters.peft_format import adapter_tensors, load_adapter, read_adapter, save_adapter
from deltaw.errors import UserError
from deltaw.nn import parameters as parameters_module
from deltaw.nn.batch import BASE, Batch, batch, checkpoint_context
from deltaw.nn.inject import activate, inject, restore
from deltaw.nn.lowrank import Active
from deltaw.nn.parameters import AdaptedParameters, parameter_targets
from deltaw.nn.state import state_of

# PEFT looks for the patterns' keys among modules only, and warns of those that it then applies to parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TOP = dict(num_experts_per_tok=2, initializer_range=0.1)
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **TOP, head_dim=8, moe_intermediate_size=24, num_experts=5),
    "mixtral": lambda: MixtralConfig(**SIZES, **TOP, intermediate_size=24, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **TOP, head_dim=8, intermediate_size=24, num_local_experts=4),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "both": dict(r=4, lora_alpha=6, target_modules=[], target_parameters=EXPERTS),
    "both, none named": dict(r=4, target_parameters=EXPERTS),
    "one of two, and layers": dict(r=4, target_modules=["q_proj"], target_parameters=EXPERTS[1:]),
    "patterns": dict(
        target_modules=["v_proj"],
        target_parameters=EXPERTS,
        rank_pattern={"experts.gate_up_proj": 3, r".*\.1\..*down_proj": 2},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
    ),
    "one layer's, by whole name": dict(target_modules=[], target_parameters=["model.layers.1.mlp.experts.down_proj"]),
}
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def base():
    """``base("mixtral")``: a small random model with experts, biases away from zero."""

    def make(family="qwen3_moe", dtype=torch.float32):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.1)
        return model

    return make


def _stir(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.2)
    return model


def _inject(model, name="default", seed=5, **config):
    inject(model, deltaw.LoraConfig(**dict(r=4, target_modules=[], target_parameters=EXPERTS) | config), name)
    return _stir(model, seed)


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def _experts(model, layer=0):
    return model.model.layers[layer].mlp.experts


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_peft_s(base, family, case, ids):
    config = CASES[case]
    if family == "mixtral" and "target_modules" not in config:
        config = config | dict(target_modules=[])  # PEFT has a usual choice of modules for this family, and takes it
    ours = _stir(deltaw.get_peft_model(base(family), deltaw.LoraConfig(**config)))
    theirs = peft.get_peft_model(base(family), peft.LoraConfig(**config))
    mine = adapter_tensors(ours.get_base_model())
    loaded = peft.set_peft_model_state_dict(theirs, mine)
    assert not loaded.unexpected_keys
    logits = []
    for model in (ours, theirs):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        logits.append(out.logits)
    torch.testing.assert_close(*logits, **CLOSE)
    own = {tensor.data_ptr(): tensor for tensor in ours.parameters()}
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == mine.keys()
    for key, tensor in mine.items():
        grad = own[tensor.data_ptr()].grad
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, grads[key], **CLOSE, msg=key)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(base, family, case, ids, tmp_path):
    ours = _stir(deltaw.get_peft_model(base(family), deltaw.LoraConfig(**CASES[case])))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours")
    torch.testing.assert_close(_logits(theirs, ids), _logits(ours, ids), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = deltaw.PeftModel.from_pretrained(base(family), tmp_path / "theirs")
    mine, back = adapter_tensors(ours.get_base_model()), adapter_tensors(again.get_base_model())
    assert mine.keys() == back.keys() and all(torch.equal(mine[key], back[key]) for key in mine)
    torch.testing.assert_close(_logits(again, ids), _logits(ours, ids), **CLOSE)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_what_peft_makes_of_all_linear(base, family, ids, tmp_path):
    """PEFT takes it for the experts and the router too, and writes down their parameters, ranks and alphas."""
    theirs = _stir(peft.get_peft_model(base(family), peft.LoraConfig(r=4, target_modules="all-linear")))
    theirs.save_pretrained(tmp_path)
    ours = deltaw.PeftModel.from_pretrained(base(family), tmp_path)
    assert set(ours.peft_config["default"].target_parameters) == {"gate_up_proj", "down_proj", "gate.weight"}
    torch.testing.assert_close(_logits(ours, ids), _logits(theirs, ids), **CLOSE)


def test_three_parameters_of_one_module_biases_among_them(base, ids, tmp_path):
    config = dict(r=2, target_modules=[], target_parameters=["gate_up_proj", "gate_up_proj_bias", "down_proj"])
    ours = _stir(deltaw.get_peft_model(base("gpt_oss"), deltaw.LoraConfig(**config)))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("gpt_oss"), tmp_path)
    torch.testing.assert_close(_logits(ours, ids), _logits(theirs, ids), **CLOSE)
    ends = {key.split("experts")[-1] for key in adapter_tensors(ours.get_base_model())}
    assert ends == {f"{'.base_layer' * n}.lora_{part}.weight" for n in range(3) for part in "AB"}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts(base, ids, init):
    torch.manual_seed(0)
    model = base()
    before = _logits(model, ids)
    inject(model, deltaw.LoraConfig(r=4, target_parameters=EXPERTS, init_lora_weights=init))
    factors = dict(_experts(model).factors("default"))["gate_up_proj"]
    assert factors.lora_A.shape == (5 * 4, 32) and factors.lora_B.shape == (48, 4 * 5)
    deviation = 1 / 4 if init == "gaussian" else 1 / (3 * 32) ** 0.5
    assert factors.lora_A.std().item() == pytest.approx(deviation, rel=0.1)
    if init is False:
        assert factors.lora_B.std().item() == pytest.approx(1 / (3 * 20) ** 0.5, rel=0.1)
    else:
        assert not factors.lora_B.any()
        torch.testing.assert_close(_logits(model, ids), before, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_way_of_experts_equals_the_plain_one(base, family, ids, implementation, monkeypatch):
    results = []
    for can_route in (True, False):
        if not can_route:
            monkeypatch.setattr(parameters_module, "can_route", lambda *_: False)
        model = _inject(base(family))
        model.set_experts_implementation(implementation)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([_logits(model, ids), *(p.grad for p in model.parameters() if p.requires_grad)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, **CLOSE)


def test_experts_without_a_gate(monkeypatch):
    sizes = dict(n_routed_experts=4, hidden_size=6, moe_intermediate_size=5, moe_latent_size=None)
    experts = NemotronHExperts(NemotronHConfig(**sizes, mlp_hidden_act="relu2"))
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    layer = AdaptedParameters(experts, "experts", Active(("a",)))
    names = ["up_proj", "down_proj"]
    config = deltaw.LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
    layer.adapters["a"] = layer.fresh_adapter(names, config)
    x, chosen, weight = torch.randn(7, 6), torch.rand(7, 4).topk(2).indices, torch.rand(7, 2)
    fast = layer(x, chosen, weight)
    monkeypatch.setattr(parameters_module, "can_route", lambda *_: False)
    torch.testing.assert_close(fast, layer(x, chosen, weight), **CLOSE)
    assert not torch.allclose(fast, experts(x, chosen, weight), atol=0.1)


def test_no_gradient_of_the_base_and_no_change_to_it(base, family, ids):
    model = base(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = list(model.parameters())
    _inject(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    restore(model)
    assert not any(isinstance(module, AdaptedParameters) for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_switching_off_and_several_at_once(base, family, ids):
    model = base(family)
    plain = _logits(model, ids)
    _inject(model, "a")
    _inject(model, "b", seed=6, r=2, target_parameters=EXPERTS[:1])
    experts = _experts(model)
    activate(model, ["a", "b"])
    both = _logits(model, ids)
    weight = experts.base_layer.gate_up_proj
    deltas = [dict(experts.factors(name))["gate_up_proj"].delta() for name in ("a", "b")]
    torch.testing.assert_close(experts.gate_up_proj, weight + deltas[0] + deltas[1])
    assert experts.num_experts == weight.shape[0]
    activate(model, [])
    assert torch.equal(_logits(model, ids), plain) and experts.gate_up_proj is weight
    activate(model, ["a"])
    assert not torch.equal(_logits(model, ids), both)
    assert all(p.requires_grad for p in experts.adapters["a"].parameters())
    assert not any(p.requires_grad for p in experts.adapters["b"].parameters())


def test_a_mixed_batch_gives_each_row_its_own(base, family):
    ids = torch.randint(97, (5, 7), generator=torch.Generator().manual_seed(2))
    model = _inject(_inject(base(family), "a"), "b", seed=6, r=2, target_parameters=EXPERTS[:1])
    alone = {}
    for name in ("a", "b", BASE):
        activate(model, [] if name == BASE else [name])
        alone[name] = _logits(model, ids)
    names = ("b", BASE, "a", "b", "a")
    with batch(Batch(adapters=names)):
        mixed = _logits(model, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


def test_a_mixed_batch_is_refused_where_all_rows_share_a_weight(base, ids):
    model = _inject(base(), "a", target_parameters=["self_attn.q_proj.weight"])
    _inject(model, "b", target_parameters=["self_attn.q_proj.weight"])
    inject(model, deltaw.LoraConfig(target_modules=["v_proj"]), "c")
    for names in (("a", "b"), ("a", BASE)):
        with batch(Batch(adapters=names)), pytest.raises(UserError, match="give all rows one adapter"):
            _logits(model, ids)
    activate(model, ["a"])
    alone = _logits(model, ids)
    activate(model, [])
    with batch(Batch(adapters=("a", "a"))):
        torch.testing.assert_close(_logits(model, ids), alone, **CLOSE)
    with batch(Batch(adapters=("c", BASE))):
        _logits(model, ids)


def test_any_linear_layer_s_weight_is_lora(base, ids):
    ours = deltaw.get_peft_model(base(), deltaw.LoraConfig(r=4, target_modules=["q_proj"]))
    bare = deltaw.get_peft_model(base(), deltaw.LoraConfig(r=4, target_parameters=["q_proj.weight"]))
    _stir(ours), _stir(bare)
    torch.testing.assert_close(_logits(bare, ids), _logits(ours, ids), **CLOSE)
    mine, theirs = (adapter_tensors(model.get_base_model()) for model in (ours, bare))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_merging(base, family, ids):
    model = base(family)
    plain = _logits(model, ids)
    _inject(model, target_modules=["q_proj"])
    adapted = _logits(model, ids)
    experts = _experts(model).base_layer
    merge(model, safe=True)
    torch.testing.assert_close(_logits(model, ids), adapted, **CLOSE)
    unmerge(model)
    assert _experts(model).base_layer is experts and torch.equal(_logits(model, ids), adapted)
    activate(model, [])
    assert torch.equal(_logits(model, ids), plain)
    unloaded = merge_and_unload(model, ["default"])
    assert type(_experts(unloaded)) is type(experts)
    torch.testing.assert_close(_logits(unloaded, ids), adapted, **CLOSE)


def test_gradient_checkpointing(base, ids):
    ids, grads = ids.repeat(1, 2), []
    for is_on in (False, True):
        model = _inject(_inject(base(), "a"), "b", seed=6).train()
        for parameter in model.parameters():
            parameter.grad = None
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
        with batch(Batch(adapters=("a", "b"))):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, computed_again in zip(*grads, strict=True):
        torch.testing.assert_close(kept, computed_again)


def test_bfloat16(base, family, ids):
    model = _inject(base(family, torch.bfloat16))
    factors = dict(_experts(model).factors("default"))["down_proj"]
    assert factors.lora_A.dtype == torch.float32
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and factors.lora_B.grad.dtype == torch.float32
    dtype = _experts(model).merged_layer(_experts(model).base_layer, ["default"]).down_proj.dtype
    assert dtype == torch.bfloat16


class _Odd(nn.Module):
    """A module with parameters of all kinds."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.randn(4))
        self.two = nn.Parameter(torch.randn(3, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) @ self.two.T


def test_the_plain_way_is_for_any_module():
    odd = _Odd()
    layer = AdaptedParameters(odd, "odd", Active(("a",)))
    config = deltaw.LoraConfig(r=2, lora_alpha=2, target_parameters=["two"], init_lora_weights=False)
    layer.adapters["a"] = layer.fresh_adapter(["two"], config)
    x, (_, factors) = torch.randn(5, 4), next(layer.factors("a"))
    expected = odd.inner(x) @ (odd.two + factors.lora_B @ factors.lora_A).T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x=x), expected)


MISTAKES = {
    "no such parameter": (dict(target_parameters=["experts.gate_up"]), r"called 'experts.gate_up'.*experts.gate_up_pr"),
    "a vector": (dict(target_parameters=["norm.weight"]), r"model.norm.weight is torch.float32 with shape \(32,\)"),
    "dropout": (dict(lora_dropout=0.1), "lora_dropout=0.1 does not go with target_parameters"),
    "DoRA": (dict(use_dora=True), "use_dora does not go with target_parameters"),
    "a start of weights": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' does not go with"),
    "adapted too": (
        dict(target_parameters=["q_proj.weight"], target_modules=["q_proj"]),
        "q_proj is adapted or saved in another way already",
    ),
    "inside one that is saved": (dict(modules_to_save=["mlp"]), "experts is adapted or saved in another way already"),
    "a pattern for nothing": (dict(rank_pattern={"gate_up": 2}), "rank_pattern: 'gate_up' matches none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_the_model_alone(base, case):
    config, message = MISTAKES[case]
    model = base()
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        inject(model, deltaw.LoraConfig(**dict(target_modules=["v_proj"], target_parameters=EXPERTS) | config))
    assert dict(model.named_modules()) == modules and all(p.requires_grad for p in model.parameters())


def test_layers_that_are_stored_the_other_way_round(tiny):
    config = deltaw.LoraConfig(target_modules=["c_attn"], target_parameters=["wte.weight"])
    with pytest.raises(UserError, match=r"does not go with transformer\.h\.0\.attn\.c_attn"):
        inject(tiny("gpt2"), config)
    inject(tiny("gpt2"), deltaw.LoraConfig(target_parameters=["wte.weight", "c_attn.weight"]))


def test_parameters_of_the_model_itself():
    config = deltaw.LoraConfig(target_parameters=["two"])
    with pytest.raises(UserError, match=r"two is of the model itself"):
        parameter_targets(config, {"": _Odd()})


def test_experts_can_not_be_saved_as_well(base):
    model = _inject(base(), "a")
    with pytest.raises(UserError, match="modules_to_save"):
        inject(model, deltaw.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), "b")
    assert list(state_of(model).configs) == ["a"]


def test_files_that_do_not_fit(base, tmp_path):
    save_adapter(_inject(base()), tmp_path)
    stored = read_adapter(tmp_path)
    inner = "model.layers.0.mlp.experts.base_layer"
    for parts, message in (
        ({}, "layers.0.mlp.experts.gate_up_proj.lora_A missing"),
        (stored.factors[inner] | dict(lora_B=torch.zeros(48, 16)), r"gate_up_proj.lora_B is \(48, 16\)"),
        (stored.factors[inner] | dict(lora_magnitude_vector=torch.zeros(48)), "lora_magnitude_vector not expected"),
    ):
        damaged = dataclasses.replace(stored, factors=stored.factors | {inner: parts})
        with pytest.raises(UserError, match=message):
            load_adapter(base(), damaged)
    config = dataclasses.replace(stored.config, target_parameters=EXPERTS[1:])
    with pytest.raises(UserError, match=r"experts\.base_layer: the model has no such module"):
        load_adapter(base(), dataclasses.replace(stored, config=config))
