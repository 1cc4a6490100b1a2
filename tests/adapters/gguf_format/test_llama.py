"""llama.cpp itself reads what was written, and says what transformers says."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.adapters.gguf_format import Plan, export_adapter, export_merged, write_model_gguf
from deltaw.adapters.gguf_format.check import open_llama
from deltaw.errors import UserError

from .conftest import CUTS, FAMILIES, Tokenizers, adapt, small

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which wants a C++ compiler: make llama")

NUM_TOKENS = 32


def tokenizer_kind(family: str) -> str:
    return "sentencepiece" if family.startswith(("gemma", "mistral")) else "gpt-2"


def bound(family: str) -> float:
    """Of the logits' difference: ggml's GELU is a table of float16 numbers."""
    return 5e-3 if family.startswith("gemma") else 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_of_every_family_says_the_same(family: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    done = export_merged(adapt(small(family)), tokenizers(tokenizer_kind(family)), Plan(out=tmp_path / "m.gguf"))
    assert done.by.startswith("llama.cpp")
    assert done.parity.equal_greedy == 1
    assert done.parity.max_logit_difference < bound(family)
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_of_every_family_says_the_same(family: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    done = export_adapter(adapt(small(family)), tokenizers(tokenizer_kind(family)), Plan(out=tmp_path / "a.gguf"))
    assert done.by.startswith("llama.cpp")
    assert done.parity.equal_greedy == 1
    assert done.parity.max_logit_difference < bound(family)
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("cut", CUTS)
def test_every_way_to_cut_text_gives_the_same_tokens(cut: str, tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tokenizers(cut)
    write_model_gguf(tmp_path / "m.gguf", small("llama"), tokenizer, outtype="f32")
    text = "It's 12345 o'clock: DON'T\n\n  x = [1, 2]; naïve façade – 東京 \t🙂\r\n"
    with closing(open_llama(tmp_path / "m.gguf")) as llama:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer(text)["input_ids"]
        chat = "<|im_start|>user\nHello<|im_end|>\n"
        assert llama.tokenize(chat.encode(), add_bos=False, special=True) == tokenizer(chat)["input_ids"]


def test_sentencepiece_gives_the_same_tokens_with_bos(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tokenizers("sentencepiece")
    write_model_gguf(tmp_path / "m.gguf", small("gemma"), tokenizer, outtype="f32")
    text = "It's 12345 o'clock:  naïve façade – 東京 \n 🙂"
    with closing(open_llama(tmp_path / "m.gguf")) as llama:
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text)["input_ids"]


def test_adapter_of_an_embedding_beside_a_head_of_its_own(tokenizers: Tokenizers, tmp_path: Path) -> None:
    model = adapt(small("llama"), target_modules=["embed_tokens", "lm_head", "q_proj"], strength=0.5)
    done = export_adapter(model, tokenizers(), Plan(out=tmp_path / "a.gguf"))
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


def test_scalings_that_differ_are_folded_into_b(tokenizers: Tokenizers, tmp_path: Path) -> None:
    model = adapt(small("qwen2"), use_rslora=True, rank_pattern={"v_proj": 7}, alpha_pattern={"o_proj": 3})
    done = export_adapter(model, tokenizers(), Plan(out=tmp_path / "a.gguf", rescale=True))
    assert done.facts["rescaled_modules"] == 4
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("outtype", "least"), [("f16", 0.98), ("bf16", 0.9), ("q8_0", 0.9)])
def test_smaller_numbers(outtype: Any, least: float, tokenizers: Tokenizers, tmp_path: Path) -> None:
    merged = export_merged(adapt(small("llama")), tokenizers(), Plan(out=tmp_path / "m.gguf", outtype=outtype))
    alone = export_adapter(adapt(small("llama")), tokenizers(), Plan(out=tmp_path / "a.gguf", outtype=outtype))
    assert min(merged.parity.equal_greedy, alone.parity.equal_greedy) >= least


def test_what_an_adapter_file_cannot_hold_goes_into_a_merged_one(tokenizers: Tokenizers, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(use_dora=True, bias="lora_only", target_modules=["q_proj", "down_proj"])
    model = adapt(small("qwen2"), **options, modules_to_save=["lm_head"])
    saved = model.get_output_embeddings().copies["adapter"]  # type: ignore[operator,union-attr]
    saved.weight.data += 0.1 * torch.randn_like(saved.weight)
    done = export_merged(model, tokenizers(), Plan(out=tmp_path / "m.gguf"))
    assert done.parity.kept_effect == pytest.approx(1, abs=1e-3)


@pytest.mark.real
def test_real_model_gives_the_greedy_tokens_of_transformers(
    real_base: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    base, tokenizer = real_base
    model = adapt(copy.deepcopy(base), strength=0.02)
    chat = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    expected = greedy_by_transformers(model, prompt)
    assert greedy_by_transformers(base, prompt) != expected, "the adapter must matter"

    alone = export_adapter(model, tokenizer, Plan(out=tmp_path / "a.gguf", with_base=True))
    assert greedy_by_llama(tmp_path / "a-base.gguf", prompt, tmp_path / "a.gguf") == expected
    assert greedy_by_llama(tmp_path / "a-base.gguf", prompt) != expected
    (tmp_path / "a-base.gguf").unlink()

    merged = export_merged(model, tokenizer, Plan(out=tmp_path / "m.gguf"))
    assert greedy_by_llama(tmp_path / "m.gguf", prompt) == expected
    for done in (alone, merged):
        assert done.parity.equal_greedy == 1
        assert done.parity.max_logit_difference < 1e-3


def greedy_by_transformers(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS)
    return out[0, len(prompt) :].tolist()


def greedy_by_llama(path: Path, prompt: list[int], lora: Path | None = None) -> list[int]:
    with closing(open_llama(path, lora, context=256)) as llama:
        out: list[int] = []
        llama.eval(prompt)
        while len(out) < NUM_TOKENS:
            out.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            if out[-1] == llama.token_eos():
                break
            llama.eval(out[-1:])
        return out


def test_an_adapter_needs_no_tokenizer_that_gguf_has_words_for(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tokenizers(template="a copy of its own")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    done = export_adapter(adapt(small("llama")), tokenizer, Plan(out=tmp_path / "a.gguf", modelfile=True))
    assert done.by.startswith("the file, read back (not by llama.cpp: the tokenizer cuts text")
    with pytest.raises(UserError, match="no known name"):
        export_adapter(adapt(small("llama")), tokenizer, Plan(out=tmp_path / "b.gguf", with_base=True))
    assert not (tmp_path / "b.gguf").exists()
