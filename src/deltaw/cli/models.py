"""A base with an adapter on it, as the reading verbs want it."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.peft_format import load_adapter, read_adapter
from ..errors import UserError
from ..nn.load import load_base

log = logging.getLogger("deltaw")


def load_model(
    model: str | None, adapter: str | None, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base (the adapter's own where none is named), with the adapter active and its receipt told."""
    if adapter is None:
        return load_base(model or "smollm2-135m", dtype=dtype, device=device)
    stored = read_adapter(adapter)
    base = model or stored.provenance.base_name or stored.config.base_model_name_or_path
    if base is None:
        raise UserError(f"{adapter} doesn't say which base it was trained on; give it with --model")
    network, tokenizer = load_base(base, dtype=dtype, device=device)
    receipt = load_adapter(network, stored, "adapter")
    log.info("%s on %s: %s", Path(adapter).name, base, receipt)
    return network, tokenizer
