"""Seconds and memory of one LoRA training step: PEFT and this project on the same model, in the same run.

    python benchmarks/train_step.py [--rounds 7] [--tokens 256 --rows 4] [--dtypes bfloat16 float32]

Each configuration lives in a process of its own, so that peak memory is its own. Those that are compared with each
other run at the same time, since all together would not fit into memory; the parent lets them step in turn, A B C A B
C …, so that a noisy machine is noisy for all. Medians are reported. A step is forward, loss on all tokens, backward and
AdamW, on SmolLM2-135M with r=16, alpha=32 on all seven projections.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from _common import describe_machine, save

CONFIGURATIONS = {
    "PEFT, dropout 0": ("peft", {"lora_dropout": 0.0}),
    "deltaw, dropout 0": ("deltaw", {"lora_dropout": 0.0}),
    "PEFT, dropout 0.05": ("peft", {"lora_dropout": 0.05}),
    "deltaw, dropout 0.05": ("deltaw", {"lora_dropout": 0.05}),
    "PEFT DoRA": ("peft", {"use_dora": True}),
    "deltaw DoRA": ("deltaw", {"use_dora": True}),
    "full fine-tuning": ("full", {}),
}
COMPARED = (
    ("PEFT, dropout 0", "deltaw, dropout 0", "full fine-tuning"),
    ("PEFT, dropout 0.05", "deltaw, dropout 0.05"),
    ("PEFT DoRA", "deltaw DoRA"),
)
"""Which run at the same time."""

SHAPE = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Setting:
    kind: str
    adapter: dict[str, object]
    dtype: str
    rows: int
    tokens: int


def worker(setting: Setting) -> None:
    """Build one configuration, then make a step for every line on standard input and answer with its seconds."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(10, 49_000, (setting.rows, setting.tokens))
    step = {"peft": _peft_step, "deltaw": _deltaw_step, "full": _full_step}[setting.kind](setting, ids)
    loss = step()  # warm-up, which also allocates the optimiser's state
    print(json.dumps({"loss": loss}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}), flush=True)


def _peft_step(setting: Setting, ids):
    import peft

    from deltaw import load_base

    model, _ = load_base("smollm2-135m", dtype=setting.dtype)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **SHAPE, **setting.adapter)
    return _torch_step(peft.get_peft_model(model, config).train(), ids)


def _full_step(setting: Setting, ids):
    from deltaw import load_base

    model, _ = load_base("smollm2-135m", dtype=setting.dtype)
    return _torch_step(model.requires_grad_(True).train(), ids)


def _torch_step(model, ids) -> Callable[[], float]:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _deltaw_step(setting: Setting, ids) -> Callable[[], float]:
    from deltaw import LoraConfig, load_base
    from deltaw.data.render import Tokens
    from deltaw.nn.inject import inject
    from deltaw.ops.dropout import DropoutKey
    from deltaw.train.forward import examine, training_mode
    from deltaw.train.loop import trainable_parameters
    from deltaw.train.optim import AdamW

    model, _ = load_base("smollm2-135m", dtype=setting.dtype)
    inject(model, LoraConfig(**SHAPE, **setting.adapter))
    language_model = examine(model)
    optimizer = AdamW(trainable_parameters(model), weight_decay=0.0)
    examples = [
        Tokens(input_ids=row, supervised=[False] + [True] * (len(row) - 1), origin="benchmark") for row in ids.tolist()
    ]
    packs = language_model.pack(examples, ids.numel())
    supervised = sum(packed.num_supervised for packed in packs)
    mode = training_mode(language_model, checkpointing=False)
    mode.__enter__()  # for the life of the process

    def step() -> float:
        total = 0.0
        for packed in packs:
            loss = language_model.loss(packed, DropoutKey(0, 0, packed.row_offset)) / supervised
            loss.backward()
            total += loss.item()
        optimizer.step(1e-4)
        return total

    return step


def measure(dtype: str, rows: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians and peak memory of each configuration, peers against each other."""
    results: dict[str, dict[str, float]] = {}
    for names in COMPARED:
        results |= _in_turn(names, dtype, rows, tokens, rounds)
    return {name: results[name] for name in CONFIGURATIONS}


def _in_turn(names: Sequence[str], dtype: str, rows: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    processes: dict[str, subprocess.Popen[str]] = {}
    losses: dict[str, float] = {}
    for name in names:
        kind, adapter = CONFIGURATIONS[name]
        setting = json.dumps({"kind": kind, "adapter": adapter, "dtype": dtype, "rows": rows, "tokens": tokens})
        command = [sys.executable, __file__, "--worker", setting]
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        losses[name] = json.loads(processes[name].stdout.readline())["loss"]
        print(f"  {name}: ready, first loss {losses[name]:.4f}", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for name, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            seconds[name].append(answer["seconds"])
            peaks[name] = answer["peak_rss_bytes"]
    for process in processes.values():
        process.stdin.close()
        process.wait(timeout=60)
    return {
        name: {
            "seconds": statistics.median(times),
            "seconds_all": times,
            "peak_rss_bytes": peaks[name],
            "first_loss": losses[name],
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        worker(Setting(**json.loads(args.worker)))
        return
    results = {}
    for dtype in args.dtypes:
        print(f"{dtype}: {args.rows} × {args.tokens} tokens", file=sys.stderr)
        results[dtype] = measure(dtype, args.rows, args.tokens, args.rounds)
    setting = {"rows": args.rows, "tokens": args.tokens, "rounds": args.rounds, **SHAPE}
    save(Path(__file__).stem, {"machine": describe_machine(), "setting": setting, "results": results})


if __name__ == "__main__":
    main()
