"""The flags of training: their checks, and the adapter they ask for."""

import dataclasses
import json

import pytest

from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.train.options import ADAPTER_FLAGS, TrainOptions


def test_defaults_are_those_that_train_well():
    options = TrainOptions()
    config = options.lora_config()
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, "all-linear")
    assert (options.learning_rate, options.examples_per_step) == (2e-4, 8)


@pytest.mark.parametrize(
    "bad",
    [
        dict(batch_size=0), dict(gradient_accumulation=0), dict(micro_batch_tokens=0), dict(max_length=1),
        dict(learning_rate=0), dict(learning_rate=float("nan")), dict(learning_rate=float("inf")), dict(epochs=0),
        dict(epochs=float("inf")), dict(max_steps=0), dict(warmup_steps=-1), dict(weight_decay=-0.1),
        dict(weight_decay=float("nan")), dict(max_grad_norm=-1), dict(preview=-1), dict(eval_every=-1),
        dict(save_every="day"), dict(seed=-1), dict(seed=2**63), dict(eval_data="x", early_stop_patience=0),
    ],
)  # fmt: skip
def test_bad_values_are_named_with_what_was_expected(bad):
    name = next(key for key in bad if key != "eval_data")
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*: expected"):
        TrainOptions(**bad)


@pytest.mark.parametrize("bad", [dict(r=0), dict(lora_dropout=1.0), dict(lora_alpha=float("nan")), dict(bias="some")])
def test_what_makes_no_adapter_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TrainOptions(**bad)


def test_full_fine_tuning_has_no_adapter_to_be_set():
    with pytest.raises(UserError, match=r"--full trains every weight.* leave out --r, --use-dora, or --full"):
        TrainOptions(full=True, r=8, use_dora=True, learning_rate=1e-5)
    assert TrainOptions(full=True, r=16).full  # what it is without the flag


def test_every_flag_of_an_adapter_is_known_to_be_one():
    # A new one must be put on the list, or --full would ignore it.
    fields = {f.name for f in dataclasses.fields(LoraConfig)} & {f.name for f in dataclasses.fields(TrainOptions)}
    assert fields | {"loraplus_lr_ratio"} == ADAPTER_FLAGS


def test_options_that_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        TrainOptions(resume=True, overwrite=True)
    with pytest.raises(UserError, match="--early-stop-patience needs --eval-data"):
        TrainOptions(early_stop_patience=2)
    with pytest.raises(UserError, match="--eval-split test: of which data"):
        TrainOptions(eval_split="test")


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("all-linear", "all-linear"),
        ("attention", "attention"),
        ("q_proj", {"q_proj"}),
        ("q_proj, v_proj,", {"q_proj", "v_proj"}),
        ("self_attn.q_proj", {"self_attn.q_proj"}),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"(a|b),c", r"(a|b),c"),
    ],
)
def test_target_modules_as_strategy_names_or_expression(given, targets):
    assert TrainOptions(target_modules=given).lora_config().target_modules == targets


@pytest.mark.parametrize(("given", "start"), [("true", True), ("False", False), ("gaussian", "gaussian")])
def test_starts(given, start):
    assert TrainOptions(init_lora_weights=given).lora_config().init_lora_weights == start


def test_options_survive_json_and_name_their_differences(tmp_path):
    options = TrainOptions(data="a", out=tmp_path, save_every=3)
    recorded = json.loads(json.dumps(options.to_dict()))
    assert options.differences(recorded) == []
    other = TrainOptions(data="a", out=tmp_path / "x", save_every="epoch", resume=True, r=8, lr_scheduler="linear")
    assert other.differences(recorded) == ["--r 16 → 8", "--lr-scheduler cosine → linear"]
