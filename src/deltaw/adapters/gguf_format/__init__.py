"""GGUF, the files of llama.cpp and Ollama: an adapter, or a whole model with an adapter merged in.

layout.py       names and forms of tensors, and what of a config llama.cpp can compute
tensors.py      tensors of a file, one at a time, in float32, float16, bfloat16 or 8 bits
metadata.py     a config as metadata
vocabulary.py   a tokenizer as metadata
adapter.py      a LoRA adapter, and back
merged.py       a model, and back
check.py        logits by llama.cpp
modelfile.py    Ollama's Modelfile
export.py       all of it, with the proof

The ``gguf`` package reads and writes the container, names the tensors and packs the numbers. It has no converter: what
a tensor of a checkpoint is in llama.cpp's form is said here.
"""

from .adapter import Factors, factors_of, read_adapter_gguf, stored_of, with_one_alpha, write_adapter_gguf
from .check import has_llama
from .export import Export, Plan, export_adapter, export_merged
from .layout import Layout
from .merged import read_model_gguf, write_model_gguf

__all__ = [
    "Export",
    "Factors",
    "Layout",
    "Plan",
    "export_adapter",
    "export_merged",
    "factors_of",
    "has_llama",
    "read_adapter_gguf",
    "read_model_gguf",
    "stored_of",
    "with_one_alpha",
    "write_adapter_gguf",
    "write_model_gguf",
]
