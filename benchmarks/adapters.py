"""Milliseconds to load an adapter and to switch between two: PEFT and this project on the same model, in the same run.

    python benchmarks/adapters.py [--rounds 15] [--dtype float32]

An adapter of SmolLM2-135M with r=16 on all seven projections of its 30 layers: 210 modules, 4.88 M parameters, 19.5 MB
in float32. Each library has a process of its own with two such adapters in its model; the parent asks them in turn to
switch to the other one, and to load a third from disk and take it out again. Medians are reported, and the fastest and
the slowest. Files are warm in the page cache. Switching is PEFT's ``set_adapter``, which makes an adapter trainable,
and once more for inference only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import describe_machine, save

SHAPE = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LIBRARIES = ("PEFT", "deltaw")


def write_adapters(folder: Path, dtype: str) -> int:
    """Three adapters of different weights; bytes of one."""
    import torch

    from deltaw import LoraConfig, load_base
    from deltaw.adapters.peft_format import WEIGHTS_NAME, save_adapter
    from deltaw.nn.inject import inject, restore

    model, _ = load_base("smollm2-135m", dtype=dtype)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        inject(model, LoraConfig(init_lora_weights=False, **SHAPE))
        save_adapter(model, folder / name)
        restore(model)
    return (folder / "a" / WEIGHTS_NAME).stat().st_size


def worker(library: str, folder: Path, dtype: str) -> None:
    """Answer each line on standard input, the name of an action, with the seconds that it took."""
    actions, seen = _actions(library, folder, dtype)
    for _ in range(2):  # warm-up, which among others hashes the base once
        for name in actions:
            actions[name]()
    print(json.dumps({"logits": seen()}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        actions[line.strip()]()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds}), flush=True)


def _actions(
    library: str, folder: Path, dtype: str
) -> tuple[dict[str, Callable[[], object]], Callable[[], list[float]]]:
    """What can be asked for, and a look at the result that must be the same in both libraries."""
    import itertools

    import peft
    import torch

    import deltaw

    model, _ = deltaw.load_base("smollm2-135m", dtype=dtype)
    wrap = {"PEFT": peft.PeftModel, "deltaw": deltaw.PeftModel}[library]
    adapted = wrap.from_pretrained(model, folder / "a", adapter_name="a")
    adapted.load_adapter(folder / "b", adapter_name="b")
    others = itertools.cycle("ba")

    def switch(**given: bool) -> None:
        adapted.set_adapter(next(others), **given)

    def seen() -> list[float]:
        adapted.set_adapter("b")
        with torch.no_grad():
            return adapted(input_ids=torch.arange(100, 108)[None]).logits[0, -1, :4].tolist()

    actions = {
        "switch": switch,
        "switch, inference only": lambda: switch(inference_mode=True),
        "load": lambda: adapted.load_adapter(folder / "c", adapter_name="c"),
        "delete": lambda: adapted.delete_adapter("c"),
    }
    return actions, seen


def measure(folder: Path, dtype: str, rounds: int) -> dict[str, dict[str, dict[str, object]]]:
    """action → library → seconds: median, all."""
    processes: dict[str, subprocess.Popen[str]] = {}
    logits = {}
    for library in LIBRARIES:
        command = [sys.executable, __file__, "--worker", library, "--folder", str(folder), "--dtype", dtype]
        processes[library] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        logits[library] = json.loads(processes[library].stdout.readline())["logits"]
        print(f"  {library}: ready, first logits {logits[library]}", file=sys.stderr)
    far = max(abs(mine - theirs) for mine, theirs in zip(*logits.values(), strict=True))
    assert far < (1e-3 if dtype == "float32" else 0.5), logits
    names = ("switch", "switch, inference only", "load", "delete")
    seconds: dict[str, dict[str, list[float]]] = {name: {library: [] for library in LIBRARIES} for name in names}
    for _ in range(rounds):
        for name in names:
            for library, process in processes.items():
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
                seconds[name][library].append(json.loads(process.stdout.readline())["seconds"])
    for process in processes.values():
        process.stdin.close()
        process.wait(timeout=60)
    return {
        name: {who: {"seconds": statistics.median(times), "seconds_all": times} for who, times in by_library.items()}
        for name, by_library in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder, args.dtype)
        return
    with tempfile.TemporaryDirectory(prefix="deltaw-adapters-") as scratch:
        num_bytes = write_adapters(Path(scratch), args.dtype)
        results = measure(Path(scratch), args.dtype, args.rounds)
    setting = {"rounds": args.rounds, "dtype": args.dtype, "adapter_bytes": num_bytes, **SHAPE}
    save(Path(__file__).stem, {"machine": describe_machine(), "setting": setting, "results": results})


if __name__ == "__main__":
    main()
