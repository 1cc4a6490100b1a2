"""``deltaw adapter merge`` over a base in 4 bits: dense, or quantised anew, with the figures of what that loses."""

import json

import pytest
import torch

from deltaw import LoraConfig, load_base
from deltaw.adapters.peft_format import save_adapter
from deltaw.nn.inject import inject
from deltaw.nn.quantized import QuantizedModule


@pytest.fixture
def adapter(tiny_base, tmp_path):
    model, _ = load_base(tiny_base, quantization="nf4", dtype="float32")
    torch.manual_seed(0)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    return save_adapter(model, tmp_path / "adapter")


def test_dense_by_default(run, adapter, tmp_path, only_json):
    out = tmp_path / "merged"
    code, text, _ = run("adapter", "merge", adapter, "--quantization", "nf4", "--out", out, "--json")
    said = only_json(text)
    assert code == 0 and said["passed"] and said["rounding"]["storage"] == "float32"
    assert said["rounding"]["weight_error"] == 0 and "quantization_config" not in json.loads(
        (out / "config.json").read_text()
    )


def test_quantised_anew_where_that_is_asked_for(run, adapter, tmp_path, only_json):
    out = tmp_path / "merged"
    given = ("adapter", "merge", adapter, "--quantization", "nf4", "--requantize", "--out", out, "--json")
    code, _, complaint = run(*given)
    assert code in (0, 2) and (code == 0 or "does not say what its source says" in complaint)
    if code:
        assert not out.exists()
        code, _, _ = run(*given, "--allow-loss")
        assert code == 0
    said = json.loads((out / "parity.json").read_text())
    assert said["rounding"]["storage"] == "NF4" and said["rounding"]["change_error"] > said["rounding"]["weight_error"]
    model, _ = load_base(out)
    assert sum(isinstance(m, QuantizedModule) for m in model.modules()) == 14


def test_a_dense_base_has_nothing_to_quantise_anew(run, adapter, tmp_path):
    code, _, complaint = run("adapter", "merge", adapter, "--requantize", "--out", tmp_path / "merged")
    assert code == 2 and "requantize: the base's layers are dense" in complaint and not (tmp_path / "merged").exists()
