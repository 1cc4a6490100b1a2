"""One adapter in one layer: the trained factors of ΔW = s·B·A, and nothing of the layer they stand in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.frozen import FrozenWeight
from .batch import BASE, Batch, current_batch
from .dora import NormCache
from .quantized import QuantizedModule


class LowRank(nn.Module):
    """A [R, K], B [N, R], DoRA's magnitude [N] where there is one, and the two numbers that go with them.

    A start whose product isn't zero brings frozen copies (A₀, B₀) of its factors: ΔW = s·(B·A − B₀·A₀) is zero at
    step 0, and the shared base never changes.
    """

    lora_magnitude_vector: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        a_RK: Tensor,
        b_NR: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        magnitude_N: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_RK)
        self.lora_B = nn.Parameter(b_NR)
        magnitude = None if magnitude_N is None else nn.Parameter(magnitude_N)
        self.register_parameter("lora_magnitude_vector", magnitude)
        start_A, start_B = start or (None, None)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)
        self.scaling = scaling
        self.dropout = dropout
        self.norms = NormCache()
        """DoRA's norms of this adapter on the layer that it stands in."""

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """(A₀, B₀), or None where the start's product is zero."""
        return None if self.start_A is None or self.start_B is None else (self.start_A, self.start_B)

    def joined(self) -> tuple[Tensor, Tensor]:
        """(A, B) such that ΔW = s·B·A whatever the start: A above A₀, B beside −B₀, rank 2r, where there is one."""
        if self.start is None:
            return self.lora_A, self.lora_B
        a0_RK, b0_NR = self.start
        return torch.cat([self.lora_A, a0_RK]), torch.cat([self.lora_B, -b0_NR], dim=1)

    def delta(self) -> Tensor:
        """ΔW in float32 (float64 where the factors are), without DoRA's scale."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        a_RK, b_NR = self.joined()
        return (self.scaling * b_NR.to(dtype)) @ a_RK.to(dtype)  # the small factor scaled: one dense matrix, not two

    def extra_repr(self) -> str:
        rank, width = self.lora_A.shape
        kind = ", dora" if self.lora_magnitude_vector is not None else ""
        kind += ", less its start" if self.start is not None else ""
        return f"{width} → {rank} → {self.lora_B.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}{kind}"


class Named(nn.Module):
    """Modules by name, like ``nn.ModuleDict``, but free to be called ``train`` or ``keys``."""

    def __getitem__(self, name: str) -> nn.Module:
        module = self._modules[name]
        assert module is not None
        return module

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass
class Active:
    """Which adapters a model uses now. One object per model, shared by all its layers: switching is one assignment."""

    names: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    """Adapters that stand in the weights themselves; either none, or just those that are active."""


class Beside(nn.Module):
    """Stands in a model where a layer of the base stood, and holds that layer whole with named adapters beside it."""

    def __init__(self, base_layer: nn.Module, name: str, active: Active) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.name = name
        """The module's name in the model: keys its dropout masks and its tensors on disk."""
        self.active = active
        self.adapters = Named()


class LowRankBeside(Beside):
    """One whose adapters are ``LowRank``, on a weight that is a ``FrozenWeight``."""

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def stored(self) -> Tensor:
        """What the base keeps its weight in: is the same tensor as long as the weight is the same."""
        return self.base_layer.quantized.packed if isinstance(self.base_layer, QuantizedModule) else self.weight

    @property
    def storage(self) -> FrozenWeight:
        """W [N, K] of the linear layer that this is, or stands for."""
        raise NotImplementedError

    def adapter(self, name: str) -> LowRank:
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    def column_scale(self, name: str) -> Tensor | None:
        """DoRA's c [N] for one adapter, differentiable in its magnitude; None for plain LoRA."""
        adapter = self.adapter(name)
        if adapter.lora_magnitude_vector is None:
            return None
        a_RK, b_NR = adapter.lora_A, adapter.lora_B
        norm_N = adapter.norms.norm(self.storage, self.stored, a_RK, b_NR, adapter.scaling, adapter.joined)
        return adapter.lora_magnitude_vector / norm_N


def runs(active: Active, num_rows: int) -> Iterator[tuple[slice, str]]:
    """(rows, adapter) of the forward that is going on: the batch's own word where it has one, else what is active."""
    facts: Batch | None = current_batch()
    if active.merged:
        _check_unmixed(facts, active.merged)
    elif facts is None or facts.adapters is None:
        yield from ((slice(0, num_rows), name) for name in active.names)
    else:
        yield from ((rows, name) for rows, name in facts.runs(num_rows) if name != BASE)


def _check_unmixed(facts: Batch | None, merged: tuple[str, ...]) -> None:
    if facts is not None and facts.adapters is not None:
        raise UserError(f"adapter_names: {', '.join(merged)} is merged into the weights of all rows; unmerge it first")
