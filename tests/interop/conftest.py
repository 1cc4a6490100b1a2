"""Every architecture under every variant, adapted twice with equal factors: here, and by real PEFT.

A *case* is an architecture and a variant of ``LoraConfig``. ``twins`` builds the pair once for all tests of a case:
the same base, the same adapter with every tensor away from its start, so that no B is zero.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

import deltaw
from deltaw.adapters.peft_format import WEIGHTS_NAME, adapter_tensors
from deltaw.config import CONFIG_NAME
from deltaw.nn.walk import adapted_layers

VOCABULARY = 97
TOKENS = [14, 50, 9]
"""Which the batch below has among its ids."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What an architecture calls its parts."""

    attention: str = "q_proj"
    mlp: str = "up_proj"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str | None = "lm_head"
    all_linear: str | tuple[str, ...] = "all-linear"
    experts: tuple[str, ...] = ()
    """Bare parameters of a mixture of experts."""
    has_biases: bool = False
    head_has_bias: bool = False
    has_default: bool = True
    """Whether PEFT knows which modules to adapt where ``target_modules`` is left out."""


ARCHITECTURES = {
    "llama": Names(),
    "mistral": Names(),
    "qwen2": Names(has_biases=True),
    "qwen3": Names(),
    "gemma2": Names(),
    "gemma3": Names(),
    "phi3": Names(attention="qkv_proj", mlp="gate_up_proj", has_default=False),
    "gpt2": Names(attention="c_attn", mlp="c_fc", embedding="wte", norm="ln_f", has_biases=True),
    "gpt_neox": Names(
        attention="query_key_value",
        mlp="dense_h_to_4h",
        embedding="embed_in",
        norm="final_layer_norm",
        has_biases=True,
    ),
    "opt": Names(mlp="fc1", norm="final_layer_norm", has_biases=True),
    # PEFT takes "all-linear", and names of an MLP's layers, for the fused experts of this family too.
    "qwen3_moe": Names(
        mlp="o_proj",
        experts=("experts.gate_up_proj", "experts.down_proj"),
        all_linear=("q_proj", "k_proj", "v_proj", "o_proj"),
        has_default=False,
    ),
    "bert": Names(
        attention="query",
        mlp="intermediate.dense",
        embedding="word_embeddings",
        norm="embeddings.LayerNorm",
        head=None,
        has_biases=True,
    ),
    "bert_mlm": Names(
        attention="query",
        mlp="intermediate.dense",
        embedding="word_embeddings",
        norm="embeddings.LayerNorm",
        head="decoder",
        has_biases=True,
        head_has_bias=True,
    ),
    "t5": Names(attention="q", mlp="wi_0", embedding="encoder.embed_tokens", norm="final_layer_norm"),
}
DECODERS = [name for name in ARCHITECTURES if name not in ("bert", "bert_mlm", "t5")]


def _rows(names: Names, **config: Any) -> dict[str, Any] | None:
    """PEFT drops the bias of a tied head whose rows it trains; here it stays (``nn/tokens.py``)."""
    return None if names.head_has_bias else config


VARIANTS: dict[str, Callable[[Names], dict[str, Any] | None]] = {
    # name: what the config says, or None where the architecture has no such thing
    "lora": lambda n: {},
    "rslora": lambda n: dict(use_rslora=True),
    "dora": lambda n: dict(use_dora=True),
    "patterns": lambda n: dict(rank_pattern={n.attention: 2}, alpha_pattern={n.mlp: 3, rf".*\.1\..*{n.attention}": 9}),
    "default targets": lambda n: dict(target_modules=None) if n.has_default else None,
    "one layer": lambda n: dict(target_modules=[n.attention, n.mlp], layers_to_transform=[1]),
    "excluded": lambda n: dict(exclude_modules=[n.mlp]),
    "embedding": lambda n: dict(target_modules=[n.embedding, n.mlp]),
    "embedding with dora": lambda n: dict(target_modules=[n.embedding, n.mlp], use_dora=True),
    "token rows": lambda n: _rows(n, target_modules=[n.attention], trainable_token_indices=TOKENS),
    "token rows by name": lambda n: _rows(n, trainable_token_indices={n.embedding: TOKENS}, use_dora=True),
    "experts": lambda n: dict(target_modules=[n.attention], target_parameters=[*n.experts]) if n.experts else None,
    "head": lambda n: n.head and dict(target_modules=[n.head, n.attention]),
    "embedding and head": lambda n: n.head and dict(target_modules=[n.embedding, n.head]),
    "saved head": lambda n: n.head and dict(target_modules=[n.attention], modules_to_save=[n.head]),
    "saved norm": lambda n: dict(target_modules=[n.mlp], modules_to_save=[n.norm]),
    "saved embedding": lambda n: dict(target_modules=[n.attention], modules_to_save=[n.embedding]),
    "bias all": lambda n: dict(target_modules=[n.attention], bias="all") if n.has_biases else None,
    "bias lora_only": lambda n: dict(bias="lora_only") if n.has_biases else None,
    "bias all with dora": lambda n: dict(bias="all", use_dora=True) if n.has_biases else None,
    "bias all and saved norm": lambda n: dict(modules_to_save=[n.norm], bias="all") if n.has_biases else None,
}
CASES = [(a, v) for a, names in ARCHITECTURES.items() for v, config in VARIANTS.items() if config(names) is not None]

TASKS: dict[str, tuple[str, type[PreTrainedModel], str]] = {
    # name: (architecture, model, PEFT's name for what it is for); heads of such models are fresh, and trained whole
    "bert for classes": ("bert", BertForSequenceClassification, "SEQ_CLS"),
    "bert for tags": ("bert", BertForTokenClassification, "TOKEN_CLS"),
    "bert for answers": ("bert", BertForQuestionAnswering, "QUESTION_ANS"),
    "bert for features": ("bert", BertModel, "FEATURE_EXTRACTION"),
    "llama for classes": ("llama", LlamaForSequenceClassification, "SEQ_CLS"),
    "gpt2 for classes": ("gpt2", GPT2ForSequenceClassification, "SEQ_CLS"),
    "t5 for text": ("t5", T5ForConditionalGeneration, "SEQ_2_SEQ_LM"),
    "llama for text": ("llama", LlamaForCausalLM, "CAUSAL_LM"),
}


@contextmanager
def peft_may_warn() -> Iterator[None]:
    """PEFT warns of much that is asked for here (tied weights, embeddings in targets)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Bench:
    """Models and batches of one architecture, and both libraries' ways with them."""

    architecture: str
    prototype: PreTrainedModel

    @property
    def names(self) -> Names:
        return ARCHITECTURES[self.architecture]

    @property
    def is_decoder(self) -> bool:
        return self.architecture in DECODERS

    def base(self) -> PreTrainedModel:
        """A fresh copy of the base, all of it trainable, as models come."""
        return copy.deepcopy(self.prototype).requires_grad_(True)

    def inputs(self, num_rows: int = 2) -> dict[str, Tensor]:
        """A batch whose last row is padded."""
        generator = torch.Generator().manual_seed(1)
        batch = {"input_ids": torch.randint(3, VOCABULARY, (num_rows, 9), generator=generator)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][-1, 7:] = 0
        if self.architecture == "t5":
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (num_rows, 6), generator=generator)
        return batch

    def outputs(self, model: nn.Module, num_rows: int = 2, **given: Any) -> Tensor:
        """What the model says, a row for each row of the batch: logits, or an encoder's hidden and pooled states."""
        out = model(**self.inputs(num_rows), **given)
        names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
        return torch.cat([out[name].flatten(1) for name in names if name in out], 1)

    def adapt_ours(self, config: dict[str, Any], name: str = "default") -> deltaw.PeftModel:
        return deltaw.get_peft_model(self.base(), deltaw.LoraConfig(**config), name)

    def adapt_theirs(self, config: dict[str, Any], name: str = "default") -> peft.PeftModel:
        with peft_may_warn():
            return peft.get_peft_model(self.base(), peft.LoraConfig(**config), name).eval()

    def load_ours(self, folder: Path, **given: Any) -> deltaw.PeftModel:
        return deltaw.PeftModel.from_pretrained(self.base(), folder, **given).eval()

    def load_theirs(self, folder: Path, **given: Any) -> peft.PeftModel:
        with peft_may_warn():
            return peft.PeftModel.from_pretrained(self.base(), folder, **given).eval()


@dataclass(frozen=True)
class Twins:
    """Our model and PEFT's with the same adapter."""

    bench: Bench
    ours: deltaw.PeftModel
    theirs: peft.PeftModel
    at_start: Tensor
    """What ours said before its adapter was moved."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name in the adapter's file, ours, theirs) for everything that trains; both must train the same."""
        ours, theirs = trained_by_us(self.ours), trained_by_peft(self.theirs)
        assert ours.keys() == theirs.keys()
        return ((name, ours[name], theirs[name]) for name in ours)


def trained_by_us(model: deltaw.PeftModel, name: str = "default") -> dict[str, nn.Parameter]:
    by_address = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    return {key: by_address[t.data_ptr()] for key, t in adapter_tensors(model.get_base_model(), name).items()}


def trained_by_peft(model: peft.PeftModel, name: str = "default") -> dict[str, nn.Parameter]:
    def key(parameter: str) -> str:
        short = re.sub(rf"\.modules_to_save|\.{name}(?=\.|$)", "", parameter)
        return short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")

    # Tied biases are saved under each of their names, rows of tied embeddings under the first alone.
    rows = {id(p): n for n, p in reversed([*model.named_parameters()]) if "token_adapter" in n}
    named = ((n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    return {key(n): p for n, p in named if rows.get(id(p), n) == n}


def stir(tensors: Iterator[Tensor], seed: int = 4) -> None:
    """Move every tensor away from where it is, by noise that depends on its place in the row alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)


class Helpers:
    """What tests of this folder share (pytest imports each of them alone)."""

    @staticmethod
    def twins(bench: Bench, config: dict[str, Any]) -> Twins:
        """The pair for a config, PEFT's adapter with the values of ours."""
        ours, theirs = bench.adapt_ours(config), bench.adapt_theirs(config)
        with torch.no_grad():
            pair = Twins(bench, ours, theirs, at_start=bench.outputs(ours))
            stir(mine for mine in {id(p): p for _, p, _ in pair.trained()}.values())
            for _, mine, their in pair.trained():
                their.copy_(mine)
        return pair

    @staticmethod
    def assert_equal_numbers(pair: Twins, *, tolerance: float = 1e-5, **given: Any) -> None:
        """Outputs and, under one random upstream gradient, the gradient of everything that trains.

        A gradient may be off by ``tolerance`` of its own largest entry (of 0.1 where that is smaller: the bias of a key
        moves all scores alike, and its gradient is nothing but rounding).
        """
        outputs = []
        for model in (pair.ours, pair.theirs):
            model.zero_grad()
            outputs.append(pair.bench.outputs(model, **given))
            outputs[-1].backward(torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2)))
        torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
        for name, mine, their in pair.trained():
            assert mine.grad is not None and their.grad is not None, name
            error, size = (mine.grad - their.grad).abs().max().item(), their.grad.abs().max().item()
            assert error <= tolerance * max(size, 0.1) and size > 0, f"{name}: {error} of {size}"

    @staticmethod
    def save_theirs(model: peft.PeftModel, folder: Path) -> None:
        """PEFT's ``save_pretrained`` without its README, which takes longer than all the rest."""
        model.create_or_update_model_card = lambda *_: None
        with peft_may_warn():
            model.save_pretrained(folder)

    @staticmethod
    def tensors(folder: Path) -> dict[str, Tensor]:
        return load_file(folder / WEIGHTS_NAME)

    @staticmethod
    def config(folder: Path) -> dict[str, Any]:
        """What ``adapter_config.json`` says beside names of modules (the modules are compared) and who wrote it.

        ``fan_in_fan_out`` is one word for all layers; of several kinds PEFT writes down whichever it saw last. Of heads
        it writes down all that a task's models may have, here those that the model has.
        """
        raw = json.loads((folder / CONFIG_NAME).read_text())
        naming = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
        notes = {"auto_mapping", "peft_version", "base_model_name_or_path"}
        raw["modules_to_save"] = [n for n in raw["modules_to_save"] or () if n not in ("classifier", "score")]
        said = {k: v for k, v in raw.items() if k not in naming | notes and v not in ([], {}, None)}
        named = {k: sorted({*v}) for k, v in said.items() if isinstance(v, list) and isinstance(v[0], str)}
        return said | named

    @staticmethod
    def layers_of_ours(model: deltaw.PeftModel, name: str = "default") -> dict[str, tuple[int, float]]:
        """Adapted module → (rank, scaling); bare parameters have theirs in the tensors' shapes."""
        layers = adapted_layers(model.get_base_model())
        return {n: (m.adapter(name).rank, m.adapter(name).scaling) for n, m in layers if name in m.adapters}

    @staticmethod
    def layers_of_theirs(model: peft.PeftModel, name: str = "default") -> dict[str, tuple[int, float]]:
        layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
        linear = {n: m for n, m in layers.items() if not isinstance(m, ParamWrapper)}
        return {n: (m.r[name], m.scaling[name]) for n, m in linear.items() if name in m.scaling}

    peft_may_warn = staticmethod(peft_may_warn)
    trained_by_us = staticmethod(trained_by_us)
    trained_by_peft = staticmethod(trained_by_peft)
    stir = staticmethod(stir)


@pytest.fixture(scope="session")
def helpers() -> Helpers:
    return Helpers()


@pytest.fixture(scope="session")
def bench_of(tiny: Callable[..., PreTrainedModel]) -> Callable[[str], Bench]:
    """``bench_of("t5")``: made once for the session."""
    made: dict[str, Bench] = {}

    def make(architecture: str) -> Bench:
        if architecture not in made:
            own, kind, _ = TASKS.get(architecture, (architecture, None, None))
            model = tiny(own).requires_grad_(False)
            if kind is not None:
                torch.manual_seed(0)
                model.config.pad_token_id = 0
                model = kind(model.config).eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():  # far enough from zero that windows, caps and biases all show
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
                elif own != "t5":  # whose weights are large as they come
                    parameter.mul_(4)
            made[architecture] = Bench(own, model)
        return made[architecture]

    return make


@pytest.fixture(scope="module", params=ARCHITECTURES)
def bench(request: pytest.FixtureRequest, bench_of: Callable[[str], Bench]) -> Bench:
    """Every architecture in turn."""
    return bench_of(request.param)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, bench_of: Callable[[str], Bench]) -> Bench:
    """Every causal language model in turn."""
    return bench_of(request.param)


@pytest.fixture(scope="module", params=[*CASES, *((task, "task") for task in TASKS)], ids="-".join)
def case(request: pytest.FixtureRequest, bench_of: Callable[[str], Bench]) -> tuple[Bench, dict[str, Any]]:
    """(bench, config) of every architecture under every variant."""
    architecture, variant = request.param
    bench = bench_of(architecture)
    if variant == "task":  # PEFT can't tell some heads from other linear layers
        own = dict(task_type=TASKS[architecture][2], target_modules=[bench.names.attention])
    else:
        own = VARIANTS[variant](bench.names)
    return bench, dict(r=4, lora_alpha=6, target_modules=bench.names.all_linear) | own


@pytest.fixture(scope="module")
def twins(case: tuple[Bench, dict[str, Any]], helpers: Helpers) -> Twins:
    return helpers.twins(*case)
