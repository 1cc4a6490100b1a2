"""`deltaw quantize`, and --quantization on the verbs that load a base."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.nn.load import load_base
from deltaw.nn.quantized import num_quantized, quantized_modules


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_model_is_written_and_loads_without_a_flag(run, tiny_base, out, only_json):
    code, text, _ = run("quantize", tiny_base, "--out", out, "--json")
    result = only_json(text)
    model, tokenizer = load_base(out)
    assert code == 0 and num_quantized(model) == result["quantized_weights"] > 0
    assert result["bits_per_quantized_weight"] == pytest.approx(
        8 * sum(m.quantized.nbytes for _, m in quantized_modules(model)) / num_quantized(model)
    )
    assert result["bits_per_weight"] == 8 * result["bytes"] / result["weights"]
    assert (
        result["dense_bytes"] == 4 * result["weights"] and result["weights"] == load_base(tiny_base)[0].num_parameters()
    )
    assert set(result["files"]) == set(os.listdir(out)) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert tokenizer.chat_template is not None and (out / "generation_config.json").is_file()
    modes = {(out / name).stat().st_mode for name in result["files"]}
    assert len(modes) == 1


def test_it_tells_people(run, tiny_base, out):
    code, text, _ = run("quantize", "--model", tiny_base, "--out", out, "--method", "int4", "--block-size", 256)
    assert code == 0
    assert "weights in 4.125 bits each; the whole model, " in text
    assert " instead of " in text and f"chat --model {out}" in text
    assert {m.quantized.block_size for _, m in quantized_modules(load_base(out)[0])} == {256}


def test_the_head_where_it_is_asked_for(run, tiny_base, out, only_json):
    without = only_json(run("quantize", tiny_base, "--out", out / "a", "--json")[1])
    with_head = only_json(run("quantize", tiny_base, "--out", out / "b", "--include-head", "--json")[1])
    vocabulary = load_base(tiny_base)[0].config.vocab_size
    assert with_head["quantized_weights"] - without["quantized_weights"] == 32 * vocabulary
    assert with_head["bits_per_weight"] < without["bits_per_weight"] < 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "gptq"], "invalid choice"),
        (["--block-size", 65], "blocks of 65 weights: expected one of 32, 64"),
        (["--shard-size", "much"], "--shard-size much: expected a number with KB, MB or GB"),
        (["--dtype", "float16"], "dtype='float16' is for CUDA"),
    ],
)
def test_mistakes(run, tiny_base, out, args, message):
    code, _, error = run("quantize", tiny_base, "--out", out, *args)
    assert code == 2 and message in error and error.count("\n") == 1 and not out.exists()


def test_places_that_are_taken(run, tiny_base, out):
    out.mkdir()
    assert run("quantize", tiny_base, "--out", out)[0] == 0  # empty: fine
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, error = run("quantize", tiny_base, "--out", out)
    assert code == 2 and f"--out {out}: not empty; expected a folder" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    code, _, error = run("quantize", tiny_base, "--out", out / "config.json")
    assert code == 2 and "config.json: a file; expected a folder" in error
    code, _, error = run("quantize", out, "--out", out / "again")
    assert code == 2 and f"{out}: quantised already; load it as it is" in error and not (out / "again").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_bad_tensor_is_named_and_leaves_nothing(run, tiny_base, tmp_path, out, name):
    for path in tiny_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][5, 3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = set(tmp_path.iterdir())
    code, _, error = run("quantize", tmp_path, "--out", out)
    assert code == 2 and f"{name}: the tensor" in error and "holds infinities or nans" in error
    assert set(tmp_path.iterdir()) == before


def test_a_disk_that_fails_leaves_nothing(run, tiny_base, tmp_path, out, monkeypatch):
    from transformers import PreTrainedModel

    def fail(self, folder, **how):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    code, _, error = run("quantize", tiny_base, "--out", out)
    assert code == 2 and "No space left on device" in error and not list(tmp_path.iterdir())


def test_another_quantisation_is_told_from_the_config(run, tiny_base, tmp_path, out):
    config = json.loads((tiny_base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    code, _, error = run("quantize", tmp_path, "--out", out)
    assert code == 2 and "quantised by 'gptq', which isn't read here" in error


# --- the other verbs ---


def test_eval_reads_a_base_in_4_bits_either_way(run, data, tiny_base, out, only_json):
    run("quantize", tiny_base, "--out", out)
    args = ["eval", "--data", data, "--dtype", "float32", "--max-length", 64, "--json"]
    dense = only_json(run(*args, "--model", tiny_base)[1])
    at_once = only_json(run(*args, "--model", tiny_base, "--quantization", "nf4")[1])
    stored = only_json(run(*args, "--model", out)[1])
    assert at_once["loss"] == stored["loss"] != dense["loss"]
    code, _, error = run(*args, "--model", out, "--quantization", "nf4")
    assert code == 2 and "quantised already" in error


def test_an_adapter_trained_in_4_bits_fits_the_stored_and_the_dense_base(
    run, data, tiny_base, tmp_path, out, only_json
):
    run("quantize", tiny_base, "--out", out)
    args = ["train", "--data", data, "--max-steps", 2, "--max-length", 64, "--json", "--learning-rate", 1e-3]
    code, text, _ = run(*args, "--model", tiny_base, "--quantization", "nf4", "--out", tmp_path / "run")
    summary = only_json(text)
    dense = load_base(tiny_base)[0]
    assert code == 0 and summary["base_bytes"] < sum(p.nbytes for p in dense.parameters())
    assert summary["total_parameters"] - summary["trainable_parameters"] == dense.num_parameters()
    for model in (tiny_base, out):
        evaluated = run("eval", "--data", data, "--max-length", 64, "--model", model, "--adapter", tmp_path / "run")
        assert evaluated[0] == 0, evaluated
    assert run("compare", "--data", data, "--adapter", tmp_path / "run", "--quantization", "nf4", "--n", 1)[0] == 0
    code, _, error = run(*args, "--model", tiny_base, "--out", tmp_path / "run", "--resume")
    assert code == 2 and "--quantization nf4 → none" in error


def test_full_fine_tuning_needs_dense_weights(run, data, tiny_base, tmp_path, out):
    run("quantize", tiny_base, "--out", out)
    args = ["train", "--data", data, "--full", "--out", tmp_path / "run", "--max-length", 64]
    for more, message in (
        (["--model", tiny_base, "--quantization", "nf4"], "--full --quantization nf4: weights in 4 bits can't train"),
        (["--model", out], "its weights are in 4 bits and can't train"),
    ):
        code, _, error = run(*args, *more)
        assert code == 2 and message in error and not (tmp_path / "run").exists()


def test_modules_lists_a_quantised_base(run, tiny_base, out, only_json):
    run("quantize", tiny_base, "--out", out)
    one, two = (only_json(run("modules", model, "--json")[1]) for model in (tiny_base, out))
    assert one | {"model": 0} == two | {"model": 0}
