"""Nothing is kept before it was compared; without llama.cpp the file is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from deltaw.adapters.gguf_format import Plan, export, export_adapter, export_merged, write_model_gguf
from deltaw.adapters.parity import reference_ids, reference_logits
from deltaw.errors import UserError

from .conftest import Tokenizers, adapt, small


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "has_llama", lambda: False)


def test_an_adapter_is_read_back_and_the_model_stays(tokenizers: Tokenizers, tmp_path: Path) -> None:
    model, tokenizer = adapt(small("llama")), tokenizers()
    ids = reference_ids(tokenizer)
    before_TV = reference_logits(model, ids)
    done = export_adapter(model, tokenizer, Plan(out=tmp_path / "a.gguf", modelfile=True))
    assert torch.equal(reference_logits(model, ids), before_TV)
    assert done.by == "the file, read back"
    assert done.parity.max_logit_difference == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.Modelfile", "a.gguf", "a.parity.json"]
    told = json.loads((tmp_path / "a.parity.json").read_text())
    assert told["passed"]
    assert (told["step"], told["by"], told["alpha"]) == ("export", done.by, 8)


def test_a_merged_model_is_read_back(tokenizers: Tokenizers, tmp_path: Path) -> None:
    done = export_merged(adapt(small("gemma2")), tokenizers("sentencepiece"), Plan(out=tmp_path / "m.gguf"))
    assert done.parity.max_logit_difference < 1e-4
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_what_says_something_else_is_not_kept(
    write: Any, tokenizers: Tokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_permutation(tensor: torch.Tensor, heads: int) -> torch.Tensor:
        return tensor

    monkeypatch.setattr("deltaw.adapters.gguf_format.layout._halves_to_pairs", without_permutation)
    (tmp_path / "x.gguf").write_text("the old one")
    with pytest.raises(UserError, match="does not say what its source says"):
        write(adapt(small("llama")), tokenizers(), Plan(out=tmp_path / "x.gguf", modelfile=True))
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_text() == "the old one"
    done = write(adapt(small("llama")), tokenizers(), Plan(out=tmp_path / "x.gguf", allow_loss=True))
    assert json.loads((tmp_path / "x.parity.json").read_text())["passed"] is False
    assert done.tolerance.violations(done.parity)


def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none(tokenizers: Tokenizers, tmp_path: Path) -> None:
    model = adapt(small("gemma2"), target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="no head apart from the embedding"):
        export_merged(model, tokenizers("sentencepiece"), Plan(out=tmp_path / "m.gguf"))
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_not_zero_is_joined_in(tokenizers: Tokenizers, tmp_path: Path) -> None:
    model = adapt(small("llama"), init_lora_weights="pissa")
    done = export_adapter(model, tokenizers(), Plan(out=tmp_path / "a.gguf"))
    assert done.facts["alpha"] == 16  # rank 8 of two halves, scaling 2
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


def test_a_tokenizer_with_an_unknown_cut_is_refused(tokenizers: Tokenizers, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tokenizers(template="unknown cut")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no known name in llama"):
        export_merged(adapt(small("llama")), tokenizer, Plan(out=tmp_path / "m.gguf"))


def test_a_base_file_that_cuts_text_otherwise_is_remarked_on(
    tokenizers: Tokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_gguf(tmp_path / "base.gguf", small("llama"), tokenizers("smollm"))
    monkeypatch.setattr(export, "_own_file", lambda model: str(tmp_path / "base.gguf"))
    plan = Plan(out=tmp_path / "a.gguf", modelfile=True)
    done = export_adapter(adapt(small("llama")), tokenizers("gpt-2"), plan)
    assert "base.gguf cuts text as 'smollm', the tokenizer here as 'gpt-2'" in done.facts["remark"]
    assert done.facts["remark"] in (tmp_path / "a.Modelfile").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])  # of Qwen3 it takes no head_dim
@pytest.mark.filterwarnings("ignore")
def test_transformers_own_reader_finds_the_merged_model(family: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    model, tokenizer = adapt(small(family)), tokenizers()
    expected_TV = reference_logits(model, reference_ids(tokenizer))
    export_merged(model, tokenizer, Plan(out=tmp_path / "m.gguf"))
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    state = read.state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter, msg=name, rtol=0, atol=1e-6)
    if not family.startswith("gemma"):  # it doesn't take caps, scales and windows from the file
        torch.testing.assert_close(reference_logits(read, reference_ids(tokenizer)), expected_TV, rtol=0, atol=1e-3)
