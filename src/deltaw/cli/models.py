"""A base with an adapter on it, as the reading verbs want it."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.peft_format import StoredAdapter, load_adapter, read_adapter
from ..errors import UserError
from ..nn.load import load_base

log = logging.getLogger("deltaw")

DEFAULT_BASE = "smollm2-135m"


def load_model(
    model: str | None, adapter: str | StoredAdapter | None, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base (the adapter's own where none is named), with the adapter active and its receipt told."""
    stored = read_adapter(adapter) if isinstance(adapter, str) else adapter
    base = model or (DEFAULT_BASE if stored is None else base_of(stored))
    log.info("loading %s", base)
    network, tokenizer = load_base(base, dtype=dtype, device=device)
    if stored is not None:
        log.info("%s: %s", stored.path, load_adapter(network, stored, "adapter"))
    return network, tokenizer


def base_of(stored: StoredAdapter) -> str:
    """The base that an adapter was trained on, as its files say. Raises ``UserError`` where they don't."""
    base = stored.provenance.base_name or stored.config.base_model_name_or_path
    if base is None:
        raise UserError(f"{stored.path} doesn't say which base it was trained on; give it with --model")
    return base
