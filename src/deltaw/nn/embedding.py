"""An embedding of the base with named adapters beside it: y = c∘(W[ids] + s·(A[:, ids])ᵀ·Bᵀ).

A lookup is a product with one-hot rows, so A [R, V] is looked up instead of multiplied; B [H, R] is an ordinary
factor. LoRA on embeddings starts from A zero and B normal (PEFT's convention; either factor zero makes ΔW zero).
DoRA's c [H] scales outputs as in a linear layer with the weight Wᵀ, so its norms run over the vocabulary; without
DoRA there is no c. As in any embedding, the padding token gets no gradient, so its column of A stays. There is no
dropout, as in PEFT: a lookup has no inputs to drop.

Shapes: V vocabulary, H hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frozen import DenseWeight, FrozenWeight
from .lowrank import LowRankBeside, runs
from .merged import dense_weight, merged_weight, twin
from .quantized import QuantizedEmbedding


def is_embedding(layer: nn.Module) -> bool:
    """Whether a layer looks ids up in its weight and does no more than scale them (learned positions do, in OPT)."""
    is_plain = type(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
    return isinstance(layer, nn.Embedding) and (is_plain or isinstance(layer, QuantizedEmbedding))


class AdaptedEmbedding(LowRankBeside):
    """``nn.Embedding`` plus the active adapters' parts."""

    base_layer: nn.Embedding

    @property
    def storage(self) -> FrozenWeight:
        """Wᵀ [H, V]: the weight of the linear layer that a lookup stands for."""
        return DenseWeight(self.weight, transposed=True)

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    def merged_layer(self, base: nn.Module, names: Sequence[str]) -> nn.Module:
        """A plain embedding that gives what ``base`` and these adapters do together; at least one must be here."""
        adapters = [self.adapter(name) for name in names if name in self.adapters]
        return twin(base, merged_weight(dense_weight(base).T, adapters).T.contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base_layer(ids)
        flat = y.reshape(-1, y.shape[-1])
        parts = [(rows, name) for rows, name in runs(self.active, flat.shape[0]) if name in self.adapters]
        if not parts:
            return y
        flat = flat.clone()
        scale = getattr(self.base_layer, "embed_scale", None)
        scale = 1.0 if scale is None else scale  # Gemma 3 multiplies what it looks up; so does PEFT
        for rows, name in parts:
            adapter, c_H = self.adapter(name), self.column_scale(name)
            z_TR = F.embedding(ids.reshape(-1)[rows], adapter.lora_A.T, padding_idx=self.padding_idx)
            sum_TH = flat[rows] + (adapter.scaling * scale * (z_TR @ adapter.lora_B.T)).to(flat.dtype)
            flat[rows] = sum_TH if c_H is None else sum_TH * c_H.to(flat.dtype)
        return flat.view(y.shape)
