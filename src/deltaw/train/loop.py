"""The training loop: one optimiser step after another, told as events; who shows or keeps them is not its business.

A step: take its examples, lay them end to end in micro-batches, sum their losses, divide by the supervised tokens of
the whole step, clip, update. Everything in a step is a function of (weights, optimiser state, step number): the
order, the learning rate and the dropout masks are computed from the seed and the step, so that a run that goes on
from a checkpoint is, bit for bit, the run that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..data.loader import StepSampler
from ..data.render import Tokens
from ..errors import UserError
from ..nn.walk import parameter_counts
from ..ops.dropout import DropoutKey
from . import scaling
from .checkpoint import Progress, save_checkpoint
from .evaluate import mean_loss
from .events import Evaluated, Evaluating, Event, Saved, Started, Stepped, Stopped, Warned
from .forward import LanguageModel, training_mode
from .optim import learning_rate_at
from .options import Every, TrainOptions
from .paged import make_optimizer

MAX_SKIPS = 10
"""Steps in a row with a gradient that is not finite before the run gives up (over float16: at the lowest scale)."""


@dataclass(kw_only=True)
class Job:
    """What is trained on what. ``run`` may be called once."""

    language_model: LanguageModel
    options: TrainOptions
    train_tokens: Sequence[Tokens]
    eval_tokens: Sequence[Tokens]
    folder: Path | None = None
    """Where checkpoints go; None: nowhere."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """What the run is made from, for its checkpoints: see ``checkpoint.TRAINING_DATA``."""
    progress: Progress = field(default_factory=Progress)
    """Where the run stands; from a checkpoint if it is resumed."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step."""

    def __post_init__(self) -> None:
        options = self.options
        steps_per_epoch = math.ceil(len(self.train_tokens) / options.examples_per_step)
        num_steps = options.max_steps or max(1, round(options.epochs * steps_per_epoch))
        self.sampler = StepSampler(len(self.train_tokens), options.examples_per_step, options.seed, max_steps=num_steps)
        model = self.language_model.model
        self.optimizer = make_optimizer(
            options.optimizer,
            trainable_parameters(model),
            folder=self.folder,
            weight_decay=options.weight_decay,
            b_ratio=options.loraplus_lr_ratio,
        )
        self.rate_at: Callable[[int], float] = partial(
            learning_rate_at,
            peak=options.learning_rate,
            warmup=options.warmup_steps,
            total=num_steps,
            schedule=options.lr_scheduler,
        )
        """Learning rate of a step, from 0."""
        self._is_scaled = scaling.is_needed(model)
        if self._is_scaled and self.progress.step == 0:
            self.progress.loss_scale = scaling.FIRST

    @property
    def num_steps(self) -> int:
        return self.sampler.num_steps

    def run(self) -> Iterator[Event]:
        """Train to the end, an early stop or a request to stop; the weights are then those of the last step."""
        model, options, progress = self.language_model.model, self.options, self.progress
        trainable, total = parameter_counts(model)
        yield Started(
            first_step=progress.step,
            num_steps=self.num_steps,
            num_examples=len(self.train_tokens),
            num_tokens=sum(len(tokens.input_ids) for tokens in self.train_tokens),
            trainable_parameters=trainable,
            total_parameters=total,
        )
        with training_mode(self.language_model, checkpointing=options.gradient_checkpointing):
            if self.eval_tokens and progress.eval_loss_before is None:
                yield self._evaluating()
                yield self._evaluate()
            while progress.step < self.num_steps:
                yield (stepped := self._step())
                if stepped.is_skipped:
                    yield self._skipped(stepped)
                is_last = progress.step == self.num_steps
                wants_save = self._is_due(options.save_every)
                if self.eval_tokens and (is_last or self._is_due(options.eval_every)):
                    yield self._evaluating()
                    yield (evaluated := self._evaluate())
                    wants_save |= evaluated.is_best
                if wants_save and self.folder is not None:
                    yield self._save()
                patience = options.early_stop_patience
                if patience is not None and progress.evals_since_best >= patience:
                    yield Stopped(step=progress.step, reason="early stop")
                    return
                if self.should_stop() and not is_last:
                    if self.folder is not None:
                        yield self._save()
                    yield Stopped(step=progress.step, reason="interrupted")
                    return
        yield Stopped(step=progress.step, reason="done")

    def _step(self) -> Stepped:
        started = time.perf_counter()
        options, progress, step = self.options, self.progress, self.progress.step
        examples = [self.train_tokens[i] for i in self.sampler.indices(step)]
        micro_batches = self.language_model.pack(examples, options.micro_batch_tokens)
        supervised = sum(packed.num_supervised for packed in micro_batches)
        loss = 0.0
        for packed in micro_batches:
            key = DropoutKey(options.seed, step, packed.row_offset)
            part = self.language_model.loss(packed, key) / max(1, supervised)
            if supervised:
                (part * progress.loss_scale).backward()
            loss += part.item()
        norm = self.optimizer.clip(options.max_grad_norm, loss_scale=progress.loss_scale)
        rate = self.rate_at(step)
        is_skipped = not (supervised and math.isfinite(norm) and math.isfinite(loss))
        if is_skipped:
            self.optimizer.drop_gradients()
        else:
            self.optimizer.step(rate)
        if self._is_scaled and supervised:
            progress.loss_scale, progress.steps_at_loss_scale = scaling.adjusted(
                progress.loss_scale, progress.steps_at_loss_scale, is_finite=not is_skipped
            )
        num_tokens = sum(len(tokens.input_ids) for tokens in examples)
        seconds = time.perf_counter() - started
        progress.count(
            examples=len(examples), tokens=num_tokens, supervised=supervised, seconds=seconds, is_skipped=is_skipped
        )
        return Stepped(
            step=progress.step,
            epoch=progress.step / self.sampler.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            num_examples=len(examples),
            num_tokens=num_tokens,
            num_supervised=supervised,
            seconds=seconds,
            is_skipped=is_skipped,
        )

    def _skipped(self, stepped: Stepped) -> Warned:
        scale = self.progress.loss_scale
        if stepped.num_supervised and self.progress.skips_in_a_row >= MAX_SKIPS and scale == 1:
            raise UserError(
                f"the gradient was not finite for {MAX_SKIPS} steps in a row (step {stepped.step}); "
                f"lower --learning-rate {self.options.learning_rate:g}, or train with --dtype float32"
            )
        why = "the gradient is not finite" if stepped.num_supervised else "none of its tokens is supervised"
        lowered = f", and the loss scale is now {scale:.0f}" if self._is_scaled and stepped.num_supervised else ""
        return Warned(message=f"step {stepped.step}: {why}; no weight was moved{lowered}")

    def _evaluating(self) -> Evaluating:
        return Evaluating(step=self.progress.step, num_examples=len(self.eval_tokens))

    def _evaluate(self) -> Evaluated:
        started = time.perf_counter()
        loss, supervised = mean_loss(self.language_model, self.eval_tokens, self.options.micro_batch_tokens)
        is_best = self.progress.evaluated(loss)
        return Evaluated(
            step=self.progress.step,
            loss=loss,
            num_supervised=supervised,
            seconds=time.perf_counter() - started,
            is_best=is_best,
        )

    def _save(self) -> Saved:
        assert self.folder is not None
        path = save_checkpoint(
            self.folder,
            self.language_model.model,
            self.optimizer,
            self.progress,
            options=self.options.to_dict(),
            hashes=self.hashes,
        )
        return Saved(step=self.progress.step, path=str(path))

    def _is_due(self, every: Every) -> bool:
        length = self.sampler.steps_per_epoch if every == "epoch" else every
        return length > 0 and (self.progress.step % length == 0 or self.progress.step == self.num_steps)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unfreeze(model: nn.Module) -> None:
    """Full fine-tuning: every floating-point weight trains."""
    for parameter in model.parameters():
        parameter.requires_grad_(torch.is_floating_point(parameter))
