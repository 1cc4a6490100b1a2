"""An adapter's file without llama.cpp: back and forth, what is refused, and what a file may not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.adapters.gguf_format import (
    Factors,
    Layout,
    factors_of,
    read_adapter_gguf,
    read_model_gguf,
    stored_of,
    with_one_alpha,
    write_adapter_gguf,
    write_model_gguf,
)
from deltaw.adapters.gguf_format.layout import _halves_to_pairs, _pairs_to_halves
from deltaw.adapters.peft_format import load_adapter, read_adapter, write_adapter
from deltaw.errors import UserError
from deltaw.nn.walk import adapted_layers

from .conftest import FAMILIES, Tokenizers, adapt, small

LLAMA = small("llama")
MODULES = [name for name, _ in LLAMA.named_modules() if name.endswith(("_proj", "lm_head", "embed_tokens"))]


@st.composite
def some_factors(draw: st.DrawFn) -> dict[str, Factors]:
    """Factors of one to four modules, with ranks of their own and one α."""
    seed, alpha = draw(st.integers(0, 1000)), draw(st.floats(0.0625, 64, width=32))
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True)):
        n, k = LLAMA.get_parameter(f"{module}.weight").shape
        if is_embedding := module.endswith("embed_tokens"):
            n, k = k, n
        rank = draw(st.integers(1, 9))
        a_RK, b_NR = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
        out[module] = Factors(a_RK, b_NR, alpha / rank, is_embedding)
    return out


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factors=some_factors())
def test_export_then_import_is_the_identity(factors: dict[str, Factors], tmp_path: Path) -> None:
    layout = Layout(LLAMA)
    ready, alpha, num_rescaled = with_one_alpha(factors, rescale=False)
    write_adapter_gguf(tmp_path / "a.gguf", ready, alpha, layout)
    back = read_adapter_gguf(tmp_path / "a.gguf", layout)
    assert num_rescaled == 0
    assert back.keys() == factors.keys()
    for module, f in factors.items():
        assert torch.equal(back[module].a_RK, f.a_RK)
        assert torch.equal(back[module].b_NR, f.b_NR)
        assert back[module].scaling == pytest.approx(f.scaling, rel=1e-6)
        assert back[module].is_embedding == f.is_embedding


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factors=some_factors(), scalings=st.lists(st.floats(0.01, 100), min_size=4, max_size=4))
def test_one_alpha_keeps_every_product(factors: dict[str, Factors], scalings: list[float]) -> None:
    mixed = {
        m: Factors(f.a_RK, f.b_NR, s, f.is_embedding) for (m, f), s in zip(factors.items(), scalings, strict=False)
    }
    ready, alpha, _ = with_one_alpha(mixed, rescale=True)
    for module, f in mixed.items():
        one = ready[module]
        torch.testing.assert_close(delta(one), delta(f), rtol=1e-5, atol=1e-6 * f.scaling)
        assert one.alpha == pytest.approx(alpha, rel=1e-6)


def delta(f: Factors) -> Tensor:
    return f.scaling * (f.b_NR.double() @ f.a_RK.double())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_adapter_is_an_adapter_in_pefts_form(family: str, tmp_path: Path) -> None:
    model = adapt(small(family), use_rslora=True)
    layout = Layout(model)
    factors, alpha, _ = with_one_alpha(factors_of(model, "adapter", layout), rescale=False)
    write_adapter_gguf(tmp_path / "a.gguf", factors, alpha, layout)
    folder = tmp_path / "peft"
    folder.mkdir()
    write_adapter(stored_of(tmp_path / "a.gguf", read_adapter_gguf(tmp_path / "a.gguf", layout)), folder)
    other = small(family)
    load_adapter(other, read_adapter(folder), "back")
    ours, theirs = dict(adapted_layers(model)), dict(adapted_layers(other))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        torch.testing.assert_close(layer.adapter("adapter").delta(), theirs[name].adapter("back").delta())


@pytest.mark.parametrize("family", FAMILIES)
def test_model_then_back_is_the_identity(family: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    model, other = small(family), small(family)
    write_model_gguf(tmp_path / "m.gguf", model, tokenizers(), outtype="f32")
    for parameter in other.parameters():
        parameter.data.zero_()
    read_model_gguf(tmp_path / "m.gguf", other)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, msg=name, rtol=0, atol=1e-6)


@given(heads=st.integers(1, 5), half=st.integers(1, 4))
def test_rows_go_to_pairs_and_back(heads: int, half: int) -> None:
    rows_NK = torch.arange(heads * 2 * half * 3).view(-1, 3)
    paired_NK = _halves_to_pairs(rows_NK, heads)
    assert torch.equal(_pairs_to_halves(paired_NK, heads), rows_NK)
    assert torch.equal(paired_NK[1], rows_NK[half])  # the first of the second half is the neighbour of the first


def test_alpha_of_rslora_needs_no_rescaling() -> None:
    model = adapt(small("llama"), use_rslora=True, r=9, lora_alpha=12)
    factors, alpha, num_rescaled = with_one_alpha(factors_of(model, "adapter", Layout(model)), rescale=False)
    assert (alpha, num_rescaled) == (36, 0)  # 12/√9 = 36/9
    assert all(
        torch.equal(f.b_NR, dict(adapted_layers(model))[m].adapter("adapter").lora_B) for m, f in factors.items()
    )


def test_several_scalings_are_refused_with_the_remedy() -> None:
    model = adapt(small("llama"), alpha_pattern={"v_proj": 3})
    with pytest.raises(UserError, match=r"one alpha.*v_proj.*--rescale"):
        with_one_alpha(factors_of(model, "adapter", Layout(model)), rescale=False)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("llama", dict(use_dora=True), "DoRA"),
        ("qwen2", dict(bias="all"), "biases"),
        ("llama", dict(modules_to_save=["lm_head"]), r"modules_to_save \(lm_head\)"),
        ("llama", dict(trainable_token_indices=[3, 4]), "trainable tokens"),
        ("qwen2", dict(target_modules=["lm_head"]), r"tied.*lm_head"),
        ("qwen2", dict(target_modules=["embed_tokens"]), r"tied.*embed_tokens"),
        ("gemma", dict(target_modules=["embed_tokens"]), r"tied.*embed_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_what_no_such_file_can_hold_is_refused_by_name(family: str, options: dict[str, Any], named: str) -> None:
    model = adapt(small(family), **options)
    with pytest.raises(UserError, match=f"can't hold .*{named}.*gguf-merged"):
        factors_of(model, "adapter", Layout(model))


def test_everything_that_does_not_fit_is_in_one_message() -> None:
    model = adapt(small("qwen2"), use_dora=True, bias="lora_only")
    with pytest.raises(UserError, match=r"DoRA.*biases"):
        factors_of(model, "adapter", Layout(model))


def write_raw(path: Path, tensors: dict[str, tuple[int, ...]], *, kind: str = "adapter", arch: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        ({"blk.9.attn_q.weight.lora_a": (2, 64)}, {}, "blk.9.attn_q.weight.lora_a belongs to nothing"),
        ({"blk.0.attn_q.weight": (64, 64)}, {}, "belongs to nothing"),
        ({"blk.0.attn_q.weight.lora_a": (2, 64)}, {}, "only one of lora_a and lora_b"),
        ({"blk.0.attn_q.weight.lora_a": (2, 64), "blk.0.attn_q.weight.lora_b": (64, 3)}, {}, "no factors"),
        ({}, dict(kind="model"), "not a LoRA adapter"),
        ({}, dict(arch="qwen2"), "an adapter for 'qwen2', and the model is 'llama'"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(tensors: Any, options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_adapter_gguf(write_raw(tmp_path / "a.gguf", tensors, **options), Layout(LLAMA))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 32, b"PK\x03\x04" * 20])
def test_a_damaged_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gguf"):
        read_adapter_gguf(tmp_path / "a.gguf", Layout(LLAMA))


def test_values_too_large_for_the_format_are_refused(tmp_path: Path) -> None:
    factors = {MODULES[1]: Factors(torch.full((2, 64), 1e6), torch.ones(64, 2), 1.0)}
    with pytest.raises(UserError, match=r"attn_q.*too large for F16"):
        write_adapter_gguf(tmp_path / "a.gguf", factors, 2.0, Layout(LLAMA), outtype="f16")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", dict(query_pre_attn_scalar=256), "query_pre_attn_scalar 256"),
        ("llama", dict(hidden_act="relu"), "activation 'relu'"),
        ("llama", dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope_type 'longrope'"),
        ("llama", dict(model_type="gpt2"), "knows llama"),
    ],
)
def test_a_config_that_llama_cpp_would_compute_otherwise_is_refused(family: str, changes: Any, said: str) -> None:
    model = small(family)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(UserError, match=said):
        Layout(model)


def test_a_model_with_adapters_is_not_written_as_its_base(tokenizers: Tokenizers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merge them first"):
        write_model_gguf(tmp_path / "m.gguf", adapt(small("llama")), tokenizers())
