"""The learning-rate range test (Smith 2017, arXiv:1506.01186, §3.3): raise the rate each step, watch the loss.

The suggestion is where the smoothed loss falls fastest per factor of ten: high enough to learn, well below where it
turns up again. Nothing is written; the run's own model is thrown away afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import UserError
from .events import Stepped
from .options import TrainOptions
from .prepare import Counted, prepare, uncounted
from .run import make_job

LOWEST, HIGHEST = 1e-6, 1e-1
NUM_STEPS = 60
SMOOTHING = 0.8
DIVERGED = 2.0
"""The test ends when the smoothed loss is this many times its best."""


@dataclass(frozen=True)
class FoundRate:
    """What the test saw."""

    suggestion: float
    reason: str
    curve: list[tuple[float, float]]
    """(learning rate, smoothed loss) of each step."""


def find_learning_rate(options: TrainOptions, counted: Counted = uncounted) -> FoundRate:
    """Run the test with the options' data, model and adapter. Raises ``UserError`` where the loss never falls."""
    test = replace(
        options, max_steps=NUM_STEPS, warmup_steps=0, lr_scheduler="constant", eval_data=None, save_every=0,
        early_stop_patience=None, resume=False,
    )  # fmt: skip
    job = make_job(test, prepare(test, counted))
    job.folder = None
    job.rate_at = rate_at
    curve: list[tuple[float, float]] = []
    smoothed: float | None = None
    with counted("range test") as progress:
        for event in job.run():
            if not isinstance(event, Stepped):
                continue
            if event.is_skipped:
                if smoothed is None:  # over a float16 base, the loss scale is still being found
                    continue
                break
            smoothed = event.loss if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * event.loss
            curve.append((event.learning_rate, smoothed))
            progress(event.step, NUM_STEPS)
            if smoothed > DIVERGED * min(loss for _, loss in curve):
                break
    return suggest(curve)


def rate_at(step: int) -> float:
    """Learning rate of one step: even steps of the logarithm from lowest to highest."""
    return float(LOWEST * (HIGHEST / LOWEST) ** (step / (NUM_STEPS - 1)))


def suggest(curve: list[tuple[float, float]]) -> FoundRate:
    """The rate at the steepest fall of the smoothed loss. Raises ``UserError`` where it never falls."""
    slopes = [
        ((after - before) / math.log10(faster / slower), slower)
        for (slower, before), (faster, after) in zip(curve, curve[4:], strict=False)
    ]
    steepest = min(slopes, default=(0.0, 0.0))
    if steepest[0] >= 0:
        raise UserError("the loss did not fall at any learning rate; check the data with --preview")
    return FoundRate(suggestion=steepest[1], reason="the loss falls fastest there", curve=curve)
