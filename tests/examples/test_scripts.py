"""The example scripts, as a reader would run them: a process each, on the real base, for a few steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import deltaw

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def base(real_base, tmp_path_factory):
    """A folder with the real base; taken away afterwards, for it is half a gigabyte."""
    folder = tmp_path_factory.mktemp("real-base")
    model, tokenizer = real_base
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.fixture
def chats(tmp_path):
    """A dozen short conversations."""
    file = tmp_path / "chats.jsonl"
    turns = (("user", "say {}"), ("assistant", "It is {}."))
    rows = [{"messages": [{"role": r, "content": c.format(i)} for r, c in turns]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(printed):
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]


def test_examples_are_short():
    for script in EXAMPLES.glob("*.py"):
        if script.name != "python_docs.py":  # that one builds a data set
            assert len(script.read_text().splitlines()) < 80, script.name


@pytest.mark.parametrize(
    ("script", "adapter", "trainable"),
    [("lora_qv.py", "lora-qv", 460_800), ("lora_all_linear.py", "lora-all-linear", 4_884_480)],
)
def test_a_plain_loop(base, chats, out, script, adapter, trainable):
    printed = run(script, "--model", base, "--data", chats, "--out", out, "--max-steps", 6)
    assert f"trainable params: {trainable:,d} || all params: {134_515_008 + trainable:,d} ||" in printed
    assert len(losses(printed)) == 6 and losses(printed)[-1] < losses(printed)[0]
    assert deltaw.PeftConfig.from_pretrained(out / adapter).task_type == "CAUSAL_LM"


def test_the_trainer(base, chats, out):
    printed = run("trainer_chat.py", "--model", base, "--data", chats, "--out", out, "--max-steps", 3)
    assert "eval_loss" in printed
    checkpoint = out / "trainer" / "checkpoint-3"
    assert sorted(p.name for p in checkpoint.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert (out / "adapter" / "adapter_config.json").exists() and (out / "adapter" / "chat_template.jinja").exists()


def test_several_adapters_and_a_merge(base, out):
    printed = run("several_adapters.py", "--model", base, "--out", out)
    assert "merged, saved and loaded" in printed
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight  # tied, as in the base
    assert merged.generation_config.eos_token_id is not None and (out / "merged" / "chat_template.jinja").exists()


def test_four_bits_with_bitsandbytes(base, chats, out):
    printed = run("qlora_bitsandbytes.py", "--model", base, "--data", chats, "--out", out, "--max-steps", 6)
    assert len(losses(printed)) == 6 and losses(printed)[-1] < losses(printed)[0]
    assert "|| all params: 136,957,248 ||" in printed
    assert AutoModelForCausalLM.from_pretrained(out / "qlora-merged").dtype.itemsize == 2


def test_the_embedded_base_and_made_up_chats(monkeypatch, tmp_path, real_base):
    monkeypatch.syspath_prepend(EXAMPLES)
    embedded = __import__("embedded")
    monkeypatch.setattr(embedded, "load_base", lambda *_, **__: real_base)
    folder = Path(embedded.model_folder("smollm2-135m", str(tmp_path)))
    assert (folder / "model.safetensors").stat().st_size > 5e8
    shutil.rmtree(folder)
    assert embedded.model_folder("owner/name", str(tmp_path)) == "owner/name"
    rows = [json.loads(line) for line in Path(embedded.chat_file(None, str(tmp_path))).read_text().splitlines()]
    assert len(rows) == 400 and {"messages"} <= rows[0].keys()
    assert embedded.chat_file("mine.jsonl", str(tmp_path)) == "mine.jsonl"
