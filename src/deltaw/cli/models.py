"""A base with an adapter on it, as the reading verbs want it."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.peft_format import StoredAdapter, load_adapter, read_adapter
from ..adapters.store import locate_adapter
from ..errors import UserError
from ..heap import return_memory
from ..nn.load import load_base
from .screen import counted

log = logging.getLogger("deltaw")

DEFAULT_BASE = "smollm2-135m"


def load_model(
    model: str | None,
    adapter: str | StoredAdapter | None,
    *,
    store: Path | None = None,
    dtype: str = "auto",
    quantization: str = "none",
    device: str = "auto",
    allow_other_base: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base (the adapter's own where none is named), with the adapter active and its receipt told.

    ``adapter`` as text is a path, a hub id, or a name in the store.
    """
    stored = read_adapter(locate_adapter(adapter, store)) if isinstance(adapter, str) else adapter
    base = model or (DEFAULT_BASE if stored is None else base_of(stored))
    log.info("loading %s", base)
    return_memory()
    try:
        with counted("loading the base") as progress:
            network, tokenizer = load_base(
                base, quantization=quantization, dtype=dtype, device=device, progress=progress
            )
    except UserError as error:
        if model or stored is None:
            raise
        raise UserError(f"{error} (the base that {stored.path} names; --model says where it is here)") from error
    if stored is not None:
        receipt = load_adapter(network, stored, "adapter", allow_other_base=allow_other_base)
        log.info("%s: %s", stored.path, receipt)
    return network, tokenizer


def base_of(stored: StoredAdapter) -> str:
    """The base that an adapter was trained on, as its files say. Raises ``UserError`` where they don't."""
    base = stored.provenance.base_name or stored.config.base_model_name_or_path
    if base is None:
        raise UserError(f"{stored.path} doesn't say which base it was trained on; give it with --model")
    return base
