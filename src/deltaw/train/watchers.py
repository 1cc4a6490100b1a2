"""Who listens to a run: the metrics file and TensorBoard. (The progress bar is the command line's.)"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..errors import UserError
from ..files import replace_text
from .events import Evaluated, Event, Stepped, as_json


class Watcher(Protocol):
    """Sees every event, in order."""

    def __call__(self, event: Event) -> None: ...


class MetricsFile:
    """``metrics.jsonl``: an event a line, on disk as soon as it happened.

    A resumed run first drops what came after its checkpoint, so that every step stands there once.
    """

    def __init__(self, path: Path, *, keep_up_to: int | None = None) -> None:
        kept = ""
        if keep_up_to is not None and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if _step_of(line) <= keep_up_to)
        replace_text(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        self._file.write(json.dumps(as_json(event)) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class TensorBoard:
    """Losses, learning rate, gradient norm and speed as TensorBoard scalars, by step.

    A resumed run hides what came after its checkpoint.
    """

    def __init__(self, folder: Path, *, keep_up_to: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if keep_up_to is None else keep_up_to + 1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            for name, value in (
                ("train/loss", event.loss),
                ("train/learning_rate", event.learning_rate),
                ("train/grad_norm", event.grad_norm),
                ("train/tokens_per_second", event.num_tokens / event.seconds),
            ):
                self._writer.add_scalar(name, value, event.step)
        elif isinstance(event, Evaluated):
            self._writer.add_scalar("eval/loss", event.loss, event.step)
            self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises ``UserError`` where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard; run: pip install tensorboard") from None


def _step_of(line: str) -> int:
    """Step of one line; lines that a crash cut short, and those without a step, count as after every step."""
    try:
        event = json.loads(line)
        return int(event["first_step"] if "first_step" in event else event.get("step", 1 << 62))
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError):
        return 1 << 62
