"""Checkpoints of a run: the adapter (PEFT's files), the optimiser's state, and where the run stands. Never the base.

    checkpoints/step-00000120/   adapter_config.json   adapter_model.safetensors   optimizer.safetensors   state.json

(full fine-tuning has no adapter: there, ``weights.safetensors`` holds the trained weights). A checkpoint is a folder
that appears whole or not at all. The newest two are kept, and the best by held-out loss.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..adapters.peft_format import WEIGHTS_NAME, save_adapter, set_adapter_tensors
from ..config import LoraConfig, config_from_dict
from ..errors import UserError
from ..files import new_folder
from ..nn.state import state_of
from .optim import AdamW

KEEP = 2
"""Newest checkpoints that are kept, beside the best."""

BASE, TRAINING_DATA, HELD_OUT_DATA = "base", "training data", "held-out data"
"""Keys of ``hashes``: what a run is made from, in the words of the message where it has changed."""

_OPTIMIZER, _STATE, _FULL = "optimizer.safetensors", "state.json", "weights.safetensors"


@dataclass
class Progress:
    """Where a run stands: all of the loop's own state."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    seconds: float = 0.0
    """Spent in steps, over all sessions of the run."""
    skips_in_a_row: int = 0
    num_skips: int = 0
    eval_loss_before: float | None = None
    eval_loss_last: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    loss_scale: float = 1.0
    """Of the next step; other than 1 over a float16 base only (``scaling``)."""
    steps_at_loss_scale: int = 0

    def count(self, *, examples: int, tokens: int, supervised: int, seconds: float, is_skipped: bool) -> None:
        """One more step."""
        self.step += 1
        self.num_examples += examples
        self.num_tokens += tokens
        self.num_supervised += supervised
        self.seconds += seconds
        self.num_skips += is_skipped
        self.skips_in_a_row = self.skips_in_a_row + 1 if is_skipped else 0

    def evaluated(self, loss: float) -> bool:
        """One more evaluation; True where it is the best since training began."""
        self.eval_loss_last = loss
        if self.eval_loss_before is None:
            self.eval_loss_before = loss
            return False
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
            return True
        self.evals_since_best += 1
        return False


def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizer: AdamW,
    progress: Progress,
    *,
    options: dict[str, Any],
    hashes: Mapping[str, str],
) -> Path:
    """Write ``run/checkpoints/step-N`` whole or not at all, then drop those that are no longer kept."""
    path = _folder(run, progress.step)
    if path.exists():  # the same step, saved before an interruption: nothing has changed since
        return path
    with new_folder(path) as scratch:
        if state_of(model).configs:
            save_adapter(model, scratch, data_sha256=hashes.get(TRAINING_DATA))
        else:
            save_file({n: p.detach().clone() for n, p in optimizer.parameters.items()}, scratch / _FULL)
        save_file({k: v.contiguous() for k, v in optimizer.state().items()}, scratch / _OPTIMIZER)
        state = {"progress": asdict(progress), "options": options, "sha256": dict(hashes)}
        state |= {"adapters": {name: config.to_dict() for name, config in state_of(model).configs.items()}}
        (scratch / _STATE).write_text(json.dumps(state, indent=2))
    for old in _all(run)[:-KEEP]:
        if old != _folder(run, progress.best_step):
            shutil.rmtree(old)
    return path


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run. Raises ``UserError`` where there is none."""
    found = _all(run)
    if not found:
        raise UserError(f"{run} has no checkpoint to resume from; start it again with --overwrite")
    return found[-1]


def read_state(path: Path) -> tuple[Progress, dict[str, Any], dict[str, str]]:
    """(progress, options, hashes) of a checkpoint. Raises ``UserError`` where it can't be read."""
    try:
        state = json.loads((path / _STATE).read_text())
        return Progress(**state["progress"]), dict(state["options"]), dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def load_weights(path: Path, model: nn.Module, optimizer: AdamW | None = None) -> None:
    """Put a checkpoint's weights (and optimiser state) into a model that is set up as the one that was saved."""
    try:
        if state_of(model).configs:
            set_adapter_tensors(model, load_file(path / WEIGHTS_NAME))
        else:
            _set_parameters(model, load_file(path / _FULL))
        if optimizer is not None:
            optimizer.load_state(load_file(path / _OPTIMIZER))
    except UserError as error:
        raise UserError(f"{path}: holds other tensors than this run trains ({error}); use --overwrite") from None
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:  # RuntimeError: a tensor of another shape
        raise _damaged(path, error) from None


def _set_parameters(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    mine = {n: p for n, p in model.named_parameters() if n in stored}
    if stored.keys() != mine.keys():
        raise UserError(f"no parameter {min(stored.keys() - mine.keys())}")
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(stored[key])


def read_adapter_config(path: Path, name: str = "default") -> LoraConfig:
    """The config of the adapter as it was being trained: its file's may have been rewritten for PEFT.

    Raises ``UserError`` where it can't be read.
    """
    try:
        return config_from_dict(json.loads((path / _STATE).read_text())["adapters"][name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def best_checkpoint(run: Path, progress: Progress) -> Path | None:
    """The checkpoint with the best held-out loss, where there is one."""
    path = _folder(run, progress.best_step)
    return path if progress.best_step is not None and path.is_dir() else None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a readable checkpoint ({type(error).__name__}: {error}); delete this folder to go on from the "
        "checkpoint before it, or start again with --overwrite"
    )


def _folder(run: Path, step: int | None) -> Path:
    return run / "checkpoints" / f"step-{step or 0:08d}"


def _all(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / _STATE).is_file())
