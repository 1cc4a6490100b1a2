"""A whole LoRA training, on real chat data with varied lengths: TRL's SFTTrainer with PEFT, and ``deltaw train``.

    python benchmarks/train_end_to_end.py [--examples 160] [--epochs 1] [--padding-free] [--minutes 60]

Both train SmolLM2-135M in bfloat16 on the same tokens (docstrings of the standard library as chats, 50 to 600 tokens,
the loss on the answers), in the same order, eight to a step, with the same rank, alpha, learning rate, schedule and
AdamW; TRL otherwise with its defaults, but without gradient checkpointing, which would only cost it time. Each run is a
process of its own; seconds are those of training alone. Peak memory is the process's.

TRL runs once, since a run takes minutes, deltaw before and after it, so that both meet the same machine; deltaw's
figure is the median of its runs. --padding-free adds TRL with its padding-free batches.

The loss on held-out examples (of other modules) is computed by one evaluator for all: PEFT's model with each run's
saved adapter, in float32, one example at a time.

Figures go to results/train_end_to_end.json, unless those there rest on more examples; --out FILE keeps a run apart.
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
from typing import Any

from _common import RESULTS, describe_machine, environment, peak_rss_bytes, save

TRL, PADDING_FREE, DELTAW = "TRL + PEFT", "TRL + PEFT, padding-free", "deltaw"
SETTING = {
    "model": "smollm2-135m",
    "dtype": "bfloat16",
    "batch_size": 8,
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "learning_rate": 2e-4,
    "lr_scheduler": "cosine",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
}


def prepare(folder: Path, num_examples: int, epochs: int) -> None:
    """Write the data: train.jsonl for deltaw, tokens.json (in deltaw's order) for TRL and the evaluator."""
    from _chats import chats, rendered

    from deltaw.data.loader import StepSampler
    from deltaw.nn.load import load_tokenizer

    tokenizer, _ = load_tokenizer(SETTING["model"])
    train, heldout = chats(num_examples, max(5, num_examples // 4), tokenizer)
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": e["messages"]}) + "\n" for e in train))
    steps = StepSampler(num_examples, SETTING["batch_size"], SETTING["seed"], epochs=epochs)
    order = [i for step in range(steps.num_steps) for i in steps.indices(step)]
    tokens = {"train": rendered(train, tokenizer), "heldout": rendered(heldout, tokenizer)}
    tokens["train"] = [tokens["train"][i] for i in order]
    plain = {
        part: [{"input_ids": t.input_ids, "supervised": t.supervised} for t in examples]
        for part, examples in tokens.items()
    }
    (folder / "tokens.json").write_text(json.dumps(plain))


def train_deltaw(folder: Path, out: Path, epochs: int) -> dict[str, Any]:
    from deltaw.train.events import Event, Started, Stepped
    from deltaw.train.options import TrainOptions
    from deltaw.train.run import run_training

    losses, say = [], _progress(DELTAW)
    num_steps = 0

    def watch(event: Event) -> None:
        nonlocal num_steps
        if isinstance(event, Started):
            num_steps = event.num_steps
        if isinstance(event, Stepped):
            losses.append(event.loss)
            say(event.step, num_steps)

    options = TrainOptions(data=str(folder / "train.jsonl"), out=out, epochs=epochs, save_every=0, **SETTING)
    summary = run_training(options, [watch])
    return {
        "seconds": summary["train_seconds"],
        "examples": summary["examples"],
        "tokens": summary["tokens"],
        "supervised_tokens": summary["supervised_tokens"],
        "losses": losses,
    }


def train_trl(folder: Path, out: Path, padding_free: bool) -> dict[str, Any]:
    import peft
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    from deltaw import load_base

    model, tokenizer = load_base(SETTING["model"], dtype=SETTING["dtype"])
    examples = json.loads((folder / "tokens.json").read_text())["train"]
    config = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=SETTING["batch_size"],
        num_train_epochs=1,  # the examples of all epochs, in order
        train_sampling_strategy="sequential",
        learning_rate=SETTING["learning_rate"],
        lr_scheduler_type=SETTING["lr_scheduler"],
        warmup_steps=SETTING["warmup_steps"],
        weight_decay=SETTING["weight_decay"],
        max_grad_norm=SETTING["max_grad_norm"],
        seed=SETTING["seed"],
        gradient_checkpointing=False,
        padding_free=padding_free,
        max_length=None,  # no example is longer than 600 tokens
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    times: dict[str, float] = {}
    say = _progress(PADDING_FREE if padding_free else TRL)

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times["began"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times["ended"] = time.perf_counter()
            say(state.global_step, state.max_steps)

    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": e["input_ids"], "labels": _labels(e)} for e in examples]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=SETTING["r"],
            lora_alpha=SETTING["lora_alpha"],
            target_modules=SETTING["target_modules"],
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.model.save_pretrained(out)
    return {
        "seconds": times["ended"] - times["began"],
        "examples": len(examples),
        "tokens": sum(len(e["input_ids"]) for e in examples),
        "supervised_tokens": sum(map(sum, (e["supervised"] for e in examples))),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def evaluate(folder: Path, adapters: list[Path]) -> dict[str, Any]:
    """Mean loss over the held-out examples' answers: of the base, then with each adapter."""
    import peft
    import torch
    import torch.nn.functional as F

    from deltaw import load_base

    examples = json.loads((folder / "tokens.json").read_text())["heldout"]
    supervised = sum(map(sum, (e["supervised"] for e in examples)))

    def mean_loss(model: Any) -> float:
        total = 0.0
        with torch.no_grad():
            for example in examples:
                logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
                total += F.cross_entropy(logits, torch.tensor(_labels(example)[1:]), reduction="sum").item()
        return total / supervised

    losses = []
    for adapter in (None, *adapters):
        model, _ = load_base(SETTING["model"], dtype="float32")
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        losses.append(mean_loss(model))
        _say(f"  held-out loss, {'base' if adapter is None else adapter.name}: {losses[-1]:.4f}")
    return {"losses": losses, "examples": len(examples), "supervised_tokens": supervised}


def _labels(example: dict[str, Any]) -> list[int]:
    return [i if wanted else -100 for i, wanted in zip(example["input_ids"], example["supervised"], strict=True)]


def _progress(name: str) -> Callable[[int, int], None]:
    began = time.perf_counter()

    def say(step: int, num_steps: int) -> None:
        seconds = time.perf_counter() - began
        if step == num_steps or step % max(1, num_steps // 5) == 0:
            _say(f"  {name}: step {step} of {num_steps}, about {seconds / step * (num_steps - step):.0f} s more")

    return say


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def worker(task: str, folder: Path, names: list[str], epochs: int, examples: int) -> dict[str, Any]:
    """One task, in this process."""
    match task:
        case "prepare":
            prepare(folder, examples, epochs)
            return {}
        case "evaluate":
            return evaluate(folder, [folder / name for name in names])
        case "deltaw":
            run = train_deltaw(folder, folder / names[0], epochs)
        case _:
            run = train_trl(folder, folder / names[0], padding_free=task == PADDING_FREE)
    return run | {"peak_rss_bytes": peak_rss_bytes()}


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs in turn, then their adapters' losses."""
    until = time.monotonic() + 60 * args.minutes

    def task(what: str, *names: str) -> dict[str, Any]:
        answer = folder / "answer.json"
        command = [sys.executable, __file__, "--examples", str(args.examples), "--epochs", str(args.epochs)]
        command += ["--worker", what, "--folder", str(folder), "--names", *names]
        try:
            subprocess.run(command, check=True, env=environment(), timeout=max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            remedy = "give more, or fewer --examples"
            raise SystemExit(f"{what}: not done within --minutes {args.minutes:g}; {remedy}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{what}: failed with exit code {error.returncode}; its last words stand above") from None
        return json.loads(answer.read_text())

    task("prepare")
    runs = [(DELTAW, "deltaw-before"), (TRL, "trl"), (DELTAW, "deltaw-after")]
    if args.padding_free:
        runs += [(PADDING_FREE, "trl-padding-free"), (DELTAW, "deltaw-last")]
    done = [(name, adapter, task(name, adapter)) for name, adapter in runs]
    for what in ("examples", "tokens", "supervised_tokens"):
        if len(found := {run[what] for _, _, run in done}) > 1:
            raise SystemExit(f"not the same data: {what} are {sorted(found)}")
    held_out = task("evaluate", *(adapter for _, adapter in runs))
    results: dict[str, dict[str, Any]] = {}
    done_and_losses = zip(done, held_out["losses"][1:], strict=True)
    for (name, _, run), loss in sorted(done_and_losses, key=lambda pair: pair[0][0] == DELTAW):  # ours comes last
        row = results.setdefault(name, {"seconds_all": [], "peak_rss_bytes": 0, "eval_losses": [], "train_losses": []})
        row["seconds_all"].append(run["seconds"])
        row["eval_losses"].append(loss)
        row["train_losses"].append(run["losses"])
        row["peak_rss_bytes"] = max(row["peak_rss_bytes"], run["peak_rss_bytes"])
    for row in results.values():
        row["examples_per_second"] = done[0][2]["examples"] / statistics.median(row["seconds_all"])
        row["eval_loss"] = statistics.mean(row["eval_losses"])
    counts = {key: done[0][2][key] for key in ("examples", "tokens", "supervised_tokens")}
    held = {key: held_out[key] for key in ("examples", "supervised_tokens")}
    return {"data": counts, "held_out": held, "eval_loss_before": held_out["losses"][0], "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=160, help="training examples; a quarter as many are held out")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--padding-free", action="store_true", help="also TRL with padding-free batches")
    parser.add_argument("--minutes", type=float, default=60, help="give up after this time")
    parser.add_argument("--out", type=Path, help="file for the figures (default: results/train_end_to_end.json)")
    for name in ("--worker", "--folder", "--names"):
        parser.add_argument(name, nargs="*" if name == "--names" else None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        answer = worker(args.worker, Path(args.folder), args.names, args.epochs, args.examples)
        Path(args.folder, "answer.json").write_text(json.dumps(answer))
        return
    path = args.out or RESULTS / f"{Path(__file__).stem}.json"
    if path.is_file() and json.loads(path.read_text())["setting"]["examples"] > args.examples:
        parser.error(f"{path.name} rests on more examples: give as many, or --out FILE")
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(Path(scratch), args)
    setting = SETTING | {"examples": args.examples, "epochs": args.epochs}
    save(Path(__file__).stem, {"machine": describe_machine(), "setting": setting, **measured}, path)


if __name__ == "__main__":
    main()
