"""An embedding of the base with named adapters beside it: y = W[ids] + s·(A[:, ids])ᵀ·Bᵀ.

A lookup is a product with one-hot rows, so A [R, V] is looked up instead of multiplied; B [H, R] is an ordinary
factor. LoRA on embeddings starts from A zero and B normal (PEFT's convention; either factor zero makes ΔW zero).
DoRA and dropout are not defined for a lookup here: DoRA is refused when injected, and PEFT applies no dropout either.

Shapes: V vocabulary, H hidden size, R rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .lowrank import Active, LowRank, Named, runs


class AdaptedEmbedding(nn.Module):
    """``nn.Embedding`` plus the active adapters' parts."""

    def __init__(self, base_layer: nn.Embedding, name: str, active: Active) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.active = active
        self.adapters = Named()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    def adapter(self, name: str) -> LowRank:
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base_layer(ids)
        flat = y.reshape(-1, y.shape[-1])
        parts = [(rows, self.adapter(name)) for rows, name in runs(self.active, flat.shape[0]) if name in self.adapters]
        if not parts:
            return y
        flat = flat.clone()
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # Gemma 3 multiplies what it looks up; so does PEFT
        for rows, adapter in parts:
            z_TR = F.embedding(ids.reshape(-1)[rows], adapter.lora_A.T)
            flat[rows] += (adapter.scaling * scale * (z_TR @ adapter.lora_B.T)).to(flat.dtype)
        return flat.view(y.shape)
