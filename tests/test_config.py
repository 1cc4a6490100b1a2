"""``LoraConfig`` beside PEFT's own, field by field; hostile files are refused, quickly, by ``UserError`` alone."""

import dataclasses
import json
import time
from contextlib import nullcontext, suppress

import peft
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import deltaw
from deltaw.config import CONFIG_NAME, config_from_dict, read_config
from deltaw.errors import UserError
from deltaw.hub import resolve_file

THEIRS = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}

HONOURED = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x"},
    "peft_version": "0.20.0",
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "inference_mode": True,
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_dora": True,
    "trainable_token_indices": [1],
    "target_parameters": ["experts.gate_up_proj"],
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 2},
    "eva_config": dataclasses.asdict(peft.EvaConfig(rho=1.5)),
}
REFUSED = {
    "peft_type": "IA3",
    "megatron_config": {"a": 1},
    "megatron_core": "megatron.other",
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 32,
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 4]],
    "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "lora_bias": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True,
}


def _their_default(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_every_field_of_peft_is_here_and_in_this_test():
    assert {f.name for f in dataclasses.fields(deltaw.LoraConfig)} == set(THEIRS) == {*HONOURED, *REFUSED}
    assert not {*HONOURED} & {*REFUSED}


@pytest.mark.parametrize("name", [name for name in THEIRS if name not in ("peft_type", "runtime_config")])
def test_defaults_are_pefts(name):
    assert getattr(deltaw.LoraConfig(), name) == _their_default(THEIRS[name])


def test_the_two_defaults_that_differ_mean_the_same():
    assert deltaw.LoraConfig().peft_type == peft.LoraConfig().peft_type == "LORA"  # PEFT sets it afterwards
    assert deltaw.LoraConfig().runtime_config is None
    deltaw.LoraConfig(runtime_config=peft.LoraRuntimeConfig())


@pytest.mark.parametrize("name", HONOURED)
def test_a_field_that_is_honoured_is_taken_and_written(name):
    extra = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    config = deltaw.LoraConfig(**{name: HONOURED[name]} | extra)
    assert json.loads(config.to_json())[name] == HONOURED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_done_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        deltaw.LoraConfig(**{name: REFUSED[name]})


@pytest.mark.parametrize("init", ["corda", "mica", "lora_ga"])
def test_starts_that_are_not_done_are_refused_by_name(init):
    with pytest.raises(UserError, match=f"{init}.*use True, False or gaussian"):
        deltaw.LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "pissa_niter_4", "olora", "eva", "loftq", "orthogonal"])
def test_starts_are_taken_in_any_case_of_letters(init):
    assert deltaw.LoraConfig(init_lora_weights=init).init_lora_weights == init.lower()


@pytest.mark.parametrize(
    "init", ["pissa_niter_", "pissa_niter_0", "pissa_niter_100", "pissa_niter_x", "kaiming", 1, None]
)
def test_what_is_no_start_is_refused(init):
    with pytest.raises(UserError, match="init_lora_weights"):
        deltaw.LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    "given",
    [
        {"loftq_config": {"loftq_bits": 3}},
        {"loftq_config": {"loftq_iter": 0}},
        {"loftq_config": {"bits": 4}},
        {"loftq_config": 4},
        {"eva_config": {"rho": 0.5}},
        {"eva_config": {"tau": float("nan")}},
        {"eva_config": {"whiten": "yes"}},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 1]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"embed_tokens": "1"}},
        {"target_parameters": "experts"},
    ],
)
def test_settings_of_the_newer_fields_are_checked(given):
    with pytest.raises(UserError, match="(?i)" + next(iter(given)).partition("_config")[0]) as error:
        deltaw.LoraConfig(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*HONOURED, None])
def test_json_goes_to_peft_and_back(name, tmp_path):
    given = {} if name is None else {name: HONOURED[name]}
    given |= {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    if name == "loftq_config":
        pytest.importorskip("scipy", reason="PEFT takes no LoftQ config without scipy")
    if name in ("loftq_config", "eva_config"):
        given |= {"init_lora_weights": name.removesuffix("_config")}
    ours = deltaw.LoraConfig(**given)
    ours.save_pretrained(tmp_path)
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    for field in set(THEIRS) - {"runtime_config", "peft_version"}:
        mine, their = ours.to_dict()[field], getattr(theirs, field)
        their = dataclasses.asdict(their) if dataclasses.is_dataclass(their) else their
        assert mine == their or set(mine) == set(their), field
    theirs.save_pretrained(tmp_path)
    back = deltaw.PeftConfig.from_pretrained(tmp_path)
    assert back == dataclasses.replace(ours, peft_version=theirs.peft_version)


def test_pefts_enums_are_taken():
    config = deltaw.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, peft_type=peft.PeftType.LORA)
    assert json.loads(config.to_json())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"r": 10**9}, r"r=1000000000\): expected a whole number from 1 to 65,536"),
        ({"r": -1}, "r=-1"),
        ({"r": 0}, "r=0"),
        ({"r": "8"}, "r='8'"),
        ({"r": True}, "r=True"),
        ({"r": 8.0}, "r=8.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.*…"),
        ({"lora_dropout": 1}, "lora_dropout=1"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "is not a regular expression"),
        ({"rank_pattern": {"a" * 20_000 + "+": 2}}, "a pattern of 20,001 characters"),
        ({"target_modules": "(a" * 20_000}, "a pattern of 40,000 characters"),
        ({"target_modules": [f"x{i}" for i in range(60_000)]}, "60,000 names and patterns"),
        ({"rank_pattern": {f"a{i}+": 1 for i in range(101)}}, "101 regular expressions"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": [3]}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "is not a regular expression"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "put the layer numbers"),
        ({"bias": "some"}, "bias='some'"),
        ({"bias": ["all"]}, "bias"),
        ({"use_dora": "yes"}, "use_dora='yes'"),
        ({"use_dora": 1}, "use_dora=1"),
        ({"task_type": "POETRY"}, "task_type='POETRY'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"init_lora_weights": None}, "init_lora_weights=None"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
        ({"auto_mapping": {"a": [1]}}, "auto_mapping"),
        ({"new_switch": True}, "unknown field 'new_switch'=True"),
        ({"new_config": {"a": 1}}, "unknown field 'new_config'"),
    ],
)
def test_hostile_values_are_refused(raw, message):
    with pytest.raises(UserError, match=message):
        config_from_dict({"peft_type": "LORA"} | raw)


def test_new_fields_that_are_off_and_missing_patterns_are_fine():
    raw = {"new_switch": False, "new_config": None, "new_list": [], "rank_pattern": None, "alpha_pattern": None}
    assert config_from_dict(raw) == deltaw.LoraConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b'{"r": ', "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[1, 2]", "found list"),
        (b"null", "found NoneType"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[" * 100_000, "100,000 lists and objects"),
        (b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", "unknown field|not readable"),
        (b'{"auto_mapping": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}", "auto_mapping"),
        (b" " * 20_000_000, "20,000,000 bytes are not an adapter config"),
    ],
)
def test_hostile_files_are_refused_with_their_name_within_a_second(content, message, tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    started = time.process_time()
    with pytest.raises(UserError, match=f"(?s){CONFIG_NAME}.*({message})"):
        deltaw.PeftConfig.from_pretrained(tmp_path)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("place", ["nowhere", "no/where", "./no/where", "x" * 5000, "a/" + "x" * 5000, "nul\0byte"])
def test_a_place_that_is_not_there_is_the_users_mistake(place):
    with pytest.raises(UserError):
        resolve_file(place, CONFIG_NAME)


def test_a_folder_without_a_config_says_what_it_holds(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"it has no adapter_config.json \(found README.md\)"):
        resolve_file(tmp_path, CONFIG_NAME)
    with pytest.raises(UserError, match="a file; expected a folder"):
        resolve_file(tmp_path / "README.md", CONFIG_NAME)
    with pytest.raises(UserError, match="not readable"):
        read_config(tmp_path / CONFIG_NAME)


SLOW = [r"((?:.|..|...)*)\1(?<!j)", r"(?:(.)|(..)|(...))*(?!.|$).", "(.*)" * 9 + r"(?=\1z)"]


@pytest.mark.parametrize("expression", [*SLOW, "(a+)+$", r"(\w+\.?)+[!]", "(.*)*x"])
def test_a_catastrophic_expression_ends_within_a_second(expression):
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qkvo"] + ["a" * 60 + "!"]
    configs = [deltaw.LoraConfig(rank_pattern={expression: 2}), deltaw.LoraConfig(target_modules=expression)]
    started = time.process_time()
    for config in configs:
        ends = pytest.raises(UserError, match="takes too long to match") if expression in SLOW else nullcontext()
        with ends:
            for name in names:
                config.rank_of(name)
                if config.target_modules:
                    config.match(config.target_modules, name)
    assert time.process_time() - started < 2


def test_ordinary_expressions_never_run_out_of_time():
    config = deltaw.LoraConfig(rank_pattern={r".*\.(q|v)_proj": 2, "layers.[0-3].mlp": 3})
    for _ in range(30):
        for i in range(1000):
            assert config.rank_of(f"model.layers.{i}.self_attn.q_proj") == 2


@pytest.mark.parametrize(
    ("key", "module", "is_meant"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.xq_proj", False),
        ("^layers.0.q_proj", "model.layers.0.q_proj", False),
        ("^model.layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        (r"layers\.[01]\..*", "model.layers.1.q_proj", True),
        (r"layers\.[01]\..*", "model.layers.2.q_proj", False),
        ("(q|v)_proj", "model.layers.2.v_proj", True),
        ("q_proj|nothing", "model.layers.2.q_proj", True),
    ],
)
def test_patterns_match_as_pefts_do(key, module, is_meant):
    from peft.utils.other import get_pattern_key

    assert (get_pattern_key([key], module) == key) is is_meant
    assert (deltaw.LoraConfig().pattern_key([key], module) == key) is is_meant


def test_the_first_matching_pattern_wins_as_in_peft():
    config = deltaw.LoraConfig(rank_pattern={"v_proj": 1, "(q|v)_proj": 2, "q_proj": 3}, alpha_pattern={"q_proj": 6})
    assert [config.rank_of(f"m.{n}") for n in ("v_proj", "q_proj", "k_proj")] == [1, 2, 8]
    assert config.scaling_of("m.q_proj") == 3
    assert deltaw.LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling_of("x") == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted(THEIRS))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=6))
@example({"lora_alpha": 10**400})
@example({"target_modules": "[[a]"})
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning", "ignore:Possible set:FutureWarning")
def test_arbitrary_json_raises_nothing_but_user_errors(raw):
    try:
        config = config_from_dict(raw)
    except UserError:
        return
    assert config_from_dict(json.loads(config.to_json())) == config
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        with suppress(UserError):
            assert config.scaling_of(name) == config.scaling_of(name)
