"""`deltaw adapter compress` on small adapters: files, figures, refusal, nothing half-written."""

import json
import shutil

import pytest

from deltaw import LoraConfig, load_base
from deltaw.adapters.peft_format import read_adapter, save_adapter
from deltaw.nn.inject import inject


@pytest.fixture
def source(adapters):
    return adapters["first"]


def test_the_result_is_an_adapter_with_its_figures_beside_it(run, source, tmp_path, only_json):
    out = tmp_path / "out"
    code, text, _ = run("adapter", "compress", source, "--rank", 3, "--out", out, "--allow-loss")
    assert code == 0
    assert "q_proj" in text and "% of ‖ΔW‖² kept" in text and "against the adapter as it was: KL" in text
    before, after = read_adapter(source), read_adapter(out)
    assert (after.config.r, after.config.lora_alpha) == (3, 150)
    assert after.provenance.base_sha256 == before.provenance.base_sha256
    assert after.provenance.history[0].startswith("compress --rank 3 of ")
    report = json.loads((out / "parity.json").read_text())
    assert report["step"] == "compress" and len(report["modules"]) == 14 and 0 < report["energy"] < 1
    assert report["parity"]["num_tokens"] == 512 and report["parameters"] < report["parameters_before"]
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "parity.json"]
    assert run("adapter", "inspect", out)[0] == 0


def test_full_rank_says_exactly_the_same(run, source, tmp_path, only_json):
    args = ["adapter", "compress", source, "--energy", 1, "--out", tmp_path / "out", "--json"]
    found = only_json(run(*args)[1])
    assert found["passed"] and found["energy"] == pytest.approx(1)
    assert found["parity"]["max_logit_difference"] == 0 and found["parity"]["equal_greedy"] == 1
    assert found["bytes"] == pytest.approx(found["bytes_before"], rel=0.1)


def test_beyond_the_tolerance_nothing_is_kept(run, source, tmp_path):
    args = ["adapter", "compress", source, "--rank", 1, "--out", tmp_path / "out", "--max-kl", 1e-9]
    code, _, err = run(*args)
    last = err.splitlines()[-1]
    assert code == 2 and "nothing was kept. --allow-loss keeps it" in " ".join(err.split()), last
    assert not list(tmp_path.iterdir())
    code, text, _ = run(*args, "--allow-loss")
    assert code == 0 and "kept although that is more than is tolerated" in text
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is False


def test_patterns_name_single_modules(run, source, tmp_path, only_json):
    pattern = r"q_proj=2, layers\.[0-9]{1,2}\.mlp\.up_proj=1"
    args = ["--rank-pattern", pattern, "--out", tmp_path / "out", "--skip-parity", "--json"]
    found = only_json(run("adapter", "compress", source, *args)[1])
    ranks = {m["name"].rpartition(".")[2]: m["rank"] for m in found["modules"]}
    assert (ranks["q_proj"], ranks["up_proj"], ranks["k_proj"]) == (2, 1, 4)
    assert found["parity"] is None and found["passed"] is None
    config = read_adapter(tmp_path / "out").config
    assert config.r == 4 and config.rank_of("model.layers.1.mlp.up_proj") == 1
    assert config.scaling_of("model.layers.1.mlp.up_proj") == 50


def test_slips_are_said_in_one_line(run, source, tmp_path):
    out = tmp_path / "out"
    for args, said in (
        (["--out", out], "either a rank or an energy"),
        (["--rank", 2, "--energy", 0.5, "--out", out], "either a rank or an energy"),
        (["--rank", 2], "--out must be given"),
        (["--rank", 2, "--out", tmp_path], "exists already"),
        (["--rank-pattern", "q_proj", "--out", out], "expected names and ranks"),
        (["--rank-pattern", "nope=2", "--out", out], "names no module"),
        (["--rank", 2, "--out", out, "--tokens", 1], "expected at least 2"),
        (["--rank", 2, "--out", out, "--max-kl", 0], "expected nats over 0"),
    ):
        code, text, err = run("adapter", "compress", source, *args)
        assert code == 2 and said in err and not text and len(err.splitlines()) == 1, err
    assert not out.exists()


@pytest.mark.parametrize("beside", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_what_is_beside_the_factors_is_compared_too(run, tiny, tiny_base, tmp_path, only_json, beside):
    """Of adapters with trained biases a model holds one at a time."""
    model = tiny("qwen2")
    model.resize_token_embeddings(49152)
    model.save_pretrained(tmp_path / "base")
    for path in tiny_base.glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    model, _ = load_base(tmp_path / "base", dtype="float32")
    inject(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **beside))
    save_adapter(model, tmp_path / "source")
    args = ["adapter", "compress", tmp_path / "source", "--rank", 4, "--out", tmp_path / "out", "--json"]
    found = only_json(run(*args)[1])
    assert found["passed"] and found["parity"]["max_logit_difference"] == 0
