"""``deltaw adapter blend``: the weighted sum says the same; what is meant to differ is told; nothing half-written."""

import json

import pytest
import torch

from deltaw.adapters.peft_format import read_adapter, write_adapter

pytestmark = pytest.mark.real


def test_cat_by_default(run, adapters, tmp_path, only_json):
    first, second = adapters.values()
    out = tmp_path / "blend"
    code, text, err = run("adapter", "blend", f"{first}=0.7", f"{second}=-0.3", "--out", out, "--tokens", 99, "--json")
    assert code == 0, err
    said = only_json(text)
    assert said["passed"] and said["rank"] == 8 and said["distance"] < 1e-6
    assert said["parity"]["mean_kl"] < 1e-9 and said["parity"]["kept_effect"] == pytest.approx(1, abs=1e-4)
    assert json.loads((out / "parity.json").read_text())["weights"] == [[str(first), 0.7], [str(second), -0.3]]
    stored = read_adapter(out)
    assert stored.provenance.base_sha256 == read_adapter(first).provenance.base_sha256
    assert stored.provenance.history[-1].startswith("blend cat of 0.7·")


@pytest.mark.parametrize("flags", [("ties", "--density", 0.5), ("svd", "--svd-rank", 3), ("linear",)])
def test_other_methods_tell_how_far_they_are(run, adapters, tmp_path, flags):
    first, second = adapters.values()
    out = tmp_path / "blend"
    args = ("adapter", "blend", f"{first}=0.7", f"{second}=0.3", "--out", out, "--tokens", 99, "--method", *flags)
    code, text, err = run(*args, *(["--allow-loss"] if flags[0] == "svd" else []))
    assert code == 0, err
    assert "‖ΔW − Σ w·ΔW‖" in text
    assert json.loads((out / "parity.json").read_text())["distance"] > 0.1


def test_a_cut_that_loses_too_much_is_refused(run, adapters, tmp_path):
    first, second = adapters.values()
    parts = (f"{first}=0.7", f"{second}=0.7")
    code, _, err = run("adapter", "blend", *parts, "--out", tmp_path / "c", "--method", "svd", "--svd-rank", 1)
    assert code == 2
    assert "the result does not say what its source says" in err
    assert list(tmp_path.iterdir()) == []


def test_without_a_base(run, adapters, tmp_path, only_json):
    first, second = adapters.values()
    stored = read_adapter(first)
    (tmp_path / "far").mkdir()
    stored.config.base_model_name_or_path = str(tmp_path / "nowhere")
    write_adapter(stored, tmp_path / "far")
    parts = (f"{tmp_path / 'far'}=1", f"{second}=1")
    code, text, err = run("adapter", "blend", *parts, "--out", tmp_path / "c", "--skip-parity", "--json")
    assert code == 0, err
    said = only_json(text)
    assert said["passed"] is None and said["distance"] < 1e-6


def test_dare_is_the_same_by_its_seed(run, adapters, tmp_path):
    first, second = adapters.values()
    flags = (f"{first}=1", f"{second}=1", "--method", "dare_linear", "--density", 0.5, "--skip-parity")
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("adapter", "blend", *flags, "--out", tmp_path / name, "--seed", seed)[0] == 0
        found.append(next(iter(read_adapter(tmp_path / name).factors.values()))["lora_A"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_mistakes(run, adapters, tmp_path):
    first, second = adapters.values()
    out = ("--out", tmp_path / "c")
    for args, said in (
        ((f"{first}=1", *out), "expected two or more"),
        ((f"{first}=1", f"{second}", *out), "expected ADAPTER=WEIGHT"),
        ((f"{first}=1", f"{second}=nan", *out), "finite"),
        ((f"{first}=1", f"{second}=1", "--out", tmp_path), "exists already"),
        ((f"{first}=1", f"{second}=1", *out, "--method", "ties"), "density"),
        ((f"{first}=1", f"{second}=1", *out, "--svd-rank", "2"), "no use for it"),
    ):
        code, _, err = run("adapter", "blend", *args)
        assert (code, said in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []
