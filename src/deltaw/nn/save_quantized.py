"""A model in 4 bits as a checkpoint folder: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..files import new_folder
from .load import base_info
from .locate import ORIGIN, first_line
from .quantized import num_quantized


def save_quantized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, shard_size: str = "2GB"
) -> None:
    """Write model, tokenizer (chat template), generation settings and the identity of the base into a new folder.

    ``out`` must not exist, or be empty. Raises ``UserError`` for a model that isn't quantised, for a dense tensor that
    isn't finite (by name), and where the disk is full; then there is no ``out``.
    """
    if not num_quantized(model):
        raise UserError(f"{type(model).__name__} has no layer in 4 bits; load it with quantization='nf4'")
    for name, parameter in model.named_parameters():
        if not all(bool(part.isfinite().all()) for part in parameter.detach().split(4096)):
            raise UserError(f"{name}: the tensor holds infinities or nans; repair the weights first")
    info = base_info(model)
    if info is not None:
        setattr(model.config, ORIGIN, info.sha256)
    try:
        with new_folder(out) as scratch:
            model.save_pretrained(scratch, max_shard_size=shard_size)
            tokenizer.save_pretrained(scratch)
            for file in scratch.iterdir():
                os.chmod(file, (scratch / "config.json").stat().st_mode)  # weights come out for their owner alone
    except SafetensorError as error:
        raise UserError(f"{out}: can't be written ({first_line(error)}); check rights and space") from None
