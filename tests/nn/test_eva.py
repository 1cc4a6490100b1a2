"""EVA: A's and ranks are PEFT's, step 0 is the base, and the config says what stands in the model."""

import peft
import pytest
import torch
from torch import nn

import deltaw
from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.eva import (
    EvaBatch,
    apply_eva,
    eva_state,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    start_from_data,
)
from deltaw.nn.inject import inject
from deltaw.nn.state import state_of
from deltaw.nn.walk import adapted_layers
from deltaw.settings import EvaConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:lora with eva initialization used with low_cpu"
)


def _data(num=4, rows=3, length=40, seed=0, labels=False):
    """Batches with padding; tokens of very unequal frequency, so that inputs have leading directions."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(num):
        ids = torch.multinomial(0.6 ** torch.arange(30.0), rows * length, replacement=True, generator=g).view(
            rows, length
        )
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        one = {"input_ids": ids, "attention_mask": mask}
        if labels:
            one["labels"] = ids.masked_fill(torch.arange(length) < 8, -100)
        out.append(one)
    return out


def _config(**more):
    eva = more.pop("eva", {})
    return (
        dict(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(**eva))
        | more
    )


def _started(model, data, **more):
    ours = deltaw.get_peft_model(model, LoraConfig(**_config(**more)))
    initialize_lora_eva_weights(ours, data)
    return ours


def _theirs(model, data, **more):
    config = _config(**more)
    config["eva_config"] = peft.EvaConfig(**vars(config["eva_config"]))
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


EXTRA = {
    "plain": {},
    "rho 1": dict(eva=dict(rho=1.0)),
    "whitened": dict(eva=dict(whiten=True)),
    "scaling left": dict(eva=dict(adjust_scaling_factors=False)),
    "all tokens": dict(eva=dict(use_label_mask=False)),
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"up_proj": 5, "c_fc": 5}, alpha_pattern={"q_proj": 11, "c_attn": 11}),
}


@pytest.mark.parametrize("extra", EXTRA)
def test_equals_peft(tiny, ids, architecture, extra):
    more = {key: dict(value) if isinstance(value, dict) else value for key, value in EXTRA[extra].items()}
    if "rank_pattern" in more:  # names must match something here
        more = {
            k: {n: v for n, v in value.items() if (n.startswith("c_")) == (architecture == "gpt2")}
            for k, value in more.items()
        }
    data = _data(labels=True)
    ours, theirs = _started(tiny(architecture), data, **more), _theirs(tiny(architecture), data, **more)
    modules = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    layers = dict(adapted_layers(ours.get_base_model()))
    assert layers.keys() == modules.keys()
    shared = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name, layer in layers.items():
        part, twin = layer.adapter("default"), modules[name]
        a = twin.lora_A["default"].weight
        assert part.lora_A.shape == a.shape, name
        assert part.scaling == pytest.approx(twin.scaling["default"])
        assert not part.lora_B.any()
        assert (torch.cosine_similarity(part.lora_A, a).abs() > 0.98).all()  # both are estimates, of a few batches
        if not (extra == "whitened" and name.endswith(shared)):  # PEFT whitens these once for each
            torch.testing.assert_close(part.lora_A.norm(dim=1), a.norm(dim=1), atol=0, rtol=1e-2)
    mine, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.rank_pattern == other.rank_pattern
    assert mine.alpha_pattern == pytest.approx(other.alpha_pattern)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, tiny(architecture)(input_ids=ids).logits)


def test_a_is_the_principal_components_of_all_inputs(tiny):
    data, model = _data(num=8), tiny()
    ours = _started(model, data, eva=dict(rho=3.0, tau=1.0), r=4)
    inputs = {}
    layer = dict(adapted_layers(model))["model.layers.1.self_attn.q_proj"]
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda m, args: inputs.setdefault(len(inputs), args[0]))
        for one in data:
            ours(**one)
        handle.remove()
    rows = torch.cat([x[one["attention_mask"].bool()] for x, one in zip(inputs.values(), data, strict=True)])
    _, _, exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    got = layer.adapter("default").lora_A
    assert len(got) >= 3 and ((got * exact[: len(got)]).sum(1).abs() > 0.99).all()


def test_the_budget_is_kept_and_ranks_follow_the_variance(tiny):
    ours = _started(tiny(), _data())
    layers = dict(adapted_layers(ours.get_base_model()))
    ranks = {name: layer.adapter("default").rank for name, layer in layers.items()}
    assert sum(ranks.values()) == 3 * 14 and len({*ranks.values()}) > 1 and max(ranks.values()) <= 6
    config = ours.peft_config["default"]
    for name, layer in layers.items():
        part = layer.adapter("default")
        assert (config.rank_of(name), config.scaling_of(name)) == (part.rank, part.scaling) == (part.rank, 2.0)


def test_a_layer_of_rank_0_loses_its_adapter_and_can_be_saved(tiny, tmp_path, ids):
    model = tiny()
    ours = deltaw.get_peft_model(model, LoraConfig(**_config()))
    state = get_eva_state_dict(ours, _data())
    gone = "model.layers.0.mlp.down_proj"
    state[gone] = state[gone][:0]
    initialize_lora_eva_weights(ours, eva_state_dict={f"base_model.model.{k}": v for k, v in state.items()})
    assert type(model.get_submodule(gone)) is nn.Linear
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.adapter("default").lora_B.normal_()
    ours.save_pretrained(tmp_path)
    for library in (deltaw, peft):
        again = library.PeftModel.from_pretrained(tiny(), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_other_adapters_and_switches_stay(tiny, ids):
    model = tiny()
    inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "other")
    model.train()
    with torch.no_grad():
        before = model(ids).logits
    inject(model, LoraConfig(**_config(use_dora=True)), "eva")
    norms = {n: layer.adapter("eva").lora_magnitude_vector.clone() for n, layer in adapted_layers(model)}
    deltaw.nn.inject.activate(model, ["other"])
    initialize_lora_eva_weights(model, _data(), adapter_name="eva")
    assert state_of(model).active.names == ("other",) and all(m.training for m in model.modules())
    for name, layer in adapted_layers(model):
        part = layer.adapter("eva")
        assert torch.equal(part.lora_magnitude_vector, norms[name])
        assert not any(p.requires_grad for p in part.parameters()) and layer.adapter("other").lora_A.requires_grad
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_embeddings_keep_their_start_and_their_rank(tiny):
    config = _config(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 5})
    ours = _started(tiny(), _data(), **config)
    config = ours.peft_config["default"]
    layers = dict(adapted_layers(ours.get_base_model()))
    assert layers["model.embed_tokens"].adapter("default").rank == config.rank_of("model.embed_tokens") == 5
    assert {"embed_tokens", "q_proj"} == {name.split(".")[-1] for name in config.target_modules}


def test_a_seed_of_one_s_own_is_left_alone(tiny):
    first = _started(tiny(), _data())
    torch.manual_seed(11)
    drawn = torch.rand(3)
    model = deltaw.get_peft_model(tiny(), LoraConfig(**_config()))
    torch.manual_seed(11)
    initialize_lora_eva_weights(model, _data())
    assert torch.equal(torch.rand(3), drawn)
    for (_, one), (_, other) in zip(
        adapted_layers(first.get_base_model()), adapted_layers(model.get_base_model()), strict=True
    ):
        assert torch.equal(one.adapter("default").lora_A, other.adapter("default").lora_A)


def test_only_tokens_that_count_are_looked_at(tiny):
    data = _data(labels=True)
    other = [{**one, "input_ids": one["input_ids"].clone()} for one in data]
    for one in other:  # what comes last is seen by no other token
        one["labels"][:, -5:] = -100
        one["input_ids"][:, -5:] = 3
    for one, twin in zip(data, other, strict=True):
        one["labels"] = twin["labels"]
    states = [get_eva_state_dict(deltaw.get_peft_model(tiny(), LoraConfig(**_config())), d) for d in (data, other)]
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())


def test_memory_is_bounded_and_tokens_may_come_one_by_one(tiny):
    model = tiny()
    inject(model, LoraConfig(**_config()))
    ids = _data(num=1, rows=1, length=120)[0]["input_ids"]

    def run(ids):
        return EvaBatch(lambda: model(ids))

    whole, single = [run(ids)], [run(ids[:, :1]) for _ in range(1)] + [run(ids[:, :n]) for n in (2, 3, 60, 120)]
    for batches in (whole, single):
        with torch.no_grad():
            layers = dict(adapted_layers(model))
            state = eva_state(layers, state_of(model).configs["default"], batches)
        assert sum(map(len, state.values())) == 3 * 14


def test_batches_of_one_s_own(tiny):
    model = tiny()
    inject(model, LoraConfig(**_config()))
    counts = torch.arange(120) % 2 == 0
    batches = [EvaBatch(lambda one=one: model(one["input_ids"]), counts) for one in _data()]
    start_from_data(model, batches)
    assert sum(layer.adapter("default").rank for _, layer in adapted_layers(model)) == 3 * 14


@pytest.mark.parametrize(
    "case", ["no data", "iterator", "no tokens", "rank", "start", "name", "nan", "trained", "unreached"]
)
def test_mistakes(tiny, case):
    model = tiny()
    config = {"rank": dict(r=33), "start": dict(init_lora_weights=True, eva_config=None)}.get(case, {})
    ours = deltaw.get_peft_model(model, LoraConfig(**_config(**config)))
    before = {n: p.clone() for n, p in ours.named_parameters()}
    data, name, forward = _data(), "default", None
    if case == "no data":
        data = []
    if case == "iterator":
        data = iter(data)
    if case == "no tokens":
        data = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    if case == "name":
        name = "nobody"
    if case == "nan":
        model.get_input_embeddings().weight.data[3] = float("nan")
        before = {n: p.clone() for n, p in ours.named_parameters()}
    if case == "trained":
        next(layer for _, layer in adapted_layers(model)).adapter("default").lora_B.data[0, 0] = 1
        before = {n: p.clone() for n, p in ours.named_parameters()}
    if case == "unreached":
        forward = lambda model, inputs: model.model.embed_tokens(inputs["input_ids"])  # noqa: E731
    expected = {
        "no data": "at least one batch",
        "iterator": "list or a DataLoader",
        "no tokens": "6 components of what model.layers.0.self_attn.q_proj gets, and the data give it 4 tokens",
        "rank": "32 inputs and no rank 33",
        "start": "init_lora_weights=True, expected 'eva'",
        "name": "no adapter 'nobody'",
        "nan": "infinities or nans among the rows of what model.layers.0",
        "trained": "trained already",
        "unreached": "doesn't reach model.layers.0",
    }[case]
    with pytest.raises(UserError, match=expected):
        initialize_lora_eva_weights(ours, data, forward_fn=forward, adapter_name=name)
    after = dict(ours.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].nan_to_num(), p.nan_to_num()) for n, p in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert state_of(model).active.names == ("default",)


def test_states_that_do_not_fit(tiny):
    ours = deltaw.get_peft_model(tiny(), LoraConfig(**_config()))
    model = ours.get_base_model()
    state = get_eva_state_dict(ours, _data())
    name = "model.layers.0.self_attn.q_proj"
    for wrong, message in (
        ({n: a for n, a in state.items() if n != name}, f"{name} is in only one of them"),
        (state | {name: torch.zeros(3, 31)}, "expected \\[rank, 32\\]"),
        ({n: a[:0] for n, a in state.items()}, "no layer a rank"),
    ):
        with pytest.raises(UserError, match=message):
            apply_eva(model, wrong)
    with pytest.raises(UserError, match="needs data"):
        initialize_lora_eva_weights(ours)
