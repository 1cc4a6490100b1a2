"""Which modules a config means, and with which rank and scaling: the same as real PEFT on the same model."""

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

import deltaw
from deltaw.nn.inject import inject
from deltaw.nn.walk import adapted_layers, head_name, linear_names, logical_modules
from deltaw.targets import choose, compact

NAMES = {
    "llama": dict(q="q_proj", v="v_proj", mlp="mlp.up_proj", layers="layers", embedding="embed_tokens"),
    "qwen2": dict(q="q_proj", v="v_proj", mlp="mlp.up_proj", layers="layers", embedding="embed_tokens"),
    "gpt2": dict(q="c_attn", v="attn.c_proj", mlp="mlp.c_fc", layers="h", embedding="wte"),
}
CONFIGS = {
    "default": lambda n: {},
    "suffixes": lambda n: dict(target_modules=[n["q"], n["mlp"]]),
    "whole name": lambda n: dict(target_modules=[n["whole"], n["v"]]),
    "expression": lambda n: dict(target_modules=rf".*\.1\..*({n['q']}|{n['mlp'].split('.')[1]})"),
    "all-linear": lambda n: dict(target_modules="all-linear"),
    "All-Linear": lambda n: dict(target_modules="All-Linear"),
    "head too": lambda n: dict(target_modules=["lm_head", n["q"]]),
    "embedding": lambda n: dict(target_modules=[n["embedding"], n["v"]]),
    "one layer": lambda n: dict(target_modules=[n["q"]], layers_to_transform=1),
    "layers": lambda n: dict(target_modules=[n["q"]], layers_to_transform=[0], layers_pattern=n["layers"]),
    "layers by expression": lambda n: dict(
        target_modules=[n["q"]], layers_to_transform=[0], layers_pattern=[n["layers"] + "+"]
    ),
    "exclude": lambda n: dict(target_modules="all-linear", exclude_modules=[n["q"], n["mlp"]]),
    "exclude expression": lambda n: dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "exclude what is saved": lambda n: dict(target_modules="all-linear", modules_to_save=[n["v"].split(".")[-1]]),
    "rank pattern": lambda n: dict(target_modules="all-linear", rank_pattern={n["q"]: 3, rf".*\.1\.{n['mlp']}": 5}),
    "alpha pattern": lambda n: dict(
        target_modules="all-linear", rank_pattern={n["q"]: 3}, alpha_pattern={n["q"]: 7, n["mlp"]: 0.5}
    ),
    "rslora pattern": lambda n: dict(
        target_modules=[n["q"], n["v"]], use_rslora=True, rank_pattern={f"^{n['whole']}": 5}
    ),
}


def _ours(model, **config):
    inject(model, deltaw.LoraConfig(**config))
    return {n: (layer.adapter("default").rank, layer.adapter("default").scaling) for n, layer in adapted_layers(model)}


def _theirs(model, **config):
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).base_model.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()}


def _names(architecture):
    whole = {"gpt2": "transformer.h.0.attn.c_attn"}.get(architecture, "model.layers.0.self_attn.q_proj")
    return NAMES[architecture] | {"whole": whole}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("name", CONFIGS)
def test_modules_ranks_and_scalings_are_pefts(tiny, architecture, name):
    config = dict(r=4, lora_alpha=6) | CONFIGS[name](_names(architecture))
    ours = _ours(tiny(architecture), **config)
    assert ours == _theirs(tiny(architecture), **config)
    assert ours


def test_none_means_pefts_default_for_the_architecture(tiny, architecture):
    leaves = {name.rpartition(".")[2] for name in _ours(tiny(architecture))}
    assert leaves == {*TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[architecture]}


@pytest.mark.parametrize(
    ("strategy", "llama", "gpt2"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"attn.c_attn", "attn.c_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
        ("qv", {"q_proj", "v_proj"}, {"attn.c_attn"}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_strategies_are_saved_as_lists_that_peft_reads_the_same(tiny, tmp_path, strategy, llama, gpt2):
    for architecture, wanted in (("llama", llama), ("gpt2", gpt2)):
        model = deltaw.get_peft_model(tiny(architecture), deltaw.LoraConfig(target_modules=strategy))
        chosen = [name for name, _ in adapted_layers(model.get_base_model())]
        assert len(chosen) == 2 * len(wanted)
        assert all(any(name.endswith(f".{w}") for w in wanted) for name in chosen)
        model.save_pretrained(tmp_path / architecture)
        config = peft.LoraConfig.from_pretrained(tmp_path / architecture)
        assert isinstance(config.target_modules, set)
        theirs = peft.get_peft_model(tiny(architecture), config).base_model.model
        assert [n for n, m in theirs.named_modules() if isinstance(m, LoraLayer)] == chosen


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj", "mlp.up_proj"], layers_to_transform=[1]),
        dict(target_modules="all-linear", exclude_modules=["layers.0.mlp.up_proj"]),
        dict(target_modules=r".*\.0\..*_proj"),
    ],
)
def test_what_is_stored_names_the_same_modules_without_filters(tiny, config):
    model = tiny()
    chosen = inject(model, deltaw.LoraConfig(**config))
    names, linear = [name for name, _ in logical_modules(model)], linear_names(model)
    stored = deltaw.LoraConfig(target_modules=compact(chosen, names))
    assert choose(stored, names, linear, head=head_name(model)) == chosen


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(target_modules=["q_prj"]), r"no module is called q_prj; this model has q_proj \(×2\), "),
        (dict(target_modules=["up_proj", "vproj"]), r"no module is called vproj; this model has v_proj"),
        (dict(target_modules=["mlp.q_proj"]), r"no module is called mlp.q_proj; this model has q_proj"),
        (dict(target_modules="q_proj"), r"a regular expression over whole names.*this model has q_proj"),
        (
            dict(target_modules="all-linear", exclude_modules=["dwn_proj"]),
            "dwn_proj; this model has down_proj",
        ),
        (dict(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), "rank_pattern: 'k_proj' matches none"),
        (dict(target_modules=["q_proj"], alpha_pattern={".*[.]9[.].*": 2}), "alpha_pattern: .* matches none"),
        (dict(target_modules=["q_proj"], layers_to_transform=7), "leave none of the 2 modules"),
        (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "leave none of the 2 modules"),
        (dict(target_modules=["mlp"]), r"neither linear nor an embedding: model.layers.0.mlp \(LlamaMLP\)"),
        (dict(target_modules=["q_proj"], modules_to_save=["hed"]), "modules_to_save: no module is called hed"),
        (dict(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]), "adapted or saved for itself"),
        (dict(target_modules=["up_proj"], modules_to_save=["p_proj"]), "up_proj is adapted or saved for itself"),
        (dict(target_modules=["q_proj"], bias="all"), "the model has no such biases"),
    ],
)
def test_what_matches_nothing_is_an_error_that_leaves_the_model_alone(tiny, ids, config, message):
    model = tiny()
    before = [(n, type(m), m.training) for n, m in model.named_modules()]
    with pytest.raises(deltaw.UserError, match=message):
        deltaw.get_peft_model(model, deltaw.LoraConfig(**config))
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_attention_of_torch_itself_is_not_taken_for_a_linear_layer():
    # It reads its projection's weight and never calls it: an adapter there would train nothing.
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8))
    assert linear_names(model) == ["1"]
    with pytest.raises(deltaw.UserError, match="NonDynamicallyQuantizableLinear"):
        inject(model, deltaw.LoraConfig(target_modules=["out_proj"]))


def test_names_given_by_the_thousand_cost_no_time(tiny):
    names = {f"x{i}" for i in range(15_000)}
    config = deltaw.LoraConfig(target_modules=names | {"q_proj"}, exclude_modules=names, modules_to_save=names)
    model = tiny()
    modules = [name for name, _ in logical_modules(model)]
    assert len(choose(config, modules, linear_names(model), head=None, strict=False)) == 2
