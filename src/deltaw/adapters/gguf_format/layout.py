"""How llama.cpp names and lays out the tensors of a model, and what of a config it can say.

    name        gguf.TensorNameMap:  model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight
    rows        Llama's q and k: each head's D rows go from [2, D/2] to [D/2, 2], since llama.cpp rotates neighbours
                where transformers rotates halves; B of an adapter is permuted like the weight's rows, A is not
    norms       Gemma computes x·(1 + w), llama.cpp x·w: norms are stored plus one
    head        a tied head is no tensor of its own; Gemma 1 and 2 have no other kind

What llama.cpp would compute otherwise than transformers (another activation, attention scale or kind of rotation) is
refused by name; sliding windows of architectures that llama.cpp gives none limit the context, within which both agree.

Not in here: experts, fused projections, models with images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UserError
from ...nn.walk import base_of, logical_modules

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's factors per frequency: a tensor that no checkpoint has."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes an architecture of llama.cpp."""

    arch: MODEL_ARCH
    activations: tuple[str, ...] = ("silu",)
    permutes: bool = False
    """Whether rows of q and k change places."""
    norm_shift: float = 0.0
    """What is added to norms."""
    has_head: bool = True
    """Whether there is a tensor for a head of its own."""
    period: int | None = None
    """Every so many layers one attends to everything and the others to a window; None: all to everything."""

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


_GELU = ("gelu_pytorch_tanh", "gelu")  # Gemma 1 says gelu and means the other
FAMILIES = {
    "llama": Family(arch=MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Family(arch=MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Family(arch=MODEL_ARCH.QWEN2),
    "qwen3": Family(arch=MODEL_ARCH.QWEN3),
    "gemma": Family(arch=MODEL_ARCH.GEMMA, activations=_GELU, norm_shift=1.0, has_head=False),
    "gemma2": Family(arch=MODEL_ARCH.GEMMA2, activations=_GELU, norm_shift=1.0, has_head=False, period=2),
    "gemma3_text": Family(arch=MODEL_ARCH.GEMMA3, activations=_GELU, norm_shift=1.0, period=6),
}
"""By ``model_type`` of the config."""


def family_of(config: Any) -> Family:
    """The family of a model; ``UserError`` for a config that llama.cpp would compute otherwise, with all reasons."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"export to GGUF knows {', '.join(FAMILIES)}; this is {config.model_type!r}")
    head_dim = head_dim_of(config)
    wrong = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in family.activations:
        wrong.append(f"activation {activation!r} (llama.cpp: {family.activations[0]})")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        # llama.cpp knows the scale of the 27B models by their number of layers, and no other.
        expected = (
            config.hidden_size // config.num_attention_heads if config.num_hidden_layers in (46, 62) else head_dim
        )
        if scalar != expected:
            wrong.append(f"query_pre_attn_scalar {scalar} (llama.cpp: {expected})")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [value for value in ropes.values() if isinstance(value, dict)] or [ropes]:
        if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
            wrong.append(f"rope_type {rope['rope_type']!r} (expected default, linear, llama3 or yarn)")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            wrong.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (llama.cpp: 1)")
    if wrong:
        raise UserError(f"{config.model_type}: llama.cpp can't compute this config: {'; '.join(wrong)}")
    return family


def head_dim_of(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class Layout:
    """Names and forms of one model's tensors, both ways."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ``UserError`` for a model of another family. Reads no weight; the model may be on the meta device."""
        self.config: Any = model.config
        self.family = family_of(model.config)
        self._map = get_tensor_name_map(self.family.arch, self.config.num_hidden_layers)
        embedding, head = base_of(model.get_input_embeddings()), base_of(model.get_output_embeddings())
        self.is_tied = head.weight is embedding.weight
        self.tensors = _parameters(model)
        """The base's own parameters, whatever adapters stand beside them; tied ones under each of their names."""

    def gguf_name(self, name: str) -> str:
        """llama.cpp's name of a parameter, or ``UserError``."""
        own = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise UserError(f"{name}: no tensor of llama.cpp's {self.family.name}; it can't be exported")
        return own

    @cached_property
    def parameters(self) -> dict[str, str]:
        """llama.cpp's name → the model's, for every parameter but a tied head."""
        kept = [name for name in self.tensors if not (self.is_tied and name == "lm_head.weight")]
        return {self.gguf_name(name): name for name in kept}

    def to_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter in llama.cpp's form, float32. For B [N, R] of an adapter: the weight's name."""
        return self._rows(name, self._shifted(name, tensor.detach().float(), 1), _halves_to_pairs)

    def from_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of ``to_gguf``."""
        return self._shifted(name, self._rows(name, tensor.float(), _pairs_to_halves), -1)

    def _shifted(self, name: str, tensor: Tensor, sign: int) -> Tensor:
        is_norm = self.family.norm_shift != 0 and name.endswith("norm.weight")
        return tensor + sign * self.family.norm_shift if is_norm else tensor

    def _rows(self, name: str, tensor: Tensor, permute: Callable[[Tensor, int], Tensor]) -> Tensor:
        module = name.rpartition(".")[0]
        if not self.family.permutes or not module.endswith(("q_proj", "k_proj")):
            return tensor
        grouped = self.config.num_key_value_heads or self.config.num_attention_heads
        heads = self.config.num_attention_heads if module.endswith("q_proj") else grouped
        return permute(tensor, heads)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that llama.cpp wants beside the model's own."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "llama3":
            return {}
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        dim = head_dim_of(self.config)
        plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        return {ROPE_FACTORS: (plain / scaled.double()).float()}


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for owner, module in logical_modules(model):
        own = base_of(module).named_parameters(recurse=False, remove_duplicate=False)
        out |= {f"{owner}.{key}" if owner else key: parameter for key, parameter in own}
    return out


def _halves_to_pairs(tensor: Tensor, heads: int) -> Tensor:
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(rows, *rest)


def _pairs_to_halves(tensor: Tensor, heads: int) -> Tensor:
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.reshape(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest)
