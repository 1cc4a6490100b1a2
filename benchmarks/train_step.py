"""Seconds and memory of one LoRA training step: PEFT, this project and the hardware's floor, in the same run.

    python benchmarks/train_step.py                                  the default shape: SmolLM2-135M, 4 × 256 tokens
    python benchmarks/train_step.py --shapes all --breakdown         every shape, and where the time goes
    python benchmarks/train_step.py --shapes llama gpt2 --dtypes bfloat16 --rounds 5 --minutes 20

Each configuration lives in a process of its own, so that peak memory is its own. Those that are compared with each
other run at the same time (all together would not fit into memory), with the floor among them; the parent lets them
step in turn, A B C A B C …, so that a noisy machine is noisy for all. Medians are reported. A step is forward, loss on
all tokens, backward and AdamW, with an adapter on every linear layer but the head.

The floor is the frozen products that no step can do without: every layer's product forward, its grad-input where one is
wanted, and the head's two, in the dtype, packed for the machine's matrix library. Everything else costs nothing in it.

A run replaces the figures of its own shapes and dtypes in results/train_step.json and no others, each as soon as it is
complete; it doesn't replace figures of more rounds. --out FILE keeps a run apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS, describe_machine, environment, save

FLOOR = "floor"
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    FLOOR: ("floor", {}, {}),
    "PEFT, dropout 0": ("peft", {"lora_dropout": 0.0}, {}),
    "deltaw, dropout 0": ("deltaw", {"lora_dropout": 0.0}, {}),
    "deltaw, gradient checkpointing": ("deltaw", {}, {"gradient_checkpointing": True}),
    "full fine-tuning": ("full", {}, {}),
    "PEFT, dropout 0.05": ("peft", {"lora_dropout": 0.05}, {}),
    "deltaw, dropout 0.05": ("deltaw", {"lora_dropout": 0.05}, {}),
    "PEFT DoRA": ("peft", {"use_dora": True}, {}),
    "deltaw DoRA": ("deltaw", {"use_dora": True}, {}),
}
"""Name → (kind, fields of LoraConfig, flags of ``deltaw train``); see ``_steps.py``."""

PLAIN = ((FLOOR, "PEFT, dropout 0", "deltaw, dropout 0"),)
FULL = (
    (*PLAIN[0], "deltaw, gradient checkpointing", "full fine-tuning"),
    (FLOOR, "PEFT, dropout 0.05", "deltaw, dropout 0.05"),
    (FLOOR, "PEFT DoRA", "deltaw DoRA"),
)
"""Which run at the same time: at most about 17 GB together."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step is made on."""

    title: str
    model: str = "smollm2-135m"
    rows: int = 4
    tokens: int = 256
    r: int = 16
    groups: tuple[tuple[str, ...], ...] = PLAIN
    cost: float = 1.0
    """Time of a step, about, over that of the default shape; only for the estimate of what is left."""


SHAPES = {
    "smollm2": Shape(title="SmolLM2-135M, 4 × 256 tokens, r=16", groups=FULL),
    "short": Shape(title="SmolLM2-135M, 16 × 64 tokens, r=16", rows=16, tokens=64),
    "long": Shape(title="SmolLM2-135M, 1 × 1024 tokens, r=16", rows=1, tokens=1024, cost=1.1),
    "r4": Shape(title="SmolLM2-135M, 4 × 256 tokens, r=4", r=4),
    "r64": Shape(title="SmolLM2-135M, 4 × 256 tokens, r=64", r=64, cost=1.1),
    "llama": Shape(title="Llama, hidden 2048, 4 layers, 4 × 256 tokens, r=16", model="Llama blocks", cost=1.6),
    "gpt2": Shape(title="GPT-2 (124M), 4 × 256 tokens, r=16", model="GPT-2"),
}
TINY = Shape(title="tiny Llama, 2 × 32 tokens, r=4", model="tiny", rows=2, tokens=32, r=4, groups=FULL, cost=0.1)
"""Says that the script runs, and nothing about speed."""


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Medians and peak memory of each configuration, peers against each other."""
    results: dict[str, dict[str, Any]] = {}
    for names in shape.groups:
        measured = _in_turn(names, shape, dtype, rounds)
        for row in measured.values():
            row["floor_seconds"] = measured[FLOOR]["seconds"]
        results = measured | results  # of several floors, the first stays
    return {name: results[name] for name in CONFIGURATIONS if name in results}


def _in_turn(names: Sequence[str], shape: Shape, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    with _workers(names, shape, dtype) as processes:
        ready = {}
        for name, process in processes.items():
            ready[name] = _answer(name, process)
            _say(f"  {name}: ready" + ("" if name == FLOOR else f", first loss {ready[name]['loss']:.4f}"))
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        for round_ in range(1, rounds + 1):
            started = time.perf_counter()
            for name, process in processes.items():
                print("step", file=process.stdin, flush=True)
                answers[name].append(_answer(name, process))
            left = (rounds - round_) * (time.perf_counter() - started)
            _say(f"  round {round_} of {rounds}" + (f", about {left:.0f} s more" if left else ""))
    return {
        name: {
            "seconds": statistics.median(answer["seconds"] for answer in given),
            "seconds_all": [answer["seconds"] for answer in given],
            "peak_rss_bytes": given[-1]["peak_rss_bytes"],
            "rss_before_bytes": ready[name]["rss_before_bytes"],
            "first_loss": ready[name]["loss"],
        }
        for name, given in answers.items()
    }


@contextmanager
def _workers(names: Sequence[str], shape: Shape, dtype: str) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process each, started one after the other; none outlives this."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            processes[name] = subprocess.Popen(
                _command(name, shape, dtype),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if name.startswith("PEFT") else None,  # it warns of things beside the point
                text=True,
                env=environment(),
            )
        yield processes
        for process in processes.values():
            process.stdin.close()
            process.wait(timeout=60)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _command(name: str, shape: Shape, dtype: str, breakdown: int = 0) -> list[str]:
    kind, adapter, options = CONFIGURATIONS[name]
    if kind in ("peft", "deltaw"):
        adapter = {"r": shape.r, "lora_alpha": 2 * shape.r, "target_modules": "all-linear", **adapter}
    setting = {
        **{"kind": kind, "model": shape.model, "dtype": dtype, "rows": shape.rows, "tokens": shape.tokens},
        **{"adapter": adapter, "options": options, "breakdown": breakdown},
    }
    return [sys.executable, str(Path(__file__).with_name("_steps.py")), json.dumps(setting)]


def _answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended without an answer (exit code {process.wait()})")
    return json.loads(line)


def take_apart(shape: Shape, dtype: str, steps: int) -> dict[str, Any]:
    """Where the time of this project's step goes, by part."""
    command = _command("deltaw, dropout 0", shape, dtype, breakdown=steps)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(), check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    for part, seconds in found["parts"].items():
        _say(f"  {part}: {1e3 * seconds:.0f} ms")
    return found


def merge(path: Path, name: str, dtype: str, run: dict[str, Any]) -> None:
    """Put one shape's figures in one dtype into a file, beside all others that it holds."""
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    runs.setdefault(name, {})[dtype] = run
    in_order = [name for name in SHAPES if name in runs] + [name for name in runs if name not in SHAPES]
    save(Path(__file__).stem, {"runs": {name: dict(sorted(runs[name].items())) for name in in_order}}, path)


def _rounds_kept(path: Path, name: str, dtype: str) -> int:
    """Rounds that the figures in a file rest on; 0 where there are none."""
    run = json.loads(path.read_text())["runs"].get(name, {}).get(dtype) if path.is_file() else None
    return run["setting"]["rounds"] if run else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["smollm2"],
        choices=[*SHAPES, "all", "tiny"],
        help="; ".join(f"{name}: {shape.title}" for name, shape in SHAPES.items())
        + "; all; tiny: only to see that the script runs (needs --out)",
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each configuration")
    parser.add_argument("--breakdown", action="store_true", help="also profile deltaw's step, by part")
    parser.add_argument("--minutes", type=float, default=90, help="begin no further shape or dtype after this time")
    parser.add_argument("--out", type=Path, help="file to merge the figures into (default: results/train_step.json)")
    args = parser.parse_args()
    if "tiny" in args.shapes and args.out is None:
        parser.error("--shapes tiny says nothing about speed and needs --out FILE")
    names = list(SHAPES) if "all" in args.shapes else list(dict.fromkeys(args.shapes))
    path = args.out or RESULTS / "train_step.json"
    plan = [(name, dtype) for name in names for dtype in args.dtypes]
    for name, dtype in plan:
        if (kept := _rounds_kept(path, name, dtype)) > args.rounds:
            parser.error(f"{path.name} has {name} in {dtype} with {kept} rounds: give as many, or --out FILE")
    _run(plan, path, args)


def _run(plan: list[tuple[str, str]], path: Path, args: argparse.Namespace) -> None:
    shapes = {**SHAPES, "tiny": TINY}
    costs = [shapes[n].cost * sum(map(len, shapes[n].groups)) * (2 if d == "float32" else 1) for n, d in plan]
    started = time.monotonic()
    for i, (name, dtype) in enumerate(plan):
        minutes = (time.monotonic() - started) / 60
        left = minutes * sum(costs[i:]) / sum(costs[:i]) if i else 0
        if minutes > args.minutes:
            _say(f"{minutes:.0f} minutes have gone, so these are left out: {', '.join(map(' '.join, plan[i:]))}")
            break
        shape = shapes[name]
        _say(f"{shape.title}, {dtype} ({i + 1} of {len(plan)}" + (f", about {left:.0f} min more)" if i else ")"))
        run = {
            "machine": describe_machine(),
            "setting": {
                **{"title": shape.title, "model": shape.model, "rows": shape.rows, "tokens": shape.tokens},
                **{"r": shape.r, "lora_alpha": 2 * shape.r, "target_modules": "all-linear", "rounds": args.rounds},
            },
            "results": measure(shape, dtype, args.rounds),
        }
        if args.breakdown:
            run["breakdown"] = take_apart(shape, dtype, max(1, min(3, args.rounds)))
        merge(path, name, dtype, run)
    _say(f"{(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
