"""Chat examples of real prose with varied lengths, for benchmarks: from examples/python_docs.py, by length.

Most docstrings are short. Here each band of lengths gives the same number of examples, so that a batch holds short and
long ones, as chat data do: about 225 tokens on average. Held-out examples come from other modules than training ones.
"""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "python_docs.py"

BANDS = ((50, 100), (100, 160), (160, 240), (240, 360), (360, 601))
"""Tokens of an example, rendered: from … up to, not including."""


def chats(num_train: int, num_heldout: int, tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out examples ({"messages": …}); the same for the same Python and tokenizer."""
    train, heldout = runpy.run_path(str(EXAMPLE))["build"]()
    return _chosen(train, num_train, tokenizer), _chosen(heldout, num_heldout, tokenizer)


def rendered(examples: list[dict[str, Any]], tokenizer: Any) -> list[Any]:
    """As ``deltaw train`` renders them: ids, and which of them are learnt (the assistant's)."""
    from deltaw.data.formats import Chat
    from deltaw.data.render import render

    return [render(Chat(messages=tuple(e["messages"]), origin=str(i)), tokenizer) for i, e in enumerate(examples)]


def _chosen(examples: list[dict[str, Any]], count: int, tokenizer: Any) -> list[dict[str, Any]]:
    rng = random.Random(0)
    lengths = [len(tokens.input_ids) for tokens in rendered(examples, tokenizer)]
    chosen = []
    for i, (least, most) in enumerate(BANDS):
        band = [example for example, length in zip(examples, lengths, strict=True) if least <= length < most]
        wanted = (count + i) // len(BANDS)
        if wanted > len(band):
            raise SystemExit(f"only {len(band)} examples have {least} to {most - 1} tokens; {wanted} are wanted")
        chosen += rng.sample(band, wanted)
    rng.shuffle(chosen)
    return chosen
