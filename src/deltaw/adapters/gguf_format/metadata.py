"""A model's config as llama.cpp's metadata."""

from __future__ import annotations

from typing import Any

from gguf import GGUFWriter, RopeScalingType

from ...errors import UserError
from .layout import Family, head_dim_of


def write_config(writer: GGUFWriter, config: Any, family: Family) -> None:
    """Sizes, attention, rotation. Raises ``UserError`` for a rotation with options that GGUF has no key for."""
    head_dim = head_dim_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, write in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (cap := getattr(config, key, None)) is not None:
            write(cap)
    if family.period is not None:
        _write_windows(writer, config, family.period)
    ropes = config.rope_parameters
    _write_rope(writer, ropes.get("full_attention", ropes))
    if "sliding_attention" in ropes:
        local = ropes["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UserError(f"rope_type {local['rope_type']!r} of sliding attention: llama.cpp only knows the default")
        writer.add_rope_freq_base_swa(local["rope_theta"])


def _context(config: Any, family: Family) -> int:
    """Tokens of context. Where llama.cpp has no windows, those that all layers see anyway."""
    longest: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if family.period is not None or window is None or "sliding_attention" not in kinds:
        return longest
    return min(longest, int(window))


def _write_windows(writer: GGUFWriter, config: Any, period: int) -> None:
    writer.add_sliding_window(config.sliding_window)
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if slides != [layer % period < period - 1 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        known = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
        if more := sorted(key for key in rope.keys() - known if rope[key] is not None):
            raise UserError(f"yarn with {', '.join(more)}: its exact meaning in llama.cpp isn't known; leave them out")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
