"""One small model adapted twice, here and by real PEFT, with equal factors, every B non-zero."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import deltaw
from deltaw.adapters.peft_format import adapter_tensors


@dataclass
class Twins:
    """Our model and PEFT's."""

    ours: deltaw.PeftModel
    theirs: peft.PeftModel

    def trainable(self, which: str) -> dict[str, Tensor]:
        """Trainable parameters under the names of the adapter's file."""
        if which == "ours":
            own = {id(t): t for t in self.ours.parameters() if t.requires_grad}
            by_storage = {t.data_ptr(): t for t in own.values()}
            return {k: by_storage[t.data_ptr()] for k, t in adapter_tensors(self.ours.get_base_model()).items()}
        named = ((n, p) for n, p in self.theirs.named_parameters() if p.requires_grad)
        return {re.sub(r"\.modules_to_save|\.default|(?<=vector)\.weight|(?<=vector\.default)\.weight", "", n): p
                for n, p in named}  # fmt: skip

    def check_logits_and_gradients(self, ids: Tensor) -> None:
        """Both compute the same logits, and the same gradient of every trainable tensor, none of them zero."""
        logits = []
        for model in (self.ours, self.theirs):
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            logits.append(out.logits)
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
        ours, theirs = self.trainable("ours"), self.trainable("theirs")
        for key, parameter in ours.items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
            torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-5, rtol=1e-5, msg=key)


@pytest.fixture
def twins(tiny: Callable[..., PreTrainedModel]) -> Callable[..., Twins]:
    """``twins("llama", r=4, …)``: the same base and the same random adapter, here and in PEFT."""

    def make(architecture: str, *, dtype: torch.dtype = torch.float32, **config: object) -> Twins:
        models = [tiny(architecture, dtype=dtype) for _ in range(2)]
        for model in models:
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():  # biases start at zero, where nothing shows
                if name.endswith("bias"):
                    parameter.data.normal_(generator=generator).mul_(0.1)
        pair = Twins(
            deltaw.get_peft_model(models[0], deltaw.LoraConfig(**config)),
            peft.get_peft_model(models[1], peft.LoraConfig(**config)),
        )
        ours, theirs = pair.trainable("ours"), pair.trainable("theirs")
        assert ours.keys() == theirs.keys()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, mine in ours.items():
                mine.add_(torch.randn(mine.shape, generator=generator), alpha=0.1)
                theirs[name].copy_(mine)
        return pair

    return make


@pytest.fixture
def folder(saved):
    """A tiny base in transformers' format, its tokenizer without a padding token."""
    return saved("llama", "base")


@pytest.fixture
def saved(tiny, tmp_path):
    """``saved("gpt2")``: a folder with that small model and a tokenizer; its name may be given."""
    return lambda architecture, name=None, **how: _saved(tiny(architecture), tmp_path / (name or architecture), **how)


@pytest.fixture
def tokenizer_into():
    """``tokenizer_into(folder)``: a tokenizer of 97 words, without a padding token."""
    return _tokenizer_into


def _saved(model, path, **how):
    model.save_pretrained(path, **how)
    _tokenizer_into(path)
    return path


def _tokenizer_into(path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2", unk_token="w0"
    )
    tokenizer.save_pretrained(path)


@pytest.fixture
def pickled(folder):
    """The same base with its weights as a pickle, as older repositories have them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder
