"""Names of PEFT's files and of the tensors in them: the only place that knows its keys.

    base_model.model.{module}.lora_A.weight             [r, in]      lora_embedding_A without ".weight" [r, vocab]
    base_model.model.{module}.lora_B.weight             [out, r]     lora_embedding_B [hidden, r]
    base_model.model.{module}.lora_magnitude_vector     [out]        (DoRA)
    base_model.model.{module}.base_layer.bias           [out]        (trained biases; without base_layer elsewhere)
    base_model.model.{module}.{weight, bias …}                       (modules_to_save)
    base_model.model.{module}.token_adapter.trainable_tokens_delta   [tokens, hidden]
    base_model.model.{module}.lora_A.weight             [experts·r, in]     lora_B [out, r·experts]  (bare parameters)

Of several bare parameters in one module, the last has these keys, the one before it {module}.base_layer.lora_A.weight,
and so on inwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
"""What old versions of PEFT wrote; read as data only, never written."""

PREFIX = "base_model.model."
"""Before every key: the path through PEFT's two wrappers."""

ROWS = "token_adapter.trainable_tokens_delta"
"""Under an embedding's name: the rows that train."""

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
_DOUBLES = (".original_module.bias", ".modules_to_save.bias")
"""With ``bias="all"`` PEFT writes the bias of a module that is saved whole twice more, by the names of its wrapper."""


def factor_keys(module: str, *, is_embedding: bool = False) -> tuple[str, str, str]:
    """Keys of A, B and the magnitude of one layer."""
    kind, end = ("lora_embedding_", "") if is_embedding else ("lora_", ".weight")
    own = f"{PREFIX}{module}."
    return f"{own}{kind}A{end}", f"{own}{kind}B{end}", f"{own}lora_magnitude_vector"


def bias_key(bias: str, *, is_adapted: bool) -> str:
    """Key of a trained bias, of a layer that is adapted or of another module."""
    return f"{PREFIX}{bias.removesuffix('.bias')}.base_layer.bias" if is_adapted else f"{PREFIX}{bias}"


def parameter_paths(module: str, parameters: Sequence[str]) -> dict[str, str]:
    """Where the factors of a module's bare parameters stand in the file."""
    return {p: module + depth * ".base_layer" for depth, p in enumerate(reversed(parameters))}


def is_double(key: str) -> bool:
    """Whether the tensor stands under another key as well."""
    return key.endswith(_DOUBLES)


def is_embedding_key(key: str) -> bool:
    """Whether the tensor is a factor of an embedding."""
    return re.search(r"\.lora_embedding_[AB]$", key) is not None


def split_key(key: str) -> tuple[str | None, str]:
    """(module, part of ``LowRank``) of a factor; (None, name in the model without adapters) of anything else."""
    own = key.removeprefix(PREFIX)
    match = _FACTOR.fullmatch(own)
    if match is None:
        return None, own.replace(".base_layer.", ".")
    return match["module"], match["part"].replace("embedding_", "")
