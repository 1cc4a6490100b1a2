"""Tables of qlora.py's figures for ``report.py``: a function a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = {
    "none": "bfloat16",
    "nf4-single": "NF4",
    "nf4": "NF4, double quantisation",
    "fp4": "FP4",
    "int4": "INT4, symmetric",
}
"""In the order that QLoRA's table 4 has them."""


def part(name: str, machine: Callable[[dict], str], result: dict) -> str | None:
    """One part's table with the line about the machine; None where that part has not been run."""
    if name not in result:
        return None
    found = result[name]
    few = " Fewer than five rounds: a first impression." if found["rounds"] < 5 else ""
    return "\n".join([*_TABLES[name](found), "", f"{machine(found)}{few}"])


def storage(found: dict) -> list[str]:
    size = found["dense_bytes"]
    lines = [
        "| | bits a weight, 4096 × 4096 | bits a weight, the model's | whole model | and with head and embedding |",
        "|---|---:|---:|---:|---:|",
        f"| bfloat16 | 16 | 16 | {size / 1e6:.1f} MB | |",
    ]
    for kind, name in NAMES.items():
        if kind in found["kinds"]:
            row = found["kinds"][kind]
            whole, head = row["model_bytes"] / 1e6, row["model_bytes_with_head"] / 1e6
            bits = f"{row['matrix_bits']:.3f} | {row['bits']:.3f}"
            lines.append(f"| {name} | {bits} | {whole:.1f} MB | {head:.1f} MB |")
    return lines


def load(found: dict) -> list[str]:
    lines = ["| | seconds | peak memory | before loading | the model |", "|---|---:|---:|---:|---:|"]
    for name, row in found["rows"].items():
        sizes = (f"{row[key] / 1e9:.2f} GB" for key in ("peak_rss_bytes", "rss_before_bytes", "model_bytes"))
        lines.append(f"| {name} | {row['seconds']:.1f} | {' | '.join(sizes)} |")
    above = found["rows"]["deltaw"]["peak_rss_bytes"] - found["rows"]["deltaw"]["rss_before_bytes"]
    return [
        *lines,
        "",
        f"Above what the process had before loading: {above / 1e9:.2f} GB; the 4-bit model, twice its largest tensor "
        f"({found['largest_tensor_bytes'] / 1e6:.0f} MB) and 300 MB make {found['allowed_bytes'] / 1e9:.2f} GB.",
    ]


def dequantise(found: dict) -> list[str]:
    lines = [f"| {found['size']} × {found['size']} | ms | 10⁹ weights a second |", "|---|---:|---:|"]
    for name, row in found["rows"].items():
        lines.append(f"| {name} | {1e3 * row['seconds']:.2f} | {row['giga_per_second']:.2f} |")
    return lines


def product(found: dict) -> list[str]:
    names = list(next(iter(found["sizes"].values())))
    lines = [
        "| N × N | " + " | ".join(f"{name}, ms" for name in names) + " | against bitsandbytes | against dense |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for size, row in found["sizes"].items():
        dense, ours, theirs = (row[name]["seconds"] for name in names)
        ratios = f"{theirs / ours:.1f}× the speed | {dense / ours:.2f}×"
        lines.append(f"| {size} | " + " | ".join(f"{1e3 * s:.3f}" for s in (dense, ours, theirs)) + f" | {ratios} |")
    return lines


def step(found: dict) -> list[str]:
    lines = [
        "| | s | least to most | of the dense step's time | peak memory | first loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for model, rows in found["models"].items():
        lines.append(f"| **{model}** | | | | | |")
        dense = rows["deltaw, dense"]["seconds"]
        for name, row in rows.items():
            times = row["seconds_all"]
            share = f"{row['seconds'] / dense:.2f}"
            lines.append(
                f"| {name} | {row['seconds']:.2f} | {min(times):.2f} to {max(times):.2f} | {share} | "
                f"{row['peak_rss_bytes'] / 1e9:.2f} GB | {row['first_loss']:.4f} |"
            )
    return lines


def quality(found: dict) -> list[str]:
    before, runs = found["before"], found["runs"]
    after = {"none": runs["dense"]["eval_loss_after"], "nf4": runs["nf4"]["eval_loss_after"]}
    lines = ["| | held-out loss | over bfloat16 | after training |", "|---|---:|---:|---:|"]
    for kind, name in NAMES.items():
        trained = f"{after[kind]:.4f}" if kind in after else ""
        lines.append(f"| {name} | {before[kind]:.4f} | {before[kind] - before['none']:+.4f} | {trained} |")
    loftq = runs["nf4, loftq"]
    far = f"{loftq['eval_loss_before']:.4f} | {loftq['eval_loss_before'] - before['none']:+.4f}"
    lines.append(f"| NF4, double quantisation, LoftQ start | {far} | {loftq['eval_loss_after']:.4f} |")
    setting: dict[str, Any] = found["setting"]
    titles = ("merged into NF4", "weights move by", "of the adapter's change", "mean KL", "equal greedy tokens",
              "held-out loss", "model")  # fmt: skip
    merged = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for how, row in found["merged"].items():
        errors = f"{row['weight_error']:.2%} | {row['change_error']:.1%} | {row['mean_kl']:.2g}"
        rest = f"{row['equal_greedy']:.1%} | {row['eval_loss']:.4f} | {row['model_bytes'] / 1e6:.0f} MB"
        merged.append(f"| {how} | {errors} | {rest} |")
    return [
        *lines,
        "",
        f"{setting['held_out']} held-out pairs; {setting['max_steps']} steps of {setting['batch_size']} examples, "
        f"r={setting['r']}, all linear layers. After training NF4 is {after['nf4'] / after['none'] - 1:+.2%} from the "
        "dense base, "
        f"{loftq['eval_loss_after'] / after['none'] - 1:+.2%} with the LoftQ start.",
        "",
        *merged,
    ]


_TABLES: dict[str, Callable[[dict], list[str]]] = {
    "storage": storage,
    "load": load,
    "dequantise": dequantise,
    "product": product,
    "step": step,
    "quality": quality,
}
PARTS = tuple(_TABLES)
