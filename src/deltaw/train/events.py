"""What happens in a training run, as values: one stream, many watchers (progress bar, metrics file, TensorBoard)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Started:
    """Before the first step; all is loaded."""

    kind: ClassVar[str] = "started"
    first_step: int
    """Steps already done (0, or where a resumed run goes on)."""
    num_steps: int
    num_examples: int
    num_tokens: int
    """Tokens of one epoch."""
    trainable_parameters: int
    total_parameters: int


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """After an optimiser step."""

    kind: ClassVar[str] = "step"
    step: int
    """Steps done, this one included."""
    epoch: float
    """Passes over the data so far."""
    loss: float
    """Mean over the step's supervised tokens, in nats, before the update."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_examples: int
    num_tokens: int
    num_supervised: int
    seconds: float
    is_skipped: bool
    """True where the gradient was not finite, or nothing was supervised: no weight has moved."""


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """Before an evaluation, which may take long."""

    kind: ClassVar[str] = "evaluating"
    step: int
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """After an evaluation of the weights as they are after ``step``."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    """Mean over all supervised tokens of the held-out data, in nats."""
    num_supervised: int
    seconds: float
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class Saved:
    """After a checkpoint was written."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that the user should know and that stops nothing."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The loop has ended; the weights are those of the last step."""

    kind: ClassVar[str] = "stopped"
    step: int
    reason: str
    """``done``, ``early stop`` or ``interrupted``."""


Event = Started | Stepped | Evaluating | Evaluated | Saved | Warned | Stopped


def as_json(event: Event) -> dict[str, Any]:
    """The event as one JSON object, its kind under ``event``."""
    return {"event": event.kind} | {k: finite_or_none(v) for k, v in dataclasses.asdict(event).items()}


def finite_or_none(value: Any) -> Any:
    """The value, but None for a number that is not finite: JSON has no such numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
