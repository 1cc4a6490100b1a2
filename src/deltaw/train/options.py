"""The flags of ``deltaw train``, which are also the keys of its YAML file: one dataclass is the only source of both.

Imports no torch: the command line reads this file for ``--help``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import STRATEGIES, LoraConfig, TaskType
from ..errors import UserError
from ..settings import Quantization

Every = int | Literal["epoch"]

ADAPTER_FLAGS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora", "init_lora_weights", "bias"),
    "loraplus_lr_ratio",
}
"""Fields that say something about an adapter, and nothing about full fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train an adapter on your data.

    The data are JSONL, CSV or Parquet files, or a hub data set: chat (messages), prompt/completion,
    instruction/output, or text. What comes out is PEFT's two files, readable by every tool that speaks PEFT.
    """

    data: str = ""
    """Training data: a file or a hub data set (owner/name, or owner/name:config)."""
    data_split: str | None = None
    """Split of a hub data set, or a part of one (train[:90%]); train where none is given."""
    model: str = "smollm2-135m"
    """Base model: smollm2-135m, a folder, a .gguf file or a hub id."""
    out: Path = Path("run")
    """Folder that the run is written to."""
    eval_data: str | None = None
    """Held-out data, for the loss before, during and after; the best adapter by it is the one kept."""
    eval_split: str | None = None
    """Split of held-out data from the hub; test where none is given."""
    data_format: Literal["auto", "chat", "prompt", "instruction", "text"] = "auto"
    """How to read the examples, where their keys don't say it."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that count: the assistant's turns (completions), or all, whatever weight a turn has."""
    max_length: int = 1024
    """Tokens of one example beyond which it is cut; cuts are counted and reported."""

    r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32
    """Alpha: the adapter is scaled by alpha/r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: str = "all-linear"
    """all-linear | attention | mlp | qv, names with commas between them, or one regular expression."""
    use_dora: bool = False
    """DoRA: train magnitude and direction apart."""
    use_rslora: bool = False
    """Scale by alpha/√r."""
    init_lora_weights: str = "true"
    """Start of A and B: true (Kaiming, zero), gaussian, orthogonal, pissa, pissa_niter_16, olora, eva or loftq."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A; 16 is its authors' choice."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that train along."""
    full: bool = False
    """Ordinary full fine-tuning of every weight instead of an adapter."""

    quantization: Quantization = "none"
    """Storage of the frozen base's linear layers: nf4 (QLoRA's 4 bits), or nf4-single, fp4, int4 to compare with."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base; adapters train in float32 whatever it is."""
    device: str = "auto"
    """cpu, cuda …; auto: CUDA where there is one."""

    epochs: float = 3.0
    """Passes over the data; a fraction stops inside one."""
    max_steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 8
    """Examples that are accumulated into a gradient at a time."""
    gradient_accumulation: int = 1
    """Batches an optimiser step: it sees batch-size × gradient-accumulation examples."""
    micro_batch_tokens: int = 2048
    """Tokens laid end to end in one forward pass: memory against speed, never the result."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    learning_rate: float = 2e-4
    """Peak learning rate; adapters want about ten times full fine-tuning's."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    optimizer: Literal["adamw", "paged-adamw"] = "adamw"
    """paged-adamw: its state lies in a file beside --out, so that it may leave memory; the numbers are the same."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0: never."""

    eval_every: Every = "epoch"
    """Evaluate every so many steps, or per epoch; 0: only before and after."""
    save_every: Every = "epoch"
    """Write a checkpoint every so many steps, or per epoch; 0: only on Ctrl-C."""
    early_stop_patience: int | None = None
    """Stop after this many evaluations without a better loss."""
    seed: int = 0
    """Seed of the start, the order and the dropout."""

    resume: bool = False
    """Go on from the last checkpoint in --out, bit for bit as if it had never stopped."""
    overwrite: bool = False
    """Replace the run in --out."""
    preview: int = 0
    """Only show this many examples as the model will see them, supervised tokens marked."""
    find_lr: bool = False
    """Only run a learning-rate range test, print its curve and a suggestion."""
    tensorboard: bool = False
    """Also write TensorBoard files into --out/tensorboard."""
    publish_to: Path | None = None
    """Store to publish the trained adapter to; by default $DELTAW_STORE, else ~/.local/share/deltaw/adapters."""
    publish_as: str | None = None
    """Name to publish the trained adapter under."""

    def __post_init__(self) -> None:
        def expect(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected {wanted}")

        for name in ("batch_size", "gradient_accumulation", "micro_batch_tokens"):
            expect(name, getattr(self, name) >= 1, "at least 1")
        expect("max_length", self.max_length >= 2, "at least 2 tokens")
        expect("learning_rate", 0 < self.learning_rate < float("inf"), "a positive number")
        expect("epochs", 0 < self.epochs < float("inf"), "a positive number")
        expect("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1")
        expect("loraplus_lr_ratio", 0 < self.loraplus_lr_ratio < float("inf"), "a positive number")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "preview"):
            expect(name, getattr(self, name) >= 0, "zero or more")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            expect(name, value == "epoch" or (isinstance(value, int) and value >= 0), "a number of steps, or epoch")
        expect("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2⁶³")
        patience = self.early_stop_patience
        expect("early_stop_patience", patience is None or patience >= 1, "at least 1")
        if patience is not None and self.eval_data is None:
            raise UserError("--early-stop-patience needs --eval-data to judge by; give held-out data")
        if self.eval_split is not None and self.eval_data is None:
            raise UserError(f"--eval-split {self.eval_split}: of which data? Name them with --eval-data")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        if self.publish_to is not None and self.publish_as is None:
            raise UserError(f"--publish-to {self.publish_to}: under which name? Give it with --as")
        if self.publish_as is not None:
            self._check_publish(self.publish_as)
        if self.full:
            self._check_no_adapter()
        else:
            self.lora_config()

    def _check_publish(self, name: str) -> None:
        from ..adapters.store import check_name

        check_name(name)
        if self.full:
            raise UserError(f"--as {name}: --full trains no adapter that could be published; leave out one of them")

    def _check_no_adapter(self) -> None:
        """An adapter's flag beside --full would do nothing, and codes can't train."""
        if self.quantization != "none":
            raise UserError(f"--full --quantization {self.quantization}: weights in 4 bits can't train; leave one out")
        given = [
            f"--{f.name.replace('_', '-')}"
            for f in dataclasses.fields(self)
            if f.name in ADAPTER_FLAGS and getattr(self, f.name) != f.default
        ]
        if given:
            raise UserError(f"--full trains every weight and has no adapter; leave out {', '.join(given)}, or --full")

    @property
    def examples_per_step(self) -> int:
        """What one optimiser step sees."""
        return self.batch_size * self.gradient_accumulation

    def lora_config(self) -> LoraConfig:
        """The adapter that these flags ask for. Raises ``UserError`` for what makes no adapter."""
        start = {"true": True, "false": False}.get(self.init_lora_weights.lower(), self.init_lora_weights)
        given = self.target_modules
        targets: str | list[str] = given
        if given.lower() not in STRATEGIES and not set(given) & set("()[]{}|*+?^$\\"):
            targets = [name.strip() for name in given.split(",") if name.strip()]
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.r,
            lora_alpha=int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=start,
            bias=self.bias,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Flags in which a recorded run differs such that going on would not be the same run."""
        free = {"resume", "overwrite", "preview", "find_lr", "tensorboard", "out", "save_every", "optimizer"}
        free |= {"publish_to", "publish_as"}
        mine = self.to_dict()
        return [f"--{k.replace('_', '-')} {other.get(k)} → {v}" for k, v in mine.items()
                if k not in free and other.get(k) != v]  # fmt: skip
