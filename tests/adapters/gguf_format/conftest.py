"""Small models of every family, real tokenizers of a few hundred tokens, and adapters that change what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from deltaw import LoraConfig, get_peft_model
from deltaw.adapters.parity import reference_text
from deltaw.nn.walk import adapted_layers

Tokenizers = Callable[..., PreTrainedTokenizerBase]
ROWS = 560
"""Of the embedding: more than there are tokens, as in Qwen's."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|unk|>", "<|im_start|>", "<|im_end|>"]
_SIZES = dict(
    vocab_size=ROWS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GEMMA = _SIZES | dict(head_dim=16, query_pre_attn_scalar=16)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_WINDOWS = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama3": lambda: LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, attention_bias=True, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=32, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=32),
    "gemma": lambda: GemmaConfig(**_SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh"),
    "gemma2": lambda: Gemma2Config(**_GEMMA, **_WINDOWS, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, **_WINDOWS),
}
FAMILIES = tuple(_CONFIGS)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _split(_QWEN),
    "llama-bpe": lambda: _split(_QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)),
}
CUTS = tuple(_CUTS)


def _split(expression: str) -> Any:
    cut = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_tokenizer(kind: str = "gpt-2", *, template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the reference text: byte-level with a cut of that name, or ``sentencepiece``."""
    if kind == "sentencepiece":
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token=_SPECIAL[0], fuse_unk=True))
        inner.normalizer = normalizers.Replace(" ", "▁")
        trainer = trainers.BpeTrainer(vocab_size=540, special_tokens=[*_SPECIAL, *bytes_], show_progress=False)
        inner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
        inner.train_from_iterator([reference_text()], trainer)
        told = inner.to_str()
        inner = Tokenizer.from_str(told)
        inner = _without_byte_marks(inner, bytes_)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{_SPECIAL[1]} $A", special_tokens=[(_SPECIAL[1], 1)]
        )
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = _CUTS[kind]()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=540, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator([reference_text()], trainer)
        inner.decoder = decoders.ByteLevel()
    unk, bos, eos = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _without_byte_marks(tokenizer: Tokenizer, bytes_: list[str]) -> Tokenizer:
    """Bytes were reserved as special tokens; they are ordinary pieces."""
    import json

    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(told))


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    """``tokenizers("qwen2")``; each kind is trained once."""
    made: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}

    def get(kind: str = "gpt-2", *, template: str | None = CHATML) -> PreTrainedTokenizerBase:
        key = (kind, template)
        made[key] = made.get(key) or make_tokenizer(kind, template=template)
        return made[key]

    return get


def small(family: str, **changes: Any) -> PreTrainedModel:
    """A random model whose every parameter matters: norms aren't one, biases aren't zero."""
    torch.manual_seed(0)
    config = _CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data *= 4
    return model


def adapt(model: PreTrainedModel, *, strength: float = 0.1, name: str = "adapter", **options: Any) -> PreTrainedModel:
    """With a trained-looking adapter; the same object."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    get_peft_model(model, LoraConfig(**options), adapter_name=name)
    for _, layer in adapted_layers(model):
        if name in layer.adapters:
            layer.adapter(name).lora_B.data.normal_(std=strength)
            if torch.count_nonzero(layer.adapter(name).lora_A) == 0:  # an embedding's starts the other way round
                layer.adapter(name).lora_A.data.normal_(std=strength)
    return model
