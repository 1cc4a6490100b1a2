"""Loading in 4 bits, from dense files and from quantised ones, ours and bitsandbytes'."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from deltaw.errors import UserError
from deltaw.nn import bnb, load
from deltaw.nn.load import base_info, load_base
from deltaw.nn.load_quantized import load_quantized
from deltaw.nn.quantized import QuantizedLinear, num_quantized, quantized_modules
from deltaw.nn.save_quantized import save_quantized
from deltaw.ops.nf4 import QuantizedScales
from deltaw.ops.quantized import METHODS, Method

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "gemma2", "opt", "phi3", "qwen3_moe"]


def through_bitsandbytes(folder, kind="nf4", *, double=True, dtype=torch.float32):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def logits_of(model, ids):
    bnb.keep_differentiable(model)  # bitsandbytes' repacked layout is coarser
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_same_codes(ours, theirs):
    """Every layer of bitsandbytes' is one of ours, with the same codes and scales."""
    layers = {name: m for name, m in theirs.named_modules() if bnb.is_4bit(m)}
    mine = dict(quantized_modules(ours))
    assert mine.keys() == layers.keys() and mine
    for name, module in mine.items():
        q, state = module.quantized, layers[name].weight.quant_state
        assert torch.equal(q.packed, layers[name].weight.data.view(-1)), name
        assert tuple(q.shape) == tuple(state.shape) and q.dtype == state.dtype
        if isinstance(q.scales, QuantizedScales):
            assert torch.equal(q.scales.codes, state.absmax) and torch.equal(q.scales.absmax, state.state2.absmax)
            assert torch.equal(q.scales.offset, state.offset)
        else:
            assert torch.equal(q.scales, state.absmax)


def edited(folder, **changes):
    """The folder with other tensors in it: a function of the old one each, or None to leave one out."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        key = next(k for k in tensors if name in k) if name not in tensors else name
        new = change(tensors[key]) if callable(change) else change
        tensors |= {key: new.contiguous()} if new is not None else {}
        if new is None:
            del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- the same as bitsandbytes ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore::DeprecationWarning:bitsandbytes")
def test_layers_codes_and_scales_are_bitsandbytes(saved, architecture):
    folder = saved(architecture)
    ours, theirs = load_base(folder, quantization="nf4")[0], through_bitsandbytes(folder)
    assert_same_codes(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore::DeprecationWarning:bitsandbytes")
def test_either_reads_what_the_other_wrote(wide_base, tokenizer_into, ids, tmp_path, kind, dtype):
    method, folder = METHODS[kind], tmp_path / "dense"
    shutil.copytree(wide_base, folder)  # of whole blocks: of others bitsandbytes' processor kernel makes wrong products
    tokenizer_into(folder)
    theirs = through_bitsandbytes(folder, method.kind, double=method.double, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    ours, tokenizer = load_base(folder, quantization=kind, dtype=dtype)
    save_quantized(ours, tokenizer, tmp_path / "ours")
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == "float32" else dict(atol=0.02, rtol=0.02)

    read, _ = load_base(tmp_path / "theirs")
    assert_same_codes(read, theirs)
    torch.testing.assert_close(logits_of(read, ids), logits_of(theirs, ids), **tolerance)
    torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), **tolerance)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=getattr(torch, dtype))
    assert_same_codes(ours, again)
    torch.testing.assert_close(logits_of(again, ids), logits_of(ours, ids), **tolerance)
    # The files themselves: the same tensors under the same names.
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == two.keys()
    for key in one:
        facts = [json.loads(bytes(t.tolist())) for t in (one[key], two[key])] if "quant_state" in key else [0, 0]
        assert facts[0] == facts[1] and (any(facts) or torch.equal(one[key], two[key])), key


@pytest.mark.parametrize("sizes", [dict(hidden_size=36, head_dim=10), dict(intermediate_size=67)], ids=str)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore::DeprecationWarning:bitsandbytes")
def test_odd_shapes(tmp_path, tokenizer_into, sizes):
    torch.manual_seed(0)
    given = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4) | sizes
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=97, **given)).save_pretrained(tmp_path / "odd")
    tokenizer_into(tmp_path / "odd")
    ours, theirs = load_base(tmp_path / "odd", quantization="nf4")[0], through_bitsandbytes(tmp_path / "odd")
    assert_same_codes(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore::DeprecationWarning:bitsandbytes")
def test_the_way_that_cuda_takes(saved, monkeypatch):
    """There is no CUDA here: the same call to transformers and bitsandbytes, on the CPU."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = {what: load._is_for_bitsandbytes(METHODS.get(what, what), cuda, head=False) for what in
              (*METHODS, "bitsandbytes", "deltaw")}  # fmt: skip
    assert [what for what, is_its in chosen.items() if not is_its] == ["int4", "deltaw"]
    assert not load._is_for_bitsandbytes(METHODS["nf4"], cuda, head=True)
    assert not load._is_for_bitsandbytes(METHODS["nf4"], cpu, head=False)
    folder = saved("llama")
    ours, _ = load_base(folder, quantization="nf4")
    monkeypatch.setattr(load, "_is_for_bitsandbytes", lambda *args, **more: True)
    assert_same_codes(ours, load_base(folder, quantization="nf4", device="cpu")[0])


# --- what is quantised, and what it goes round as ---


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])  # the last two have tied heads
def test_a_quantised_folder_goes_round(saved, ids, tmp_path, architecture, head, kind):
    model, tokenizer = load_base(saved(architecture), quantization=kind, quantize_head=head)
    save_quantized(model, tokenizer, tmp_path / "out", shard_size="10KB")
    again, _ = load_base(tmp_path / "out")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert repr(again) == repr(model) and again.config.quantization_config == model.config.quantization_config
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert base_info(again).sha256 == base_info(model).sha256  # adapters of the one fit the other
    with pytest.raises(UserError, match="quantised already; load it as it is"):
        load_base(tmp_path / "out", quantization="nf4")


def test_a_block_size_of_its_own(saved, ids, tmp_path):
    model, tokenizer = load_base(saved("llama"), quantization=Method(kind="int4", block_size=256))
    save_quantized(model, tokenizer, tmp_path / "out")
    again, _ = load_base(tmp_path / "out")
    assert {m.quantized.block_size for _, m in quantized_modules(again)} == {256}
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_embedding_and_head_stay_dense_unless_asked(saved):
    folder = saved("llama")
    model, _ = load_base(folder, quantization="nf4")
    dense = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Embedding")}
    assert dense == {"lm_head", "model.embed_tokens"}
    assert model.config.quantization_config["llm_int8_skip_modules"] == ["lm_head"]
    model, _ = load_base(folder, quantization="nf4", quantize_head=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.config.quantization_config["llm_int8_skip_modules"] == []


def test_generation_settings_names_and_ways_to_load(saved, ids):
    folder = saved("llama", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    config = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0.3, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(config))
    seen = []
    model, _ = load_base(folder, quantization="nf4", progress=lambda done, total: seen.append((done, total)))
    assert model.generation_config.temperature == 0.3 and model.name_or_path == str(folder)
    assert seen == [(i + 1, 14) for i in range(14)]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and base_info(model).name == str(folder)
    assert load_base(folder, quantization="none")[0].config.to_dict().get("quantization_config") is None


def test_pickled_weights(pickled, ids):
    model, _ = load_base(pickled, quantization="nf4")
    tensors = {name: t.clone() for name, t in load_base(pickled)[0].state_dict().items()}
    (pickled / "pytorch_model.bin").unlink()  # still mapped
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    again, _ = load_base(pickled, quantization="nf4")
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.real
def test_the_real_base_from_gguf_tensor_by_tensor_or_converted(real_base, tmp_path, monkeypatch):
    converted, _ = load_base("smollm2-135m", quantization="nf4-single", dtype="float32")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_base("smollm2-135m", quantization="nf4-single", dtype="float32")
    assert not (tmp_path / "cache").exists()  # nothing was converted
    wanted = converted.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert 8 * sum(m.quantized.nbytes for _, m in quantized_modules(model)) / num_quantized(model) == 4.5
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0]).endswith("is Paris.")


# --- what can't be ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(saved, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(saved("llama"), **{name: lambda t: t.index_fill(0, torch.tensor(3), bad)})
    with pytest.raises(UserError, match=rf"^{name}: the tensor to quantise holds infinities or nans"):
        load_base(folder, quantization="nf4")


def test_a_dense_tensor_that_is_not_finite_is_not_written(saved, tmp_path):
    model, tokenizer = load_base(edited(saved("llama"), **{"model.norm.weight": lambda t: t * float("nan")}),
                                 quantization="nf4")  # fmt: skip
    with pytest.raises(UserError, match=r"^model.norm.weight: the tensor holds infinities or nans"):
        save_quantized(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "quanto", 7, None])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_other_quantisations_are_refused_before_weights_are_read(saved, method, quantization):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UserError, match=rf"quantised by {method!r}, which isn't read here; expected dense"):
        load_base(folder, quantization=quantization)


@pytest.mark.parametrize("declared", [[], 7, "nf4", {}, {"quant_method": []}])
def test_nonsense_in_the_config(saved, declared):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    with pytest.raises(UserError):
        load_base(folder)


def test_there_is_no_such_quantisation(saved):
    with pytest.raises(UserError, match="quantization='nf3': expected none, nf4, nf4-single, fp4, int4"):
        load_base(saved("llama"), quantization="nf3")


@pytest.fixture
def stored(saved, tmp_path):
    model, tokenizer = load_base(saved("llama"), quantization="nf4")
    save_quantized(model, tokenizer, tmp_path / "stored")
    return tmp_path / "stored"


W = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


def _state(**changes):
    def change(tensor):
        facts = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return change


HOSTILE = {
    "codes too short": ({W: lambda t: t[:-1]}, "511 bytes, where a weight of this shape has 512"),
    "codes too long": ({W: lambda t: torch.cat([t, t])}, "1,024 bytes, where"),
    "scales too long": ({f"{W}.absmax": lambda t: torch.cat([t, t])}, "absmax: 32 bytes"),
    "scales of the wrong type": ({f"{W}.absmax": lambda t: t.float()}, "absmax: 64 bytes"),
    "no scales": ({f"{W}.absmax": None}, "missing or unknown"),
    "no outer scales": ({f"{W}.nested_absmax": None}, "missing or unknown"),
    "no state": ({STATE: None}, "codes with 0 quant_state"),
    "scales not finite": ({f"{W}.nested_absmax": lambda t: t * float("nan")}, "holds infinities or nans"),
    "another codebook": ({f"{W}.quant_map": lambda t: t.flip(0)}, "not the levels"),
    "another nested map": ({f"{W}.nested_quant_map": lambda t: t * 2}, "not the levels"),
    "a large state": ({STATE: torch.zeros(10**6, dtype=torch.uint8)}, "not what bitsandbytes writes"),
    "a state not JSON": ({STATE: lambda t: t[:-3]}, "not what bitsandbytes writes"),
    "deep JSON": ({STATE: torch.tensor([91] * 4000, dtype=torch.uint8)}, "not what bitsandbytes writes"),
    "another shape": ({STATE: _state(shape=[64, 16])}, r"the file's is \[64, 16\], the model's layer \[32, 32\]"),
    "a huge shape": ({STATE: _state(shape=[2**39, 2**39])}, "another model"),
    "a negative shape": ({STATE: _state(shape=[-32, -32])}, "shape"),
    "a shape of text": ({STATE: _state(shape="32")}, "shape"),
    "no blocks": ({STATE: _state(blocksize=0)}, "blocks of 0 weights"),
    "an odd block size": ({STATE: _state(blocksize=64.5)}, "blocks of 64.5"),
    "a block size that is almost one": ({STATE: _state(blocksize=64.0)}, "blocks of 64.0"),
    "an offset beyond float32": ({STATE: _state(nested_offset=1e300)}, "nested_offset 1e"),
    "an offset beyond any number": ({STATE: _state(nested_offset=10**400)}, "not what bitsandbytes writes"),
    "another nested block": ({STATE: _state(nested_blocksize=128)}, "not what bitsandbytes writes"),
    "an offset that isn't one": ({STATE: _state(nested_offset="1e999")}, "nested_offset inf"),
    "another kind": ({STATE: _state(quant_type="fp4")}, "quantised as 'fp4'"),
    "another dtype": ({STATE: _state(dtype="int8")}, "int8"),
    "codes dense": ({W: lambda t: torch.zeros(32, 32)}, "4,096 bytes, where"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_damaged_quantised_checkpoint(stored, damage):
    changes, message = HOSTILE[damage]
    with pytest.raises(UserError, match=message) as caught:
        load_base(edited(stored, **changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_codes_where_the_model_has_no_linear_layer(stored):
    parts = {k: v for k, v in load_file(stored / "model.safetensors").items() if k.startswith(W)}
    tensors = load_file(stored / "model.safetensors")
    tensors |= {k.replace(W, "model.norm.weight"): v for k, v in parts.items()}
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight: quantised, where the model has no linear layer"):
        load_base(stored)


def test_quantised_tensors_under_a_dense_config(stored):
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised already"):
        load_base(stored, quantization="nf4")


def test_a_config_that_describes_more_than_the_files_hold(stored):
    config = json.loads((stored / "config.json").read_text()) | {"vocab_size": 10**9}
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"describes 64,000,\d+,\d+ weights, and the files hold"):
        load_base(stored)


def test_an_index_that_leads_elsewhere(saved):
    folder = saved("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for bad in ("../x.safetensors", "/etc/passwd", "gone.safetensors"):
        index.write_text(json.dumps(good | {"weight_map": dict.fromkeys(good["weight_map"], bad)}))
        with pytest.raises(UserError, match="names files that aren't here"):
            load_base(folder, quantization="nf4")
    for bad in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"):
        index.write_text(bad)
        with pytest.raises(UserError, match=r"not an index|names files"):
            load_base(folder, quantization="nf4")


def test_missing_and_misfit_tensors_are_named(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(saved("llama"), **{name: None})
    with pytest.raises(UserError, match=rf"lacks 1 weights.*{name}"):
        load_base(folder, quantization="nf4")
    folder = edited(folder, **{"model.layers.0.mlp.up_proj.weight": lambda t: t[:-1]})
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight: the file's is \[47, 32\], .* \[48, 32\]"):
        load_base(folder, quantization="nf4")
    with pytest.raises(UserError, match="they would be random"):
        load_base(edited(folder, **{"model.layers.0.mlp.up_proj.weight": None}), quantization="nf4")


def test_a_fault_inside_is_no_mistake_of_the_users(saved, monkeypatch):
    def fail(self, w):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Method, "quantize", fail)
    folder = saved("llama")
    from transformers import AutoConfig

    with pytest.raises(ZeroDivisionError, match="ours"):
        load_quantized([folder / "model.safetensors"], AutoConfig.from_pretrained(folder), torch.float32, Method())
