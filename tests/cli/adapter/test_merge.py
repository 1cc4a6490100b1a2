"""``deltaw adapter merge``: what lies on disk afterwards is a plain checkpoint, and says what base and adapter said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltaw import LoraConfig, load_base
from deltaw.adapters import parity
from deltaw.adapters.peft_format import load_adapter, save_adapter
from deltaw.adapters.plain import shard_bytes
from deltaw.errors import UserError
from deltaw.nn.inject import inject

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The ferry left the island", return_tensors="pt")["input_ids"]
assert tokenizer.chat_template
assert GenerationConfig.from_pretrained(sys.argv[1]).max_new_tokens == 77
assert not [name for name in sys.modules if name.split(".")[0] in ("deltaw", "peft")]
torch.save((ids, model(ids).logits.detach()), sys.argv[2])
"""


def _adapter(base: Path, out: Path, **config) -> Path:
    model, _ = load_base(base, dtype="float32")
    torch.manual_seed(0)
    given = dict(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False) | config
    inject(model, LoraConfig(**given))
    return save_adapter(model, out)


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """The small base with tied weights, a generation config that contradicts itself, and a licence."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "max_new_tokens": 77}')
    (folder / "LICENSE").write_text("of the base\n")
    return folder


@pytest.mark.real
def test_a_plain_process_reads_it(run, base, tmp_path, environment, only_json):
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "lm_head"])
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    out = tmp_path / "merged"
    code, text, _ = run("adapter", "merge", adapter, "--out", out, "--shard-size", "2MB", "--json")
    assert code == 0
    said = only_json(text)
    assert said["passed"] and said["files"] > 1 and said["dtype"] == "float32"
    assert said["parity"]["mean_kl"] < 1e-9
    assert said["parity"]["kept_effect"] == pytest.approx(1, abs=1e-4)

    assert json.loads((out / "parity.json").read_text())["parity"] == said["parity"]
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "quantization_config" not in config
    assert (out / "model.safetensors.index.json").is_file()
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "LICENSE").is_file()
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not list(out.glob("adapter*"))
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "config.json").stat().st_mode}

    script, found = tmp_path / "plain.py", tmp_path / "found.pt"
    script.write_text(PLAIN)
    subprocess.run([sys.executable, script, out, found], check=True, env=environment, timeout=120, cwd=tmp_path)
    ids, logits = torch.load(found)
    model, _ = load_base(base, dtype="float32")
    embedding = model.get_input_embeddings().weight.clone()
    load_adapter(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    merged = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert not torch.equal(merged["lm_head.weight"], embedding)


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_once_at_the_end(run, tiny_base, tmp_path, dtype, only_json):
    adapter, out = _adapter(tiny_base, tmp_path / "adapter"), tmp_path / "merged"
    code, text, _ = run("adapter", "merge", adapter, "--out", out, "--dtype", dtype, "--tokens", 200, "--json")
    assert code == 0
    assert only_json(text)["dtype"] == dtype
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    model, _ = load_base(tiny_base, dtype="float32")
    load_adapter(model, adapter)
    layer = model.model.layers[0].self_attn.q_proj
    wanted = (layer.weight.double() + layer.adapter("default").delta().double()).to(getattr(torch, dtype))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(load_file(out / "model.safetensors")[name], wanted, rtol=1e-3, atol=0)


@pytest.mark.real
def test_a_result_that_says_something_else_is_not_kept(run, tiny_base, tmp_path, monkeypatch):
    adapter, out = _adapter(tiny_base, tmp_path / "adapter"), tmp_path / "merged"
    import deltaw.adapters.plain as plain

    honest = plain.save_plain

    def dishonest(model, tokenizer, folder, **given):
        honest(model, tokenizer, folder, **given)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.05
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(plain, "save_plain", dishonest)
    code, _, err = run("adapter", "merge", adapter, "--out", out)
    assert code == 2
    assert "the result does not say what its source says: mean KL" in err
    assert "--allow-loss" in err
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    code, text, _ = run("adapter", "merge", adapter, "--out", out, "--allow-loss")
    assert code == 0
    assert "more than is tolerated" in text
    assert json.loads((out / "parity.json").read_text())["passed"] is False


@pytest.mark.real
def test_a_base_in_four_bits_becomes_dense(run, tiny_base, tmp_path, only_json):
    pytest.importorskip("bitsandbytes")
    base, model = tmp_path / "quantised", AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").unlink()
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    del model
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, quantization_config=quantised)
    model.save_pretrained(base)
    del model
    adapter, out = _adapter(tiny_base, tmp_path / "adapter"), tmp_path / "merged"
    flags = ("--model", base, "--allow-other-base", "--out", out)
    code, text, err = run("adapter", "merge", adapter, *flags, "--json")
    assert code == 0, err
    assert only_json(text)["parity"]["mean_kl"] < 1e-3
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert all(tensor.dtype == torch.float32 for tensor in load_file(out / "model.safetensors").values())


@pytest.mark.real
def test_mistakes(run, tiny_base, tmp_path):
    adapter = _adapter(tiny_base, tmp_path / "adapter")
    for flags, said in (
        (("--out", tmp_path), "exists already"),
        (("--out", tmp_path / "new", "--shard-size", "many"), "a number and a unit"),
        (("--out", tmp_path / "new", "--tokens", 1), "expected at least 2"),
        ((), "--out must be given"),
    ):
        code, _, err = run("adapter", "merge", adapter, *flags)
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "new").exists()
    assert run("adapter", "merge", tmp_path / "nothing", "--out", tmp_path / "new")[0] == 2


def test_shard_sizes():
    assert [shard_bytes(text) for text in ("5GB", "1.5 gb", "500MB", "200kb", "2GiB")] == [
        *(5 * 10**9, 15 * 10**8, 5 * 10**8, 2 * 10**5, 2 * 10**9)
    ]
    for bad in ("", "5", "GB", "1KB", "-5GB", "5 GB x", "1e9GB", "9" * 400 + "X"):
        with pytest.raises(UserError, match="shard size"):
            shard_bytes(bad)
    assert parity.PARITY_NAME == "parity.json"
