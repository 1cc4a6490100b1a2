"""The progress bar of a training run: a watcher of its events."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..train.events import Evaluated, Evaluating, Event, Saved, Started, Stepped, Stopped, Warned
from ..train.run import peak_rss_bytes
from .screen import err, size

SMOOTHING = 0.9
"""Share of the old in the loss that is shown; the file has the exact ones."""


class ProgressBar:
    """Steps, smoothed loss, tokens a second, memory and time left; evaluations and warnings as lines above it."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,  # a file would get an empty line
        )
        self._task = self._progress.add_task("training", total=None, facts="")
        self._loss: float | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            share = 100 * event.trainable_parameters / max(1, event.total_parameters)
            self._say(
                f"{event.num_examples:,} examples of {event.num_tokens:,} tokens; {event.num_steps:,} steps; "
                f"{event.trainable_parameters:,} of {event.total_parameters:,} parameters train ({share:.2f} %)"
            )
            self._progress.update(self._task, total=event.num_steps, completed=event.first_step)
            self._progress.start()  # not before: until here a mistake in what was asked may still come up
        elif isinstance(event, Stepped):
            if not event.is_skipped:
                old = event.loss if self._loss is None else self._loss
                self._loss = SMOOTHING * old + (1 - SMOOTHING) * event.loss
            shown = "–" if self._loss is None else f"{self._loss:.3f}"
            speed = event.num_tokens / event.seconds
            facts = f"loss {shown} · {speed:,.0f} tokens/s · {size(peak_rss_bytes())}"
            self._progress.update(self._task, completed=event.step, facts=facts)
        elif isinstance(event, Evaluating):
            self._progress.update(self._task, facts=f"evaluating {event.num_examples:,} held-out examples")
        elif isinstance(event, Evaluated):
            mark = " (best so far)" if event.is_best else ""
            self._say(f"step {event.step}: held-out loss {event.loss:.4f}{mark}")
        elif isinstance(event, Warned):
            self._say(f"[yellow]{escape(event.message)}[/yellow]")
        elif isinstance(event, Stopped) and event.reason != "done":
            self._say(f"stopped at step {event.step}: {event.reason}")
        else:
            assert isinstance(event, Saved | Stopped)

    def _say(self, line: str) -> None:
        self._progress.console.print(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:  # else it would leave an empty line
            self._progress.stop()
