"""What a GGUF file says: its logits by llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ..parity import WINDOW, reference_text

_F32 = 0  # ggml's number for it


def has_llama() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec("llama_cpp") is not None


def open_llama(path: Path, lora: Path | None = None, *, context: int = WINDOW) -> Any:
    """llama.cpp with a model and perhaps an adapter; keys and values in float32, as transformers has them."""
    from llama_cpp import Llama

    return Llama(
        str(path),
        lora_path=None if lora is None else str(lora),
        n_ctx=context,
        n_batch=context,
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )


def llama_logits(llama: Any, ids_T: Tensor) -> Iterator[Tensor]:
    """Logits [W, V] in float32 of one window after the other, laid out as ``parity.window_logits`` does."""
    for ids_W in ids_T.split(WINDOW):
        llama.reset()
        llama.eval(ids_W.tolist())
        yield torch.from_numpy(llama.scores[: len(ids_W)].copy())


def run(
    path: Path, ids_T: Tensor, tokenizer: PreTrainedTokenizerBase | None, lora: Path | None = None
) -> Iterator[Tensor]:
    """``llama_logits`` of a file. With a tokenizer, ``UserError`` where llama.cpp cuts text into other tokens."""
    with closing(open_llama(path, lora)) as llama:
        if tokenizer is not None:
            _check_tokens(llama, tokenizer)
        yield from llama_logits(llama, ids_T)


def _check_tokens(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    text = reference_text()
    ours: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs: list[int] = llama.tokenize(text.encode(), add_bos=False, special=False)
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"llama.cpp cuts text into other tokens than the tokenizer, from token {at} of the reference text on "
            f"({tokenizer.decode(ours[at : at + 4])!r}); export the adapter alone, for a base that others converted"
        )
