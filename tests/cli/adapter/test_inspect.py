"""`deltaw adapter inspect` on small adapters: a table, JSON, a picture, and what stands in its way."""

import importlib.util
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.adapters.peft_format import read_adapter
from deltaw.adapters.store import Store
from deltaw.cli.adapter.tables import natural, shared_prefix


@pytest.fixture
def changed(adapters, tmp_path):
    """``changed(module part → new tensor)``: a copy of the first adapter with some of its tensors replaced."""

    def make(name="changed", /, **factors):
        folder = tmp_path / name
        shutil.copytree(adapters["first"], folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in tensors:
            for end, change in factors.items():
                if key.endswith(f"{end}.weight") and "layers.0.self_attn.q_proj" in key:
                    tensors[key] = change(tensors[key])
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return make


def test_a_table_that_fits_and_what_it_adds_up_to(run, adapters):
    code, out, err = run("adapter", "inspect", adapters["first"])
    lines = out.splitlines()
    table = lines[: 1 + len(read_adapter(adapters["first"]).factors)]
    assert code == 0 and not err.strip()
    assert all(len(line) <= 100 for line in table)
    assert " ".join(table[0].split()) == "model.layers.… r s ‖ΔW‖ ‖ΔW‖/‖W‖ σ₁ σ₂ σ₃ eff. r r90 r99"
    assert table[1].split()[:3] == ["0.mlp.down_proj", "4", "50"]
    assert "14 modules" in out and "% of ‖W‖" in out and "effective rank" in out and "trained on" in out


def test_json_has_every_figure(run, adapters, only_json):
    found = only_json(run("adapter", "inspect", adapters["first"], "--json")[1])
    (one,) = found["adapters"]
    stored = read_adapter(adapters["first"])
    assert found["comparison"] is None and [m["name"] for m in one["modules"]] == list(stored.factors)
    for m in one["modules"]:
        parts = stored.factors[m["name"]]
        wanted = torch.linalg.svdvals(50 * (parts["lora_B"] @ parts["lora_A"]).double())[:4]
        assert m["singular_values"] == pytest.approx(wanted.tolist(), rel=1e-5)
        assert m["relative_norm"] == pytest.approx(m["norm"] / m["base_norm"])
    assert one["provenance"]["base_sha256"] == stored.provenance.base_sha256 and one["base"]
    assert one["totals"]["not_moved"] == one["totals"]["not_finite"] == []


def test_what_is_wrong_stands_in_the_row_and_below(run, changed):
    code, out, _ = run("adapter", "inspect", changed("still", lora_B=torch.zeros_like))
    assert code == 0 and "never moved" in out and "1 never moved (no ΔW): model.layers.0.self_attn.q_proj" in out
    code, out, _ = run("adapter", "inspect", changed("nan", lora_A=lambda a: a * float("nan")))
    assert code == 0 and "1 not finite (NaN or infinite): model.layers.0.self_attn.q_proj" in out


def test_a_base_that_is_not_here_leaves_its_column_out_unless_it_is_required(run, adapters, changed, tiny_base):
    away = changed("away")  # without provenance: its config alone names the base
    config = json.loads((away / "adapter_config.json").read_text())
    for name in ("someone/not-here", None):
        (away / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        code, out, _ = run("adapter", "inspect", away)
        assert code == 0 and "‖ΔW‖/‖W‖" not in out.splitlines()[0] and "note: no ‖ΔW‖/‖W‖ for away" in out
        assert run("adapter", "inspect", away, "--require-base")[0] == 2
    code, out, _ = run("adapter", "inspect", away, "--base", tiny_base)
    assert code == 0 and "‖ΔW‖/‖W‖" in out.splitlines()[0]


def test_another_base_than_it_was_trained_on_needs_a_word(run, adapters, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("adapter", "inspect", adapters["first"], "--base", other)
    assert code == 2 and "was trained on weights with sha256" in err
    assert run("adapter", "inspect", adapters["first"], "--base", other, "--allow-other-base")[0] == 0


def test_two_are_compared(run, adapters, only_json):
    args = ["adapter", "inspect", adapters["first"], adapters["second"]]
    code, out, _ = run(*args)
    assert code == 0 and all(len(line) <= 100 for line in out.splitlines()[:15])
    assert " ".join(out.splitlines()[0].split()) == "model.layers.… r r′ ‖ΔW‖ ‖ΔW′‖ cosine out chance in chance"
    assert "as wholes: cosine" in out
    found = only_json(run(*args, "--json")[1])
    assert len(found["adapters"]) == 2 and len(found["comparison"]["modules"]) == 14
    like = found["comparison"]["modules"]["model.layers.0.self_attn.q_proj"]
    assert len(like["cosines_out"]) == 4 and -1 <= like["cosine"] <= 1
    same = only_json(run("adapter", "inspect", adapters["first"], adapters["first"], "--json")[1])
    assert same["comparison"]["cosine"] == pytest.approx(1)


def test_names_in_a_store_are_taken(run, adapters, tmp_path):
    store = tmp_path / "store"
    Store(store).publish(adapters["first"], "mine")
    by_name, by_path = (run("adapter", "inspect", text, "--store", store)[1] for text in ("mine", adapters["first"]))
    assert by_name.splitlines()[:15] == by_path.splitlines()[:15]
    code, _, err = run("adapter", "inspect", "mine@nope", "--store", store)
    assert code == 2 and "nope" in err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra: pip install deltaw[plot]")
def test_pictures_are_drawn(run, adapters, tmp_path):
    first, second = adapters["first"], adapters["second"]
    for name, those in (("one.png", [first]), ("two.png", [first, second])):
        code, out, _ = run("adapter", "inspect", *those, "--plot", tmp_path / name)
        data = (tmp_path / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert code == 0 and data.startswith(b"\x89PNG") and width > 800 and height > 300
        assert f"drawn into {tmp_path / name}" in out
    assert {p.name for p in tmp_path.iterdir()} == {"one.png", "two.png"}


def test_slips_are_said_in_one_line(run, adapters, tmp_path, monkeypatch):
    first = adapters["first"]
    for args, said in (
        ([], "0 adapters; expected one to look into"),
        ([first, first, first], "3 adapters; expected one to look into, or two to compare"),
        ([first, "--plot", "x.jpg"], "expected the name of a .png file"),
        ([tmp_path / "nope"], "no such folder"),
    ):
        code, out, err = run("adapter", "inspect", *args)
        assert code == 2 and said in err and not out and len(err.splitlines()) == 1, err
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    code, _, err = run("adapter", "inspect", first, "--plot", tmp_path / "x.png")
    assert code == 2 and "pip install 'deltaw[plot]'" in err


def test_names_are_shortened_and_ordered_as_people_would():
    assert shared_prefix(["model.layers.0.q", "model.layers.10.q", "lm_head"]) == "model.layers."
    assert shared_prefix(["encoder.block.0.q", "decoder.block.0.q"]) == "" == shared_prefix([])
    names = ["m.10.q", "m.9.q", "lm_head", "m.9.k"]
    assert sorted(names, key=natural) == ["lm_head", "m.9.k", "m.9.q", "m.10.q"]
