"""QLoRA in figures: bits, peak memory while loading, products, a training step, and what four bits do to a model.

    python benchmarks/qlora.py [--only storage load dequantise product step quality] [--rounds 7] [--steps 60]

storage      bits a weight, counted from the tensors in memory
load         a random Llama of 1.1 billion parameters, written to disk in shards, loaded in NF4: peak memory, seconds
dequantise   10⁹ weights a second, NF4 → bfloat16, beside a copy of that size
product      milliseconds of one row times W [N, N], beside the dense product in bfloat16
step         a training step over 1,024 tokens: dense and NF4, and PEFT over bitsandbytes
quality      loss on held-out text in every storage before training, and after the same training over dense and NF4

bitsandbytes runs in the same run as this project, in turn, on the same weights. What has a peak has a process of its
own. A part that is run alone leaves the figures of the others in place. About twelve minutes on two slow cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _common import RESULTS, describe_machine, environment, peak_rss_bytes, rss_bytes, save

KINDS = ("nf4", "nf4-single", "fp4", "int4")
PARTS = ("storage", "load", "dequantise", "product", "step", "quality")
MERGED = ("dense bfloat16", "quantised anew")
SHAPE = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LARGE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=49_152, max_position_embeddings=2048)  # fmt: skip
SMALL = LARGE | dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)  # fmt: skip
ROOT = Path(__file__).parents[1]


def storage(args: argparse.Namespace) -> dict[str, Any]:
    """Of the real model, and of one matrix that is large enough for the scales' scales not to show."""
    import torch

    from deltaw import load_base
    from deltaw.nn.load import base_bytes
    from deltaw.nn.quantized import num_quantized, quantized_bytes
    from deltaw.ops.quantized import METHODS

    size = 128 if args.tiny else 4096
    w_NK = torch.randn(size, size, dtype=torch.bfloat16)
    dense, _ = load_base("smollm2-135m")
    out: dict[str, Any] = {"model": "smollm2-135m", "dense_bytes": base_bytes(dense), "kinds": {}}
    del dense
    for kind in KINDS:
        one = METHODS[kind].quantize(w_NK)
        row: dict[str, Any] = {"matrix_bits": 8 * one.nbytes / w_NK.numel()}
        for name, head in (("", False), ("_with_head", True)):
            model, _ = load_base("smollm2-135m", quantization=kind, quantize_head=head)
            row[f"bits{name}"] = 8 * quantized_bytes(model) / num_quantized(model)
            row[f"model_bytes{name}"] = base_bytes(model)
            del model
        out["kinds"][kind] = row
    return out


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks, each in a process of its own; then the 4-bit model as it was saved, once more."""
    with tempfile.TemporaryDirectory(prefix="deltaw-qlora-") as scratch:
        folder, saved = Path(scratch) / "dense", Path(scratch) / "saved"
        largest = write_llama(folder, SMALL if args.tiny else LARGE)
        say(f"  {sum(p.stat().st_size for p in folder.glob('*.safetensors')) / 1e9:.2f} GB in shards written")
        rows = {}
        for name in ("deltaw", "bitsandbytes", "deltaw, saved in 4 bits"):
            where = saved if name.endswith("bits") else folder
            rows[name] = in_a_process("load", name=name, folder=str(where), saved=str(saved))
            say(f"  {name}: {rows[name]['seconds']:.1f} s, peak {rows[name]['peak_rss_bytes'] / 1e9:.2f} GB")
    allowed = rows["deltaw"]["model_bytes"] + 2 * largest + 300 * 10**6
    return {"largest_tensor_bytes": largest, "allowed_bytes": allowed, "rows": rows}


def write_llama(folder: Path, shape: Mapping[str, int]) -> int:
    """A random Llama in a shard a layer, tensor by tensor; bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deltaw.nn.load import load_tokenizer

    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(f"{parts[2]:0>3}" if parts[1] == "layers" else "ends", []).append(name)
    folder.mkdir()
    config.save_pretrained(folder)
    load_tokenizer("smollm2-135m")[0].save_pretrained(folder)
    places = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        save_file({n: torch.randn(shapes[n]).mul_(0.02).bfloat16() for n in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(2 * size.numel() for size in shapes.values())


def load_worker(name: str, folder: str, saved: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from deltaw.nn.load import base_bytes, load_base

    before = rss_bytes()
    started = time.perf_counter()
    if name == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    else:
        model, tokenizer = load_base(folder, quantization="nf4" if name == "deltaw" else None)
    seconds, peak = time.perf_counter() - started, peak_rss_bytes()
    if name == "deltaw":
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    return {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "rss_before_bytes": before,
        "model_bytes": base_bytes(model),
    }


def dequantise(args: argparse.Namespace) -> dict[str, Any]:
    """NF4 as QLoRA stores it and with plain scales: one matrix, into new memory, and again as products do it here: into
    memory that is there already (bitsandbytes has no such way on CPUs). New memory measures the system's pages as well.
    """
    import torch

    from deltaw.ops.nf4 import dequantize

    size = 256 if args.tiny else 4096
    torch.manual_seed(0)
    w_NK = torch.randn(size, size).bfloat16()
    out_NK = torch.empty_like(w_NK)
    actions: dict[str, Callable[[], object]] = {
        "copy of bfloat16": w_NK.clone,
        "copy of bfloat16, in place": lambda: out_NK.copy_(w_NK),
    }
    for kind in ("nf4", "nf4-single"):
        ours, theirs = both(w_NK, kind)
        assert torch.equal(ours.dequantize(), theirs.dequantize()), kind
        actions |= {f"deltaw {kind}": ours.dequantize, f"bitsandbytes {kind}": theirs.dequantize}
        actions[f"deltaw {kind}, in place"] = lambda q=ours.quantized: dequantize(q, out=out_NK)
    seconds = in_turn(actions, args.rounds, repeat=5)
    return {"size": size, "rows": {name: figures(times, w_NK.numel() / 1e9) for name, times in seconds.items()}}


def product(args: argparse.Namespace) -> dict[str, Any]:
    """One row, as in decoding, at hidden sizes of small and of large models."""
    import torch
    import torch.nn.functional as F

    out = {}
    for size in (64, 128) if args.tiny else (576, 1024, 2048, 4096, 8192):
        torch.manual_seed(size)
        w_NK, x_1K = torch.randn(size, size).mul_(0.02).bfloat16(), torch.randn(1, size).bfloat16()
        ours, theirs = both(w_NK, "nf4")
        far = (ours.multiply(x_1K) - F.linear(x_1K, ours.dequantize())).abs().max()
        assert far < 0.05, (size, far)
        actions: dict[str, Callable[[], object]] = {
            "dense bfloat16": lambda x=x_1K, w=w_NK: F.linear(x, w),
            "deltaw nf4": lambda x=x_1K, w=ours: w.multiply(x),
            "bitsandbytes nf4": lambda x=x_1K, w=theirs: w.layer(x),
        }
        with torch.no_grad():
            seconds = in_turn(actions, args.rounds, repeat=max(3, 2 * 10**7 // size**2))
        out[str(size)] = {name: figures(times) for name, times in seconds.items()}
        say(f"  {size}: " + ", ".join(f"{name} {1e3 * row['seconds']:.3f} ms" for name, row in out[str(size)].items()))
    return {"sizes": out}


class _Theirs:
    """bitsandbytes' layer with the weight of one of ours."""

    def __init__(self, w_NK: Any, kind: str) -> None:
        import bitsandbytes as bnb

        given: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": kind == "nf4"}
        layer = bnb.nn.Linear4bit(w_NK.shape[1], w_NK.shape[0], bias=False, **given)
        layer.weight = bnb.nn.Params4bit(w_NK.clone(), requires_grad=False, **given)
        layer.compute_dtype = w_NK.dtype
        self.layer = layer.to("cpu").eval()
        self._dequantize = bnb.functional.dequantize_4bit
        self._state = self.layer.weight.data, self.layer.weight.quant_state

    def dequantize(self) -> Any:
        return self._dequantize(*self._state)


def both(w_NK: Any, kind: str) -> tuple[Any, _Theirs]:
    """One weight in this project's storage and in bitsandbytes' layer, which repacks it when it is first used."""
    from deltaw.ops.quantized import METHODS, QuantizedWeight

    return QuantizedWeight(METHODS[kind].quantize(w_NK)), _Theirs(w_NK, kind)


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Workers side by side that step in turn, a model at a time."""
    out = {}
    tokens = {"rows": 2, "tokens": 16} if args.tiny else {"rows": 4, "tokens": 256}
    names = ("deltaw, dense", "deltaw, NF4", "deltaw, NF4, checkpointing", "PEFT, bitsandbytes NF4")
    with tempfile.TemporaryDirectory(prefix="deltaw-qlora-") as scratch:
        for title in ("tiny",) if args.tiny else ("smollm2-135m", "Llama blocks"):
            folder = Path(scratch) / "model"
            _save_model(title, folder)
            rows = _steps_in_turn(names, args.rounds, folder=str(folder), **tokens)
            out[title] = {name: rows[name] for name in names}
            shutil.rmtree(folder)
    return {"setting": tokens | SHAPE, "models": out}


def _save_model(name: str, folder: Path) -> None:
    """A dense model in transformers' format, for every library to read."""
    import _steps

    from deltaw.nn.load import load_tokenizer

    model = _steps.load_model(name, "bfloat16")
    if model.config.vocab_size < 49_152:  # of random models only their size counts
        model.config.eos_token_id = model.config.bos_token_id = 1
    model.save_pretrained(folder)
    load_tokenizer("smollm2-135m")[0].save_pretrained(folder)


def step_worker(name: str, folder: str, rows: int, tokens: int) -> Callable[[], float]:
    import _steps
    import torch

    from deltaw import load_base

    options: dict[str, Any] = {"gradient_checkpointing": True} if "checkpointing" in name else {}
    shared: Any = {"model": folder, "dtype": "bfloat16", "rows": rows, "tokens": tokens, "adapter": SHAPE}
    setting = _steps.Setting(kind="deltaw", options=options, **shared)
    if name.startswith("PEFT"):
        import peft
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                    bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **SHAPE)).train()
    else:
        model, _ = load_base(folder, quantization="nf4" if "NF4" in name else None)
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 100, (rows, tokens))
    return _steps._plain_step(model, ids) if name.startswith("PEFT") else _steps._deltaw(setting, model, ids)


def _steps_in_turn(names: tuple[str, ...], rounds: int, **given: Any) -> dict[str, dict[str, Any]]:
    workers: dict[str, subprocess.Popen[str]] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for name in names:
            command = [sys.executable, __file__, "--worker", json.dumps({"part": "step", "name": name, **given})]
            workers[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
            )
            answers[name].append(_answer(name, workers[name]))
            say(f"  {name}: ready, first loss {answers[name][0]['loss']:.4f}")
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.stdin.write("step\n")
                worker.stdin.flush()
                answers[name].append(_answer(name, worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {
        name: figures([answer["seconds"] for answer in given[1:]])
        | {"peak_rss_bytes": given[-1]["peak_rss_bytes"], "first_loss": given[0]["loss"]}
        for name, given in answers.items()
    }


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Chat pairs out of Python's documentation; whole modules are held out."""
    from deltaw.train.options import TrainOptions
    from deltaw.train.run import run_training

    with tempfile.TemporaryDirectory(prefix="deltaw-qlora-") as scratch:
        folder = Path(scratch)
        command = [sys.executable, str(ROOT / "examples" / "python_docs.py"), "--out", scratch, "--limit", "600"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
        held = folder / "heldout.jsonl"
        rows = held.read_text().splitlines(keepends=True)[: 4 if args.tiny else 60]
        held.write_text("".join(rows))
        usual: dict[str, Any] = dict(
            data=str(folder / "train.jsonl"), eval_data=str(held), max_length=512, micro_batch_tokens=1024,
            batch_size=1 if args.tiny else 4, max_steps=1 if args.tiny else args.steps, eval_every=0, save_every=0,
            r=16, learning_rate=5e-4, overwrite=True,
        )  # fmt: skip
        before = {kind: _held_out_loss(TrainOptions(**usual, quantization=kind)) for kind in ("none", *KINDS)}
        say("  before: " + ", ".join(f"{kind} {loss:.4f}" for kind, loss in before.items()))
        after = {}
        runs = {"dense": {}, "nf4": dict(quantization="nf4"),
                "nf4, loftq": dict(quantization="nf4", init_lora_weights="loftq")}  # fmt: skip
        for name, given in runs.items():
            summary = run_training(TrainOptions(**usual, **given, out=folder / "run"))
            keys = ("eval_loss_before", "eval_loss_after", "base_bytes", "train_seconds")
            after[name] = {key: summary[key] for key in keys}
            after[name]["quantised_base_sha256"] = _bound_to(folder / "run")
            say(f"  {name}: {summary['eval_loss_before']:.4f} → {summary['eval_loss_after']:.4f}")
            if name == "nf4":
                merged = {how: _merged(TrainOptions(**usual, **given), folder / "run", how) for how in MERGED}
        setting = {key: usual[key] for key in ("max_steps", "batch_size", "max_length", "r", "learning_rate")}
        setting["held_out"] = len(rows)
    return {"setting": setting, "before": before, "runs": after, "merged": merged}


def _held_out_loss(options: Any) -> float:
    from deltaw.train.evaluate import mean_loss
    from deltaw.train.forward import examine
    from deltaw.train.prepare import prepare

    prepared = prepare(options)
    return mean_loss(examine(prepared.model), prepared.eval.examples, options.micro_batch_tokens)[0]


def _merged(options: Any, run: Path, how: str) -> dict[str, Any]:
    """What merging the trained adapter into its 4-bit base loses: in the weights, in the logits, in the loss."""
    from deltaw.adapters import parity
    from deltaw.adapters.merge import merge_and_unload
    from deltaw.adapters.merge_loss import MergeLoss
    from deltaw.adapters.peft_format import load_adapter
    from deltaw.nn.load import base_bytes
    from deltaw.train.evaluate import mean_loss
    from deltaw.train.forward import examine
    from deltaw.train.prepare import prepare

    prepared, loss = prepare(options), MergeLoss()
    model, ids = prepared.model, parity.reference_ids(prepared.tokenizer)
    load_adapter(model, run)
    source_TV = parity.reference_logits(model, ids)
    merge_and_unload(model, requantize=how == "quantised anew", loss=loss)
    found = parity.parity_of(source_TV, parity.window_logits(model, ids))
    say(f"  merged, {how}: {found}")
    return {
        "weight_error": loss.weight_error,
        "change_error": loss.change_error,
        "mean_kl": found.mean_kl,
        "max_logit_difference": found.max_logit_difference,
        "equal_greedy": found.equal_greedy,
        "eval_loss": mean_loss(examine(model), prepared.eval.examples, options.micro_batch_tokens)[0],
        "model_bytes": base_bytes(model),
    }


def _bound_to(run: Path) -> str | None:
    from deltaw.adapters.peft_format import read_adapter

    return read_adapter(run).provenance.quantized_sha256


def in_turn(actions: Mapping[str, Callable[[], object]], rounds: int, *, repeat: int) -> dict[str, list[float]]:
    """Seconds of one call of each, all in turn in every round; after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for done in range(rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            for _ in range(repeat):
                action()
            if done:
                seconds[name].append((time.perf_counter() - started) / repeat)
    return seconds


def figures(seconds: list[float], giga: float | None = None) -> dict[str, Any]:
    """Median and all; ``giga``: 10⁹ entries that were worked on, for their number a second."""
    median = statistics.median(seconds)
    return {"seconds": median, "seconds_all": seconds} | ({} if giga is None else {"giga_per_second": giga / median})


def in_a_process(part: str, **given: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps({"part": part, **given})]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return json.loads(run.stdout.splitlines()[-1])


def work(part: str, **given: Any) -> None:
    """What a worker does: one answer, or one for every line on standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(**what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    if part == "load":
        answer(**load_worker(**given))
        return
    make_step = step_worker(**given)
    answer(loss=make_step())  # warm-up, which also allocates the optimiser's state
    for _ in sys.stdin:
        started = time.perf_counter()
        make_step()
        answer(seconds=time.perf_counter() - started, peak_rss_bytes=peak_rss_bytes())


def _answer(name: str, worker: subprocess.Popen[str]) -> dict[str, Any]:
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended without an answer (exit code {worker.wait()})")
    return json.loads(line)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quiet() -> None:
    """No bars: a benchmark's log is read as a file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each run of the quality table")
    parser.add_argument("--tiny", action="store_true", help="only to see that the script runs; needs --out")
    parser.add_argument("--out", type=Path, help="file for the figures (default: results/qlora.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(environment())
    _quiet()
    if args.worker:
        work(**json.loads(args.worker))
        return
    if args.tiny and args.out is None:
        parser.error("--tiny says nothing about speed and needs --out FILE")
    path = args.out or RESULTS / "qlora.json"
    parts = {"storage": storage, "load": load, "dequantise": dequantise, "product": product, "step": step,
             "quality": quality}  # fmt: skip
    for name in args.only:
        started = time.monotonic()
        say(name)
        found = parts[name](args)
        said = {"machine": describe_machine(), "rounds": args.rounds, "minutes": (time.monotonic() - started) / 60}
        kept = json.loads(path.read_text()) if path.is_file() else {}
        save("qlora", kept | {name: said | found}, path)


if __name__ == "__main__":
    main()
