"""``deltaw adapter export``: a GGUF file that says what its source says, or one line that says why not."""

from __future__ import annotations

import json

import gguf
import pytest

from deltaw.cli.adapter import export


@pytest.mark.real
@pytest.mark.parametrize("form", ["gguf-adapter", "gguf-merged"])
def test_files_and_figures(form, run, adapters, only_json, tmp_path):
    out = tmp_path / "new" / "mine.gguf"
    given = ("adapter", "export", adapters["first"], "--out", out, "--format", form)
    code, text, _ = run(*given, "--outtype", "f32", "--modelfile", "--json")
    told = only_json(text)
    assert code == 0
    assert told["passed"]
    assert told["parity"]["kept_effect"] == pytest.approx(1, abs=0.01)
    assert set(told["files"]) == {path.name for path in out.parent.iterdir()}
    assert set(told["files"]) == {"mine.gguf", "mine.parity.json", "mine.Modelfile"}
    assert json.loads((out.parent / "mine.parity.json").read_text())["parity"] == told["parity"]
    assert ("ADAPTER ./mine.gguf" in (out.parent / "mine.Modelfile").read_text()) == (form == "gguf-adapter")
    reader = gguf.GGUFReader(out)
    assert reader.get_field("general.type").contents() == ("adapter" if form == "gguf-adapter" else "model")

    code, _, error = run(*given)
    assert code == 2
    assert "exists already" in error
    if form == "gguf-adapter":
        code, text, _ = run(*given, "--overwrite")
        assert code == 0
        assert "of the adapter's effect arrives" in text


@pytest.mark.real
def test_the_base_comes_along(run, adapters, tmp_path):
    code, text, _ = run("adapter", "export", adapters["first"], "--out", tmp_path / "a.gguf", "--with-base")
    assert code == 0
    assert "a-base.gguf" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-base.gguf", "a.gguf", "a.parity.json"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--out", "a.bin"), "expected the name of a .gguf file"),
        (("--out", "a.gguf", "--format", "gguf-merged", "--rescale"), "--rescale is for --format gguf-adapter"),
        (("--out", "a.gguf", "--quantization", "nf4"), "doesn't depend on how its base is stored"),
        (("--out", "a.gguf"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(flags, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("adapter", "export", "./nowhere", *flags)
    assert code == 2
    assert said in error
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_hold_is_said_with_the_remedy(run, tiny_base, tmp_path):
    import torch

    from deltaw import LoraConfig, load_base
    from deltaw.adapters.peft_format import save_adapter
    from deltaw.nn.inject import inject

    model, _ = load_base(tiny_base, dtype="float32")
    torch.manual_seed(0)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    adapter = save_adapter(model, tmp_path / "dora")
    code, _, error = run("adapter", "export", adapter, "--out", tmp_path / "a.gguf")
    assert code == 2
    assert "DoRA" in error
    assert "--format gguf-merged" in error
    assert not (tmp_path / "a.gguf").exists()


def test_help_teaches(run):
    code, text, _ = run("adapter", "export", "--help")
    assert code == 0
    assert "gguf-merged writes the whole model" in " ".join(text.split())
    assert export.Options.__doc__
