"""A GGUF file's tensors, still to be read, for a model that is quantised while it loads.

``transformers`` knows GGUF's names and how each architecture's tensors are laid out, but unpacks the whole file at
once. Here its parts are used one tensor at a time: from blocks through one dense copy into our codes. Architectures
whose tensors depend on each other (experts that are gathered) go over a converted folder (``nn/load``).
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

_ONE_BY_ONE = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "nemotron")
"""Architectures, as GGUF calls them, whose every tensor is one of the model's."""


@cache
def is_readable(path: Path) -> bool:
    """Whether the file can be read tensor by tensor; False for a damaged one as well, which converting will name."""
    try:
        return _architecture(GGUFReader(path)) in _ONE_BY_ONE
    except Exception:  # whatever a damaged byte leads it to
        return False


def unread_tensors(path: Path, bare: nn.Module) -> dict[str, Any]:
    """The file's tensors by the names that they have in the model (which may be on the meta device)."""
    reader = GGUFReader(path)
    config: Any = bare.config
    kind: Any = TENSOR_PROCESSORS.get(_architecture(reader), TensorProcessor)
    processor = kind(config=config.to_dict())
    names = get_gguf_hf_weights_map(bare, processor)
    return {names[t.name]: _Unread(reader, t, processor) for t in reader.tensors if t.name in names}


class _Unread:
    """Unpacked where transformers would move it to its device and dtype."""

    def __init__(self, reader: Any, tensor: Any, processor: Any) -> None:
        self._reader, self._tensor, self._processor = reader, tensor, processor

    def __getitem__(self, index: object) -> _Unread:
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        values = dequantize(self._tensor.data, self._tensor.tensor_type)
        values = self._processor.process(weights=values, name=self._tensor.name).weights
        dense = torch.from_numpy(np.array(values)).to(device=device, dtype=dtype)
        self._reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # else the whole file would stay resident
        return dense


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())
