"""A merged model as a plain ``transformers`` checkpoint, which needs nothing of this project to be loaded.

    config.json               the model's; ``tie_word_embeddings`` false where merging took head and embedding apart;
                              nothing of any quantisation
    model*.safetensors        in shards, with their index
    generation_config.json, tokenizer, chat template, licence     the base's own files, byte for byte (a GGUF base's: as
                              transformers writes them); those that lie beside the adapter come before the base's, since
                              the adapter was trained with them

Writing is the caller's folder's business: ``files.new_folder`` makes it appear whole or not at all.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, short
from ..nn.locate import BaseInfo

ALONG = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)
"""Files of a base that belong to the checkpoint beside weights and config."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])i?B", re.IGNORECASE)
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def save_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: BaseInfo | None,
    adapter: Path | None = None,
    shard_size: int = 5 * 10**9,
) -> None:
    """Write the model, which holds no adapters any more, and all that belongs to it, into an empty folder.

    ``base`` is where the model came from before anything was merged into it (None: the tokenizer is written anew), and
    ``adapter`` the folder of what was merged. No file of weights has more than ``shard_size`` bytes, unless one tensor
    has.
    """
    # What the base's own file says is copied below; transformers would refuse to write it where it contradicts itself.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    finally:
        model.generation_config = own
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that nobody else may read
    if base is None or base.gguf is not None:
        tokenizer.save_pretrained(folder)
    else:
        _copy(base.folder, folder)
    if adapter is not None and adapter.is_dir():
        _copy(adapter, folder)


def shard_bytes(text: str) -> int:
    """A size in words as bytes. Raises ``UserError`` for anything but a number with a unit."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size < 10**5:
        raise UserError(f"shard size {short(text)}: expected a number and a unit, such as 5GB or 500MB (100KB or more)")
    return size


def _copy(source: Path, target: Path) -> None:
    for pattern in ALONG:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
