"""Merging and blending: seconds and extra memory, PEFT and this project on the same models, in the same run.

    python benchmarks/algebra.py [--rounds 5] [--models smollm2-135m llama-1b]

Models: SmolLM2-135M, and a random Llama of 1.1 billion parameters (hidden 2048, 22 layers), written to a temporary
folder; both bfloat16. Adapters: two, float32, r=16, on all seven projections of every layer; for svd, which in PEFT
decomposes a whole ΔW a module, on the first two layers only.

Each figure comes from a process of its own, which loads model and adapters, runs a forward (so that every page of the
weights is resident), and then does one thing once. Processes alternate between the libraries. Extra memory is the peak
of resident memory while it is done, less what was resident before. Logits of both libraries are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import describe_machine, environment, peak_rss_bytes, rss_bytes, save

LIBRARIES = ("PEFT", "deltaw")
ACTIONS = {
    "merge_and_unload": {},
    "blend, cat": {"combination_type": "cat"},
    "blend, linear": {"combination_type": "linear"},
    "blend, ties": {"combination_type": "ties", "density": 0.5},
    "blend, svd (2 layers)": {"combination_type": "svd", "svd_rank": 16},
}
SHAPE = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
MODELS = ("smollm2-135m", "llama-1b")
WEIGHTS = [0.7, 0.3]


def write_model(name: str, folder: Path) -> None:
    """The base in transformers' format, and adapters a, b (all layers) and c, d (the first two), random."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deltaw import LoraConfig, load_base
    from deltaw.adapters.peft_format import save_adapter
    from deltaw.nn.inject import inject, restore

    if name == "llama-1b":
        sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, vocab_size=32000)
        config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model, _ = load_base(name, dtype="bfloat16")
    model.save_pretrained(folder / "base")
    for seed, adapter in enumerate("abcd"):
        torch.manual_seed(seed)
        layers = [0, 1] if adapter in "cd" else None
        inject(model, LoraConfig(init_lora_weights=False, layers_to_transform=layers, **SHAPE))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        save_adapter(model, folder / adapter)
        restore(model)


def worker(library: str, action: str, folder: Path) -> None:
    """Do one thing once, and print what it took."""
    import torch
    from transformers import AutoModelForCausalLM

    wrap = __import__({"PEFT": "peft", "deltaw": "deltaw"}[library]).PeftModel
    names = "cd" if "svd" in action else "ab"
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = wrap.from_pretrained(base, folder / names[0], adapter_name=names[0])
    model.load_adapter(folder / names[1], adapter_name=names[1])
    ids = torch.arange(100, 108)[None]
    with torch.no_grad():
        model(input_ids=ids)
    largest = max(p.numel() for n, p in base.named_parameters() if "lora" not in n and "layers" in n)
    before = _reset_peak()
    started = time.perf_counter()
    if action == "merge_and_unload":
        result = model.merge_and_unload()
    else:
        model.add_weighted_adapter([*names], WEIGHTS, "blend", **ACTIONS[action])
        result = model
    seconds = time.perf_counter() - started
    extra = peak_rss_bytes() - before
    if action != "merge_and_unload":
        model.set_adapter("blend")
    with torch.no_grad():
        logits = result(input_ids=ids).logits[0, -1, :8].tolist()
    figures = {"seconds": seconds, "extra_bytes": extra, "largest_layer_elements": largest, "logits": logits}
    print(json.dumps(figures), flush=True)


def _reset_peak() -> int:
    """Resident bytes now; the peak is counted from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return rss_bytes()


def measure(folder: Path, rounds: int) -> dict[str, dict[str, dict[str, object]]]:
    """action → library → seconds and extra bytes: medians, and all."""
    found: dict[str, dict[str, list[dict]]] = {a: {library: [] for library in LIBRARIES} for a in ACTIONS}
    for number in range(rounds):
        for action, by_library in found.items():
            for library in LIBRARIES:
                command = [sys.executable, __file__, "--worker", library, "--action", action, "--folder", str(folder)]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800, env=environment()
                )
                by_library[library].append(json.loads(done.stdout.splitlines()[-1]))
                row = by_library[library][-1]
                print(
                    f"  {number + 1}: {action}, {library}: {row['seconds']:.2f} s, {row['extra_bytes'] / 1e6:.0f} MB",
                    file=sys.stderr,
                )
    out: dict[str, dict[str, dict[str, object]]] = {}
    for action, by_library in found.items():
        theirs, ours = (by_library[library][0]["logits"] for library in LIBRARIES)
        out[action] = {
            library: {
                "seconds": statistics.median(row["seconds"] for row in rows),
                "seconds_all": [row["seconds"] for row in rows],
                "extra_bytes": statistics.median(row["extra_bytes"] for row in rows),
                "largest_layer_float32_bytes": 4 * rows[0]["largest_layer_elements"],
                "largest_logit_difference": max(abs(x - y) for x, y in zip(theirs, ours, strict=True)),
            }
            for library, rows in by_library.items()
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--worker")
    parser.add_argument("--action")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.action, args.folder)
        return
    results = {}
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="deltaw-algebra-") as scratch:
            print(name, file=sys.stderr)
            command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import algebra, pathlib; "
            command += f"algebra.write_model({name!r}, pathlib.Path({scratch!r}))"
            subprocess.run([sys.executable, "-c", command], check=True, env=environment())  # its memory goes with it
            results[name] = measure(Path(scratch), args.rounds)
    setting = {"rounds": args.rounds, "dtype": "bfloat16", "weights": WEIGHTS, **SHAPE}
    save(Path(__file__).stem, {"machine": describe_machine(), "setting": setting, "results": results})


if __name__ == "__main__":
    main()
