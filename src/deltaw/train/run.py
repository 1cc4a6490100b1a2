"""A whole run: from options to the files in ``--out``. Reads everything before it replaces anything.

adapter_config.json  adapter_model.safetensors   the adapter: the best by held-out loss, else the last
metrics.jsonl                                    an event a line
summary.json                                     what was trained, on what, with which figures
checkpoints/                                     to resume from
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.peft_format import WEIGHTS_NAME, save_adapter
from ..config import CONFIG_NAME
from ..data.formats import load_examples, sha256_of
from ..data.render import Rendered, render_all
from ..errors import UserError
from ..files import replace_text
from ..nn.inject import inject, parameter_counts
from ..nn.load import base_bytes, base_info, load_base
from . import checkpoint
from .events import Event, Stopped, Warned
from .forward import examine
from .loop import Job, trainable_parameters, unfreeze
from .optim import unmoved
from .options import TrainOptions
from .watchers import MetricsFile, TensorBoard, Watcher

log = logging.getLogger("deltaw")

SUMMARY, METRICS = "summary.json", "metrics.jsonl"
_FILES = (SUMMARY, METRICS, CONFIG_NAME, WEIGHTS_NAME, "checkpoints", "tensorboard")


@dataclass(frozen=True)
class Prepared:
    """Base and data, read and rendered; nothing written yet."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Rendered
    eval: Rendered | None
    data_sha256: str
    base_bytes: int


def run_training(
    options: TrainOptions, watchers: Sequence[Watcher] = (), should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train as the options say, and return what ``summary.json`` holds.

    Raises ``UserError`` before anything in ``--out`` has changed for whatever can't be read or doesn't fit.
    """
    check_out(options)
    prepared = prepare(options)
    job = make_job(options, prepared, should_stop)
    if options.overwrite:
        _clear(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        step = job.progress.step if options.resume else None
        listeners: list[Watcher] = [
            stack.enter_context(MetricsFile(options.out / METRICS, keep_up_to=step)),
            *([stack.enter_context(TensorBoard(options.out / "tensorboard"))] if options.tensorboard else []),
            *watchers,
        ]

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        for message in data_warnings(prepared):
            tell(Warned(message=message))
        stopped = Stopped(step=0, reason="done")
        for event in job.run():
            tell(event)
            stopped = event if isinstance(event, Stopped) else stopped
        return _finish(job, prepared, stopped, tell)


def prepare(options: TrainOptions) -> Prepared:
    """Read the data, then the base, and render the one for the other."""
    if not options.data:
        raise UserError("--data: expected a JSONL, CSV or Parquet file, or a hub data set; give one")
    examples = load_examples(options.data, data_format=options.data_format)
    held_out = None
    if options.eval_data is not None:
        held_out = load_examples(options.eval_data, data_format=options.data_format, split="test")
    model, tokenizer = load_base(options.model, dtype=options.dtype, device=options.device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and options.max_length > longest:
        raise UserError(f"--max-length {options.max_length}: {options.model} takes at most {longest} tokens")

    def rendered(examples: Sequence[Any]) -> Rendered:
        return render_all(examples, tokenizer, loss_on=options.loss_on, max_length=options.max_length)

    return Prepared(
        model=model,
        tokenizer=tokenizer,
        train=rendered(examples),
        eval=None if held_out is None else rendered(held_out),
        data_sha256=sha256_of(options.data),
        base_bytes=base_bytes(model),
    )


def make_job(options: TrainOptions, prepared: Prepared, should_stop: Callable[[], bool] = lambda: False) -> Job:
    """Put the adapter into the base (or free all its weights) and, where a run is resumed, its state into both."""
    model = prepared.model
    progress, path = checkpoint.Progress(), None
    if options.resume:
        path = checkpoint.last_checkpoint(options.out)
        progress, recorded, data_sha256 = checkpoint.read_state(path)
        changes = options.differences(recorded)
        if data_sha256 != prepared.data_sha256:
            changes.append("other training data")
        if changes:
            raise UserError(f"--resume {options.out}: not the same run ({', '.join(changes)}); undo, or --overwrite")
    torch.manual_seed(options.seed)
    if options.full:
        unfreeze(model)
    else:
        inject(model, options.lora_config())
    language_model = examine(model)
    job = Job(
        language_model=language_model,
        options=options,
        train_tokens=prepared.train.examples,
        eval_tokens=prepared.eval.examples if prepared.eval is not None else (),
        folder=options.out,
        data_sha256=prepared.data_sha256,
        progress=progress,
        should_stop=should_stop,
    )
    if path is not None:
        checkpoint.load_weights(path, model, job.optimizer)
        log.info("going on from step %d of %d", progress.step, job.num_steps)
    return job


def data_warnings(prepared: Prepared) -> list[str]:
    """What happened to the data on its way to the model, in words; nothing is cut or left out unsaid."""
    out = []
    for name, data in (("training", prepared.train), ("held-out", prepared.eval)):
        if data is None:
            continue
        if data.num_truncated:
            out.append(
                f"{data.num_truncated} of {data.num_examples} {name} examples are longer than --max-length and lose "
                f"{data.truncated_tokens:,} tokens at their end"
            )
        if data.num_unsupervised_after_truncation:
            out.append(
                f"{data.num_unsupervised_after_truncation} {name} examples have no supervised token left and are "
                f"left out (first: {data.first_unsupervised}); a larger --max-length keeps them"
            )
    return out


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def _finish(job: Job, prepared: Prepared, stopped: Stopped, tell: Callable[[Event], None]) -> dict[str, Any]:
    model, out = prepared.model, job.options.out
    best = checkpoint.best_checkpoint(out, job.progress)
    if best is not None and stopped.reason != "interrupted":
        checkpoint.load_weights(best, model)
    still = unmoved([(name, p) for name, p in trainable_parameters(model).items()])
    if still and stopped.reason != "interrupted":
        modules = [name.partition(".adapters.")[0] for name in still]
        tell(Warned(message=f"{len(still)} modules learnt nothing (B is still zero): {', '.join(modules[:4])}"))
    if job.options.full:
        model.save_pretrained(out)
        prepared.tokenizer.save_pretrained(out)
        trained = out / "model.safetensors"
    else:
        trained = save_adapter(model, out, data_sha256=prepared.data_sha256) / WEIGHTS_NAME
    summary = _summary(job, prepared, stopped, trained)
    replace_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _summary(job: Job, prepared: Prepared, stopped: Stopped, trained: Path) -> dict[str, Any]:
    progress = job.progress
    trainable, total = parameter_counts(prepared.model)
    info = base_info(prepared.model)
    seconds = max(progress.seconds, 1e-9)
    after = progress.best_loss if progress.best_loss is not None else None
    return {
        "status": stopped.reason,
        "steps": progress.step,
        "skipped_steps": progress.num_skips,
        "examples": progress.num_examples,
        "tokens": progress.num_tokens,
        "supervised_tokens": progress.num_supervised,
        "train_seconds": progress.seconds,
        "examples_per_second": progress.num_examples / seconds,
        "tokens_per_second": progress.num_tokens / seconds,
        "eval_loss_before": progress.eval_loss_before,
        "eval_loss_after": after,
        "eval_loss_last": progress.eval_loss_last,
        "best_step": progress.best_step,
        "peak_rss_bytes": peak_rss_bytes(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": trained.stat().st_size if trained.is_file() else 0,
        "base_bytes": prepared.base_bytes,
        "data_sha256": prepared.data_sha256,
        "base_sha256": None if info is None else info.sha256,
        "truncated_examples": prepared.train.num_truncated,
        "config": job.options.to_dict(),
    }


def check_out(options: TrainOptions) -> None:
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; expected a folder")
    found = [name for name in _FILES if (out / name).exists()]
    if options.resume and not found:
        raise UserError(f"--resume: {out} holds no run; start it without --resume")
    if found and not (options.resume or options.overwrite):
        raise UserError(f"--out {out} already holds a run ({found[0]}); add --resume or --overwrite, or another --out")


def _clear(out: Path) -> None:
    """Remove an earlier run's files, and nothing else that may lie there."""
    for name in _FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
