"""New adapters for one layer: untrained ones by the config's start, and blank ones that a checkpoint fills.

Shapes: K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import LoraConfig
from . import starts
from .dora import adapted_norm, row_norms_squared
from .embedding import AdaptedEmbedding
from .lowrank import LowRank
from .walk import AdaptedLayer


def fresh_adapter(
    layer: AdaptedLayer,
    config: LoraConfig,
    start: starts.Start | None = None,
    *,
    original: Callable[[], Tensor] | None = None,
) -> LowRank:
    """An untrained adapter for one layer, on its device, in float32 (float64 over a float64 base).

    ``original`` reads W as it was before the base was quantised, for a start that asks. Raises ``UserError`` where the
    config's start can't be made for this layer.
    """
    scaling, weight = config.scaling_of(layer.name), layer.weight
    site = starts.Site(
        name=layer.name,
        weight=layer.storage,
        rank=config.rank_of(layer.name),
        scaling=scaling,
        original=original,
    )
    is_lookup = isinstance(layer, AdaptedEmbedding)
    start = start or (starts.embedding_start_for(config) if is_lookup else starts.start_for(config))
    made = start(site)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # In the layout that a file gives, since that decides the last bit of a product, and resuming is exact.
    a_RK, b_NR = (t.to(weight.device, dtype).contiguous() for t in (made.a_RK, made.b_NR))
    magnitude_N = None
    if config.use_dora:
        norms_squared_N = row_norms_squared(layer.storage)
        if made.is_subtracted:  # step 0 is the base
            magnitude_N = norms_squared_N.sqrt()
        else:
            magnitude_N = adapted_norm(layer.storage, norms_squared_N, a_RK, b_NR, scaling)
    adapter = LowRank(
        a_RK,
        b_NR,
        scaling=scaling,
        dropout=float(config.lora_dropout),
        magnitude_N=magnitude_N,
        start=(a_RK.clone(), b_NR.clone()) if made.is_subtracted else None,
    )
    return adapter.to(weight.device, dtype)


def blank_adapter(layer: AdaptedLayer, config: LoraConfig) -> LowRank:
    """What ``fresh_adapter`` makes, with nothing in it yet: a resumed run reads its factors from a checkpoint."""
    is_lookup = isinstance(layer, AdaptedEmbedding)
    return fresh_adapter(layer, config, starts.blank if is_lookup else starts.blank_for(config))
