"""A card says what was trained and measured, and nothing in a file can make it say anything else."""

import dataclasses
import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltaw import LoraConfig
from deltaw.adapters.card import CARD_NAME, Measured, card, escaped, is_own, license_of, read_summary, write_card
from deltaw.adapters.peft_format import Provenance, read_adapter, save_adapter
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.locate import BaseInfo

SUMMARY = {
    "steps": 12, "examples": 3456, "tokens": 70000, "supervised_tokens": 9000, "train_seconds": 61.5,
    "eval_loss_before": 2.5, "eval_loss_after": 1.25,
    "config": {"data": "/home/someone/secret/chats.jsonl", "learning_rate": 2e-4, "epochs": 2, "out": "/x"},
}  # fmt: skip
HOSTILE = "x\n---\n# Free money [here](http://evil) | a | `b` <script>alert(1)</script> www.evil.com @you\x1b[31m"


@pytest.fixture
def stored(tiny, tmp_path):
    model = tiny("llama")
    torch.manual_seed(0)
    inject(model, LoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = read_adapter(save_adapter(model, tmp_path / "mine", data_sha256="d" * 64))
    adapter.config.base_model_name_or_path = "someone/base-1b"
    return adapter


def _front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_what_it_says(stored):
    measured = Measured(text=(3.0, 3.25), text_tokens=512, task=(2.0, 0.5), task_tokens=99, task_name="held.jsonl")
    text = card(stored, name="mine", summary=SUMMARY, measured=measured, license_name="mit")
    front = _front(text)
    assert (front["base_model"], front["library_name"], front["license"]) == ("someone/base-1b", "peft", "mit")
    assert front["tags"][0] == "base_model:adapter:someone/base-1b"
    assert front["pipeline_tag"] == "text-generation"
    assert ModelCard(text).data.base_model == "someone/base-1b"
    for said in (
        "2 to 4",
        "70,000, of which 9,000 supervised",
        "| held-out data, at training | 2.5000 | 1.2500 | -1.2500 |",
        "| held.jsonl, 99 tokens | 2.0000 | 0.5000 | -1.5000 |",
        "| general text, 512 tokens | 3.0000 | 3.2500 | +0.2500 |",
        "d" * 64,
        'AutoModelForCausalLM.from_pretrained("someone/base-1b")',
        "chats.jsonl",
    ):
        assert said in text
    assert "/home/someone" not in text


def test_a_local_base_is_not_told_and_nothing_is_made_up(stored):
    stored.config.base_model_name_or_path = "/home/someone/models/private"
    text = card(stored, name="mine")
    assert "base_model" not in _front(text) and "license" not in _front(text)
    assert "/home" not in text and "private" in text
    assert "## Training" not in text and "## Figures" not in text


def test_hostile_files(stored):
    config = dataclasses.replace(stored.config, base_model_name_or_path=HOSTILE)
    factors = {f"layers.{HOSTILE}": parts for parts in stored.factors.values()}
    came = Provenance(base_sha256=HOSTILE, data_sha256=HOSTILE, versions={HOSTILE: HOSTILE}, history=(HOSTILE,))
    bad = dataclasses.replace(stored, config=config, factors=factors, provenance=came)
    summary = {"steps": HOSTILE, "tokens": 1e400, "train_seconds": [], "config": {"data": HOSTILE, "seed": HOSTILE}}
    text = card(bad, name=HOSTILE, summary=summary)
    assert set(_front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert all(c.isprintable() or c == "\n" for c in text)
    body, _, code = text.partition("```python")
    assert not [sign for sign in ("<script>", "](http", "http://", " @you", "www.") if sign in body]
    assert code.count("```") == 1 and len(code.splitlines()) == 9
    titles = [line for line in body.split("---\n", 2)[2].splitlines() if line.startswith("#")]
    assert titles[1:] == ["## Training", "## Hashes (SHA-256) and versions", "## How to load"]


@given(st.text(max_size=300))
def test_escaped_is_one_plain_line(text):
    out = escaped(text)
    assert "\n" not in out and out.isprintable()
    plain = out.replace("\\\\", "")
    for sign in "`*_[]<>|~&@":
        assert plain.count(sign) == plain.count(f"\\{sign}")


def test_whose_card_it_is(tmp_path):
    (tmp_path / CARD_NAME).write_text("mine")
    with pytest.raises(UserError, match="somebody else"):
        write_card(tmp_path, "new")
    assert (tmp_path / CARD_NAME).read_text() == "mine"
    assert not is_own(tmp_path / CARD_NAME)
    write_card(tmp_path, "new", overwrite=True)
    assert (tmp_path / CARD_NAME).read_text() == "new"


def test_summaries_and_licences_that_are_none(tmp_path):
    info = BaseInfo("base", tmp_path, ())
    assert (read_summary(tmp_path), license_of(info)) == ({}, None)
    for text in ("[]", "{", "[" * 100_000, "\xff"):
        (tmp_path / "summary.json").write_text(text)
        assert read_summary(tmp_path) == {}
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY
    for text, found in (
        ("---\nlicense: apache-2.0\n---\n# Base", "apache-2.0"),
        ("---\nlicense: 'x\n", None),
        ("---\nlicense: [a]\n---\n", None),
        ("---\nlicense: 'a b <c>'\n---\n", None),
        ("no front", None),
    ):
        (tmp_path / CARD_NAME).write_text(text)
        assert license_of(info) == found
