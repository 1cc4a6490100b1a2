"""Adapters onto disk: both files or neither, and in them what the adapter is and where it comes from."""

import dataclasses
import json
import os

import pytest
import torch

import deltaw
from deltaw.adapters import peft_format
from deltaw.adapters.peft_format import WEIGHTS_NAME, load_adapter, read_adapter, save_adapter, write_adapter
from deltaw.config import CONFIG_NAME
from deltaw.nn.load import BaseInfo


def test_the_header_says_where_it_comes_from(tiny, adapted, tmp_path, saved):
    model = adapted(tiny(), {}).get_base_model()
    info = BaseInfo("some/base", tmp_path, (saved / WEIGHTS_NAME,))
    model.__dict__["_deltaw_base"] = info
    save_adapter(model, tmp_path / "a", data_sha256="d" * 64)
    came = read_adapter(tmp_path / "a").provenance
    assert (came.base_name, came.base_sha256, came.data_sha256) == ("some/base", info.sha256, "d" * 64)
    assert came.versions.keys() == {"deltaw", "torch", "transformers"}
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert (config["base_model_name_or_path"], config["peft_version"]) == ("some/base", "0.21.2")
    assert config["inference_mode"] is True


@pytest.mark.parametrize("crash", ["save_file", "first rename", "second rename"])
def test_a_crash_while_saving_leaves_the_old_adapter(tiny, adapted, ids, saved, monkeypatch, crash):
    old = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = adapted(tiny(), dict(target_modules="mlp", lora_alpha=99)).get_base_model()
    real, calls = os.replace, []

    def half_a_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    def fragile(source, target):
        calls.append(target)
        if len(calls) == {"first rename": 1, "second rename": 2}[crash]:
            raise OSError("crash")
        real(source, target)

    if crash == "save_file":
        monkeypatch.setattr(peft_format.save, "save_file", half_a_file)
    else:
        monkeypatch.setattr(os, "replace", fragile)
    with pytest.raises(OSError, match=r"disk full|crash"):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old
    load_adapter(tiny(), saved)


def test_several_adapters_lie_side_by_side(tiny, adapted, ids, tmp_path):
    model = adapted(tiny(), {}, "default")
    model.add_adapter("train", deltaw.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME, "train"]
    for name, folder in (("default", tmp_path), ("train", tmp_path / "train")):
        model.set_adapter(name)
        again = deltaw.PeftModel.from_pretrained(tiny(), folder)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_was_saved_of_an_inactive_owner_of_biases_is_its_own(tiny, adapted, ids, tmp_path):
    model = adapted(tiny("gpt2"), dict(bias="all"))
    active = model(input_ids=ids).logits
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
    assert torch.equal(deltaw.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)(input_ids=ids).logits, active)


def test_files_without_a_model_are_written_as_they_were_read(saved, tmp_path):
    stored = read_adapter(saved)
    again = read_adapter(write_adapter(stored, tmp_path))
    assert (tmp_path / CONFIG_NAME).read_bytes() == (saved / CONFIG_NAME).read_bytes()
    assert again.config == stored.config and again.others.keys() == stored.others.keys()
    assert again.provenance == stored.provenance and again.keys == stored.keys
    for module, parts in stored.factors.items():
        assert parts.keys() == again.factors[module].keys()
        assert all(torch.equal(again.factors[module][part], tensor) for part, tensor in parts.items())


def test_the_history_is_kept_in_order_and_bounded(saved, tmp_path):
    stored = read_adapter(saved)
    came = stored.provenance
    for i in range(50):
        came = came.after(f"step {i} " + "x" * 1000)
    again = read_adapter(write_adapter(dataclasses.replace(stored, provenance=came), tmp_path)).provenance
    assert again.history == came.history and len(again.history) == 20
    assert again.history[-1].startswith("step 49 ") and len(again.history[-1]) == 200
