"""The same adapter has the same hash, however its files are laid out; another one has another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.adapters.store.content import content_hash, copy_adapter
from deltaw.config import LoraConfig
from deltaw.errors import UserError

WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v != "LEFT OUT"}))


def test_layout_and_authorship_do_not_matter(make):
    a, b = make("a"), make("b")
    tensors = load_file(b / WEIGHTS)
    save_file(dict(reversed(tensors.items())), b / WEIGHTS, metadata={"format": "pt", "x": "padding" * 9})
    full = LoraConfig.from_pretrained(b).to_dict()  # as newer versions write it: every field there is
    (b / "adapter_config.json").write_text(json.dumps(full, indent=7))
    _edit(b, peft_version="9.9", inference_mode=True, target_modules=["v_proj", "q_proj"], a_field_of_tomorrow=None)
    (b / "README.md").write_text("a card")
    assert (a / "adapter_config.json").read_text() != (b / "adapter_config.json").read_text()
    assert content_hash(a) == content_hash(b)


def test_a_bin_says_what_its_safetensors_say(make):
    a, b = make("a"), make("b")
    torch.save(load_file(b / WEIGHTS), b / "adapter_model.bin")
    (b / WEIGHTS).unlink()
    assert content_hash(a) == content_hash(b)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"base_model_name_or_path": "org/other"},
        {"alpha_pattern": {"q_proj": 1, "v_proj": 2}},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_what_the_config_says_matters(make, change):
    assert content_hash(make("a")) != content_hash(make("b", **change))


def test_the_order_of_patterns_matters_as_the_first_that_matches_counts(make):
    one, other = {"q_proj": 1, "proj": 2}, {"proj": 2, "q_proj": 1}
    assert content_hash(make("a", alpha_pattern=one)) != content_hash(make("b", alpha_pattern=other))


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name"])
def test_every_bit_of_the_tensors_matters(make, change):
    a, b = make("a"), make("b")
    tensors = load_file(b / WEIGHTS)
    if change == "value":
        tensors[Q_A].view(torch.int32)[1, 3] ^= 1
    elif change == "dtype":
        tensors[Q_A] = tensors[Q_A].view(torch.float32).to(torch.float64)
    elif change == "shape":
        tensors[Q_A] = tensors[Q_A].reshape(2, 4, 2)[:, :, 0].contiguous()
    else:
        tensors = {key.replace("layers.0", "layers.1"): tensor for key, tensor in tensors.items()}
    save_file(tensors, b / WEIGHTS)
    assert content_hash(a) != content_hash(b)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_what_changes_answers_matters_and_comes_along(make, tmp_path, name):
    a, b = make("a"), make("b")
    (b / name).write_text("{}")
    assert content_hash(a) != content_hash(b)
    (target := tmp_path / "copy").mkdir()
    assert name in copy_adapter(b, target)
    assert content_hash(target) == content_hash(b)


def test_documents_come_along_and_nothing_else(make, tmp_path):
    a = make("a")
    for name in ("README.md", "LICENSE", "parity.json", "optimizer.pt", "metrics.jsonl", ".hidden.json", "big.json"):
        (a / name).write_text("x")
    (a / "big.json").write_bytes(b" " * (2**20 + 1))
    (a / "checkpoints").mkdir()
    (target := tmp_path / "copy").mkdir()
    assert copy_adapter(a, target) == ["adapter_config.json", WEIGHTS]
    assert {p.name for p in target.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md", "LICENSE", "parity.json"}


def _drop(folder, part):
    tensors = load_file(folder / WEIGHTS)
    del tensors[Q_A.replace("lora_A", part)]
    save_file(tensors, folder / WEIGHTS)


def _set(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors[Q_A] = value
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: _drop(f, "lora_A"), "q_proj has lora_B alone"),
        (lambda f: _drop(f, "lora_B"), "q_proj has lora_A alone"),
        (lambda f: _set(f, torch.zeros(3, 8)), r"A \[3, 8\], B \[8, 2\] are no factors of one rank"),
        (lambda f: _set(f, torch.full((2, 8), torch.nan)), "q_proj.lora_A.weight has values that are no numbers"),
        (lambda f: save_file({}, f / WEIGHTS), "no tensors in it"),
        (lambda f: (f / "tokenizer.json").mkdir(), "tokenizer.json: expected a file"),
        (lambda f: (f / WEIGHTS).unlink(), "it has no adapter_model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "not a readable safetensors file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
    ],
    ids=["no A", "no B", "ranks", "nan", "empty", "folder", "no weights", "cut off", "config"],
)
def test_half_an_adapter_is_refused(make, damage, match):
    folder = make()
    damage(folder)
    with pytest.raises(UserError, match=match):
        content_hash(folder)


def test_a_source_that_changes_while_it_is_copied_is_refused(make, tmp_path, monkeypatch):
    a, b = make("a"), make("b", seed=1)
    real = shutil.copyfile

    def slow(source, target):
        real(source, target)
        if source.name == "adapter_config.json":
            (b / WEIGHTS).replace(a / WEIGHTS)

    monkeypatch.setattr(shutil, "copyfile", slow)
    (target := tmp_path / "copy").mkdir()
    with pytest.raises(UserError, match="somebody wrote to it while it was copied"):
        copy_adapter(a, target)
