"""Whole runs on a small model: data to learn, and options that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaw.data.render import Tokens
from deltaw.train.events import Event, Stepped
from deltaw.train.options import TrainOptions

WORDS = ["red", "green", "blue", "one", "two", "three", "north", "south", "tea", "milk", "bread", "salt", "ship"]


def chats(num: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Chats of uneven length whose answers follow from their questions."""
    out = []
    for i in range(start, start + num):
        words = [WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(1 + i % 5)]
        answer = " ".join(reversed(words))
        turns = [{"role": "user", "content": "Say " + " ".join(words)}, {"role": "assistant", "content": answer}]
        out.append({"messages": turns})
    return out


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """``write("a.jsonl", rows)``: rows as a JSONL file; returns its path."""

    def do(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return do


@pytest.fixture
def options(tiny_base: Path, tmp_path: Path, write: Callable[..., str]) -> Callable[..., TrainOptions]:
    """``options(epochs=1)``: ten uneven examples, five held out, six steps of two epochs unless said otherwise."""
    data, held_out = write("train.jsonl", chats(10)), write("heldout.jsonl", chats(5, start=40))

    def make(**given: Any) -> TrainOptions:
        usual: dict[str, Any] = dict(
            data=data, eval_data=held_out, model=str(tiny_base), out=tmp_path / "run", dtype="float32", epochs=2,
            batch_size=4, r=4, learning_rate=1e-2, warmup_steps=1, max_length=64, micro_batch_tokens=100,
        )  # fmt: skip
        if given.get("full"):
            del usual["r"]
        return TrainOptions(**usual | given)

    return make


@pytest.fixture
def examples() -> Callable[..., list[Tokens]]:
    """``examples(5)``: so many random token sequences of uneven length for the models of 97 tokens."""
    import torch

    def make(num: int, *, shortest: int = 5, vocabulary: int = 97, seed: int = 0) -> list[Tokens]:
        g = torch.Generator().manual_seed(seed)
        out = []
        for i in range(num):
            length = shortest + (i * 5) % 11
            ids = torch.randint(3, vocabulary, (length,), generator=g).tolist()
            out.append(Tokens(input_ids=ids, supervised=[j > i % 3 for j in range(length)], origin=f"x:{i}"))
        return out

    return make


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, read as strictly as JSON is meant."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


@pytest.fixture(name="events")
def _events() -> Callable[..., list[dict[str, Any]]]:
    return events


@pytest.fixture(name="chats")
def _chats() -> Callable[..., list[dict[str, Any]]]:
    return chats


class Stop:
    """Watches a run, and asks it to stop after so many steps."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def __call__(self, event: Event) -> None:
        self.steps += isinstance(event, Stepped)

    def __bool__(self) -> bool:
        return self.steps >= self.after


@pytest.fixture
def run_until() -> Callable[[TrainOptions, int], dict[str, Any]]:
    """``run_until(options, 2)``: a run that is interrupted after two steps; its summary."""
    from deltaw.train.run import run_training

    def do(options: TrainOptions, step: int) -> dict[str, Any]:
        stop = Stop(step)
        return run_training(options, [stop], stop.__bool__)

    return do


@pytest.fixture
def listing() -> Callable[[Path], dict[Path, bytes]]:
    """``listing(out)``: all files of a folder, by name."""
    return lambda out: {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture
def checkpoints_of() -> Callable[[Path], list[str]]:
    """``checkpoints_of(out)``: names of a run's checkpoints."""
    return lambda out: sorted(p.name for p in (out / "checkpoints").iterdir())
