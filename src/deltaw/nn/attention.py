"""Packed attention for models of ``transformers``, through their own attention interface.

While a batch says how its examples lie (``Batch.lengths``), models under ``use_packed_attention`` compute each
example's attention alone and build no mask. Any other forward (generation, padded batches) goes to torch's SDPA as
before, so the same model serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..ops.attention import Masking, packed_attention
from .batch import current_batch

NAME = "deltaw_packed"
"""What the implementation is called among transformers' own (``sdpa``, ``eager`` …)."""


@contextmanager
def use_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend example by example inside; its own attention comes back afterwards.

    Raises ``ValueError`` (transformers' own) for a model whose attention can't be exchanged.
    """
    before = model.config._attn_implementation
    if before == NAME:  # already inside: setting it walks through all modules, twice a step
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Window | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: q [1, N, T, D], k and v [1, G, T, D] → o [1, T, N, D]."""
    lengths = _lengths()
    if lengths is None:
        assert not isinstance(attention_mask, _Window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"examples laid end to end are one row without a cache; this batch has {query.shape[0]} rows of "
            f"{query.shape[2]} tokens, which see {key.shape[2]}"
        )
    _refuse(module, kwargs)
    window = kwargs.get("sliding_window")
    if isinstance(attention_mask, _Window):
        window = attention_mask.size
    elif attention_mask is not None:
        raise ValueError(f"packed attention can't do the mask that {type(module).__name__} makes for itself")
    scaling = kwargs.get("scaling")
    masking = Masking(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=window,
        softcap=kwargs.get("softcap"),
    )
    return packed_attention(query[0], key[0], value[0], lengths, masking)[None], None


@dataclass(frozen=True, slots=True)
class _Window:
    """What layers are handed in a mask's place where all that it would say is a sliding window."""

    size: int


def _mask(*args: Any, **kwargs: Any) -> Tensor | _Window | None:
    """SDPA's mask; for a packed batch none, or its window, which not all models tell their attention besides.

    Raises ``ValueError`` for masks that packed attention doesn't have: in chunks (Llama 4), or of the caller's making.
    """
    if _lengths() is None:
        return sdpa_mask(*args, **kwargs)
    local, chunk = kwargs.get("local_size"), getattr(kwargs.get("config"), "attention_chunk_size", None)
    if kwargs.get("use_vmap") or (chunk is not None and local == chunk):
        raise ValueError("packed attention can't do masks that are neither causal nor a sliding window")
    return None if local is None else _Window(int(local))


def _lengths() -> tuple[int, ...] | None:
    facts = current_batch()
    return None if facts is None else facts.lengths


_UNDERSTOOD = {"scaling", "sliding_window", "softcap", "is_causal", "dropout"}
_WITHOUT_EFFECT = {
    *("position_ids", "cache_position", "use_cache", "cache", "layer_idx", "num_items_in_batch", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
"""What models pass along to their attention: what is done here, and what changes no number."""


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """What packed attention can't do must not be left out in silence."""
    is_causal = kwargs.get("is_causal")
    wanted = [name for name in kwargs.keys() - _UNDERSTOOD - _WITHOUT_EFFECT if kwargs[name] is not None]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        wanted.append("attention in both directions")
    if kwargs.get("dropout"):
        wanted.append("dropout")
    if wanted:
        raise ValueError(f"packed attention can't do {', '.join(wanted)}, which {type(module).__name__} asks for")


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
