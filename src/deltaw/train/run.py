"""A whole run: from options to the files in ``--out``. Reads everything before it replaces anything.

adapter_config.json  adapter_model.safetensors   the adapter: the best by held-out loss, else the last
metrics.jsonl                                    an event a line
summary.json                                     what was trained, on what, with which figures
checkpoints/                                     to resume from
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.card import is_own
from ..adapters.peft_format import WEIGHTS_NAME, save_adapter
from ..config import CONFIG_NAME
from ..errors import UserError
from ..files import replace_text
from ..nn.eva import start_from_data
from ..nn.fresh import blank_adapter
from ..nn.inject import inject
from ..nn.walk import parameter_counts
from . import checkpoint
from .card import write_run_card
from .eva import EvaBatches
from .events import Event, Stopped, Warned, finite_or_none
from .forward import examine
from .loop import Job, trainable_parameters, unfreeze
from .optim import unmoved
from .options import TrainOptions
from .prepare import Counted, Prepared, data_sha256, data_warnings, prepare, uncounted
from .publish import SUMMARY, check_publish, publish
from .watchers import MetricsFile, TensorBoard, Watcher, check_tensorboard

log = logging.getLogger("deltaw")

METRICS = "metrics.jsonl"
_FILES = (SUMMARY, METRICS, CONFIG_NAME, WEIGHTS_NAME, "checkpoints", "tensorboard")


def run_training(
    options: TrainOptions,
    watchers: Sequence[Watcher] = (),
    should_stop: Callable[[], bool] = lambda: False,
    counted: Counted = uncounted,
) -> dict[str, Any]:
    """Train as the options say, and return what ``summary.json`` holds. A finished run that is resumed stays as it is.

    Raises ``UserError`` before anything in ``--out`` has changed for whatever can't be read or doesn't fit.
    """
    check_out(options)
    check_publish(options)
    if options.resume and (summary := _finished(options)) is not None:
        log.info("%s is finished after %d steps: nothing left to train", options.out, summary["steps"])
        return publish(options, summary, log.warning)
    prepared = prepare(options, counted)
    job = make_job(options, prepared, should_stop)
    if options.overwrite:
        _clear(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        step = job.progress.step if options.resume else None
        listeners: list[Watcher] = [
            stack.enter_context(MetricsFile(options.out / METRICS, keep_up_to=step)),
            *watchers,
        ]
        if options.tensorboard:
            listeners.append(stack.enter_context(TensorBoard(options.out / "tensorboard", keep_up_to=step)))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        for message in data_warnings(prepared):
            tell(Warned(message=message))
        if options.warmup_steps >= job.num_steps:
            message = f"all {job.num_steps} steps lie in the warm-up: --learning-rate is never reached"
            tell(Warned(message=f"{message}; lower --warmup-steps {options.warmup_steps}, or train longer"))
        stopped = Stopped(step=0, reason="done")
        for event in job.run():
            tell(event)
            stopped = event if isinstance(event, Stopped) else stopped
        summary = _finish(job, prepared, stopped, tell)
        return publish(options, summary, lambda message: tell(Warned(message=message)))


def make_job(options: TrainOptions, prepared: Prepared, should_stop: Callable[[], bool] = lambda: False) -> Job:
    """Put the adapter into the base (or free all its weights) and, where a run is resumed, its state into both."""
    model = prepared.model
    progress, path = checkpoint.Progress(), None
    if options.resume:
        path = checkpoint.last_checkpoint(options.out)
        progress, recorded, hashes = checkpoint.read_state(path)
        changes = options.differences(recorded)
        changes += [f"other {what}" for what, sha256 in prepared.hashes.items() if hashes.get(what) != sha256]
        if changes:
            raise UserError(f"--resume {options.out}: not the same run ({', '.join(changes)}); undo, or --overwrite")
    if options.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no gradient checkpointing; leave --gradient-checkpointing out")
    if options.tensorboard:
        check_tensorboard()
    torch.manual_seed(options.seed)
    if options.full:
        unfreeze(model)
    elif path is None:
        inject(model, options.lora_config())
    else:
        config = checkpoint.read_adapter_config(path)
        inject(model, config, make=partial(blank_adapter, config=config))
    language_model = examine(model)
    if path is None and not options.full and options.init_lora_weights.lower() == "eva":
        log.info("EVA: looking at what the layers get from the training data")
        start_from_data(model, EvaBatches(language_model, prepared.train.examples, options))
    job = Job(
        language_model=language_model,
        options=options,
        train_tokens=prepared.train.examples,
        eval_tokens=prepared.eval.examples if prepared.eval is not None else (),
        folder=options.out,
        hashes=prepared.hashes,
        progress=progress,
        should_stop=should_stop,
    )
    if path is not None:
        checkpoint.load_weights(path, model, job.optimizer)
        log.info("going on from step %d of %d", progress.step, job.num_steps)
    return job


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:  # getrusage would count, too, what a parent held when it forked
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finish(job: Job, prepared: Prepared, stopped: Stopped, tell: Callable[[Event], None]) -> dict[str, Any]:
    model, out = prepared.model, job.options.out
    best = None if stopped.reason == "interrupted" else checkpoint.best_checkpoint(out, job.progress)
    if best is not None:
        checkpoint.load_weights(best, model)
    still = unmoved([(name, p) for name, p in trainable_parameters(model).items()])
    if still and stopped.reason != "interrupted":
        modules = [name.partition(".adapters.")[0] for name in still]
        tell(Warned(message=f"{len(still)} modules learnt nothing (B is still zero): {', '.join(modules[:4])}"))
    if job.options.full:
        written = _save_whole_model(prepared, out)
    else:
        save_adapter(model, out, data_sha256=prepared.hashes[checkpoint.TRAINING_DATA])
        written = [CONFIG_NAME, WEIGHTS_NAME]
    summary = _summary(job, prepared, stopped, written) | {
        "eval_loss_after": None if best is None else job.progress.best_loss
    }
    replace_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if not job.options.full:
        write_run_card(out, summary, model)
    return summary


def _save_whole_model(prepared: Prepared, out: Path) -> list[str]:
    """Write model and tokenizer as transformers saves them, each file whole or not at all; returns their names."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".model-") as scratch:
        prepared.model.save_pretrained(scratch)
        prepared.tokenizer.save_pretrained(scratch)
        names = sorted(path.name for path in Path(scratch).iterdir() if path.is_file())
        for name in names:
            os.replace(Path(scratch, name), out / name)
    return names


def _summary(job: Job, prepared: Prepared, stopped: Stopped, written: list[str]) -> dict[str, Any]:
    progress = job.progress
    trainable, total = parameter_counts(prepared.model)
    seconds = max(progress.seconds, 1e-9)
    weights = [job.options.out / name for name in written if name.endswith(".safetensors")]
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
        "eval_loss_before": finite_or_none(progress.eval_loss_before),
        "eval_loss_last": finite_or_none(progress.eval_loss_last),
        "best_step": progress.best_step,
        "peak_rss_bytes": peak_rss_bytes(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": sum(path.stat().st_size for path in weights),
        "base_bytes": prepared.base_bytes,
        "trained_bytes": sum(p.nbytes for p in job.optimizer.parameters.values()),
        "optimizer_bytes": sum(t.nbytes for t in job.optimizer.state().values()),
        "data_sha256": prepared.hashes[checkpoint.TRAINING_DATA],
        "base_sha256": prepared.hashes.get(checkpoint.BASE),
        "truncated_examples": prepared.train.num_truncated,
        "files": written,
        "config": job.options.to_dict(),
    }


def check_out(options: TrainOptions) -> None:
    """Raises ``UserError`` where the options' run can't go into ``--out``."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; expected a folder")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"--out {out}: can't be written, since {parent} isn't a folder that you may write to")
    found = [name for name in _FILES if (out / name).exists()]
    if options.resume and not found:
        raise UserError(f"--resume: {out} holds no run; start it without --resume")
    if found and not (options.resume or options.overwrite):
        raise UserError(f"--out {out} already holds a run ({found[0]}); add --resume or --overwrite, or another --out")


def _finished(options: TrainOptions) -> dict[str, Any] | None:
    """The summary of the run in ``--out`` where it has come to its end; ``UserError`` if it was another run."""
    summary = _read_summary(options.out)
    if summary.get("status") not in ("done", "early stop"):
        return None
    changes = options.differences(summary["config"])
    if data_sha256(options) != summary.get("data_sha256"):
        changes.append("other training data")
    if changes:
        raise UserError(
            f"--resume {options.out}: that run is finished, and this would be another ({', '.join(changes)}); "
            "give another --out, or --overwrite"
        )
    return summary


def _read_summary(out: Path) -> dict[str, Any]:
    """What an earlier run left behind; empty where there is nothing that can be read."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) and isinstance(summary.get("config"), dict) else {}


def _clear(out: Path) -> None:
    """Remove an earlier run's files, and nothing else that may lie there."""
    written = _read_summary(out).get("files", [])
    ours = [*out.glob("checkpoints/step-*"), *out.glob("tensorboard/events.out.tfevents.*")]
    for path in [*ours, *(out.iterdir() if out.is_dir() else ())]:
        if path in ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.is_file() and (path.name in _FILES or path.name in written or is_own(path)):
            path.unlink()
