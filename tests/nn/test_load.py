"""Bases from folders, GGUF and nowhere: what loads is whole, and what doesn't says why."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw import load_base
from deltaw.errors import UserError
from deltaw.nn.load import base_bytes, base_info, cache_folder, load_tokenizer, skeleton


def test_a_folder_goes_round(folder, tiny, ids):
    model, tokenizer = load_base(folder)
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    info = base_info(model)
    assert info.name == str(folder) and len(info.sha256) == 64
    assert base_bytes(model) == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert (tokenizer.pad_token, len(tokenizer)) == ("w2", 97)
    assert model.get_input_embeddings().weight.shape[0] == 97


def test_the_hash_is_that_of_the_weights_whatever_they_are_loaded_in(folder):
    hashes = {base_info(load_base(folder, dtype=dtype)[0]).sha256 for dtype in ("float32", "bfloat16", torch.bfloat16)}
    assert len(hashes) == 1
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert {base_info(load_base(folder)[0]).sha256} != hashes


def test_dtypes(folder):
    assert load_base(folder)[0].dtype == torch.float32
    assert load_base(folder, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    model, _ = load_base(folder)
    model.half().save_pretrained(folder)
    assert load_base(folder)[0].dtype == torch.bfloat16  # float16 is for CUDA


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(dtype="int8"), "dtype='int8': expected auto, float32, bfloat16, float16"),
        (dict(dtype="float16", device="cpu"), "dtype='float16' is for CUDA"),
        (dict(quantization="nf3"), "quantization='nf3'"),
        (dict(device="toaster"), "device='toaster': not on this machine"),
        (dict(device="cuda:7"), "device='cuda:7': not on this machine"),
    ],
)
def test_bad_options(folder, given, message):
    with pytest.raises(UserError, match=message):
        load_base(folder, **given)


def test_pickled_weights_are_read(pickled, tiny, ids):
    (pickled / "training_args.bin").write_bytes(b"something else")
    model, _ = load_base(pickled)
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert base_info(model).files == (pickled / "pytorch_model.bin",)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_pickle_that_would_run_something_is_refused(pickled, monkeypatch):
    monkeypatch.chdir(pickled)
    torch.save({"model.norm.weight": _Evil()}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be loaded as a language model"):
        load_base(pickled)
    assert not (pickled / "evil").exists()


def _write(path, text):
    path.write_text(text)


DAMAGE = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "can't be loaded"),
    "config not JSON": (lambda f: _write(f / "config.json", "{"), "can't be loaded"),
    "config a list": (lambda f: _write(f / "config.json", "[]"), "can't be loaded"),
    "config empty": (lambda f: _write(f / "config.json", "{}"), "can't be loaded"),
    "unknown architecture": (lambda f: _write(f / "config.json", '{"model_type": "zzz"}'), "can't be loaded"),
    "not a language model": (lambda f: _write(f / "config.json", '{"model_type": "vit"}'), "can't be loaded"),
    "code of its own": (
        lambda f: _write(f / "config.json", '{"model_type": "zzz", "auto_map": {"AutoConfig": "evil.Config"}}'),
        "can't be loaded",
    ),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "can't be loaded"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "can't be loaded",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "can't be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_the_users_mistake(folder, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    started = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        load_base(folder)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 5  # transformers asks, and waits, before it would run foreign code


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", ["many", -1, None, []])
def test_a_config_with_nonsense_in_it(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=r"can't be loaded|lacks"):
        load_base(folder)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_missing_or_do_not_fit_are_never_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    cut = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*layers.1.mlp.up_proj.weight.*they would be random"):
        load_base(folder)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit|can't be loaded"):
        load_base(folder)


def test_an_adapter_is_not_a_base(folder, tmp_path):
    model = deltaw.get_peft_model(load_base(folder)[0], deltaw.LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter, not a base model; give the base"):
        load_base(tmp_path / "adapter")


def test_a_file_that_is_not_gguf(folder):
    with pytest.raises(UserError, match="a file; expected a folder"):
        load_base(folder / "config.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 100, b"x" * 1000])
def test_a_damaged_gguf_file(tmp_path, monkeypatch, content):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"m.gguf: not readable as GGUF"):
        load_base(tmp_path / "m.gguf")
    assert not list(cache_folder().glob("*"))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_copy_of_the_real_gguf_file(real_base, tmp_path, monkeypatch):
    (whole,) = base_info(real_base[0]).files
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    with whole.open("rb") as source, (tmp_path / "cut.gguf").open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(5_000_000)
    with pytest.raises(UserError, match=r"cut.gguf: not readable as GGUF"):
        load_base(tmp_path / "cut.gguf")


@pytest.mark.real
def test_the_real_base(real_base):
    model, tokenizer = real_base
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.pad_token is not None and len(tokenizer) == model.config.vocab_size
    assert base_info(model).name == "smollm2-135m"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in text


def test_a_tokenizer_alone_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    tokenizer, config = load_tokenizer(folder)
    assert (tokenizer.pad_token, len(tokenizer), config.hidden_size) == ("w2", 97, 32)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="its tokenizer or config can't be loaded"):
        load_tokenizer(folder)


@pytest.mark.real
def test_a_gguf_files_tokenizer_is_read_without_converting_it(real_base, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    tokenizer, config = load_tokenizer("smollm2-135m")
    assert not (tmp_path / "cache").exists()
    assert tokenizer.get_vocab() == real_base[1].get_vocab()
    assert tokenizer.chat_template == real_base[1].chat_template
    assert config.max_position_embeddings == real_base[0].config.max_position_embeddings


def test_a_skeleton_has_names_and_shapes_but_no_weights(folder, tiny):
    (folder / "model.safetensors").unlink()
    bare = skeleton(folder)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    shapes = {n: p.shape for n, p in tiny().named_parameters()}
    assert {n: p.shape for n, p in bare.named_parameters()} == shapes
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a language model's config"):
        skeleton(folder)
