"""Layers whose weight is stored in 4 bits, in the place of ``nn.Linear``, ``Conv1D`` and ``nn.Embedding``.

Their tensors are buffers: no optimiser, and nobody who walks over parameters, takes codes for weights to train. They go
where the model goes; casting the model casts biases and leaves scales in float32. ``weight`` answers with a dense copy
made on demand. ``state_dict`` speaks bitsandbytes' layout (``quantized_format``).

A head that is tied to a quantised embedding has no tensors of its own: it reads the embedding's.

Shapes: K inputs, N outputs, V vocabulary, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..ops.nf4 import Quantized, QuantizedScales, dequantize
from ..ops.quantized import QuantizedWeight, frozen_linear, look_up
from .quantized_format import deserialize, serialize


class QuantizedModule(nn.Module):
    """What holds one quantised matrix: its tensors, as buffers, and how they are moved, saved and read."""

    codes: Tensor
    """uint8 [⌈n/2⌉]: two codes a byte."""
    scales: Tensor
    """float32 [S], or uint8 [S] where the scales are quantised as well."""
    nested_scales: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, quantized: Quantized) -> None:
        nn.Module.__init__(self)  # not the next in line: an embedding would make a table
        for name in ("codes", "scales", "nested_scales", "offset"):
            self.register_buffer(name, None)
        self.register_parameter("bias", None)
        self._store(quantized)
        self._is_hf_initialized = True  # transformers fills what isn't marked so at random

    def _store(self, q: Quantized) -> None:
        self.codes = q.packed.view(-1)
        if isinstance(q.scales, QuantizedScales):
            self.scales, self.nested_scales, self.offset = q.scales.codes, q.scales.absmax, q.scales.offset
        else:
            self.scales, self.nested_scales, self.offset = q.scales, None, None
        self._facts: dict[str, Any] = dict(shape=q.shape, dtype=q.dtype, kind=q.kind, block_size=q.block_size)

    @property
    def quantized(self) -> Quantized:
        """What is stored, as the arithmetic wants it; shares the buffers."""
        scales: Tensor | QuantizedScales = self.scales
        if self.nested_scales is not None and self.offset is not None:
            scales = QuantizedScales(codes=self.scales, absmax=self.nested_scales, offset=self.offset)
        return Quantized(packed=self.codes, scales=scales, **self._facts)

    @property
    def weight(self) -> Tensor:
        """W, dense, made for whoever asks, in the dtype that it was quantised from."""
        return dequantize(self.quantized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast passes integers by, a move doesn't: as integers the scales are moved and never rounded.
        kept, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers = kept
        for name, tensor in kept.items():
            if tensor is not None:
                same = tensor.dtype
                kept[name] = fn(tensor.view(torch.int32)).view(same) if tensor.is_floating_point() else fn(tensor)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        for suffix, tensor in serialize(self.quantized).items():
            destination[f"{prefix}weight{suffix}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        own = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        parts = {key.removeprefix(name): own.pop(key) for key in list(own) if key.startswith(name)}
        if len(parts) < 2:
            missing_keys.append(name)
        else:
            try:
                stored = deserialize(name, parts, tuple(self._facts["shape"]))
            except UserError as error:
                error_msgs.append(str(error))
            else:
                self._store(stored)
                self.to(self.codes.device)
        if self.bias is not None:
            bias = own.pop(f"{prefix}bias", None)
            if bias is None:
                missing_keys.append(f"{prefix}bias")
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)
        if strict:
            unexpected_keys += own

    def as_dense(self, w: Tensor) -> nn.Module:
        """The dense module that this one stands for, with ``w`` as its weight."""
        raise NotImplementedError

    def _described(self) -> str:
        q = self.quantized
        return f"{q.kind}, block_size={q.block_size}, double={isinstance(q.scales, QuantizedScales)}"


class QuantizedLinear(QuantizedModule):
    """y = x·Wᵀ + b with a quantised W [N, K], in the dtype of x."""

    def __init__(self, quantized: Quantized, bias: nn.Parameter | None = None, *, is_conv1d: bool = False) -> None:
        super().__init__(quantized)
        self.out_features, self.in_features = quantized.shape
        self.bias = bias
        self.is_conv1d = is_conv1d
        """Whether it stands for transformers' ``Conv1D``, whose weight is [K, N] where it is dense."""

    @classmethod
    def of(cls, layer: nn.Module, quantized: Quantized) -> QuantizedLinear:
        """What takes the place of a dense layer: shares its bias."""
        bias: Any = layer.bias
        return cls(quantized, bias, is_conv1d=isinstance(layer, Conv1D)).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, QuantizedWeight(self.quantized), self.bias)

    def as_dense(self, w_NK: Tensor) -> nn.Module:
        """The dense layer that this one stands for, of the model's own kind, with W ``w_NK``; shares the bias."""
        return dense_linear(w_NK, self.bias, is_conv1d=self.is_conv1d).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._described()}"


def dense_linear(w_NK: Tensor, bias: nn.Parameter | None, *, is_conv1d: bool = False) -> nn.Module:
    """``nn.Linear``, or transformers' ``Conv1D``, around a frozen W; shares the bias."""
    out_features, in_features = w_NK.shape
    dense: Any
    if is_conv1d:
        dense = Conv1D(0, 0)
        dense.nf, dense.nx = out_features, in_features
        w_NK = w_NK.T.contiguous()
    else:
        dense = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=w_NK.dtype)
    dense.weight = nn.Parameter(w_NK, requires_grad=False)
    dense.bias = bias
    return dense  # type: ignore[no-any-return]


class TiedHead(QuantizedLinear):
    """An output head that is its model's quantised embedding, read as a linear layer. Nothing of it is saved."""

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None = None) -> None:
        self.__dict__["_embedding"] = embedding  # not a submodule: the model has it already
        super().__init__(embedding.quantized, bias)
        for name in ("codes", "scales", "nested_scales", "offset"):
            self._buffers[name] = None

    @property
    def quantized(self) -> Quantized:
        embedding: QuantizedEmbedding = self.__dict__["_embedding"]
        return embedding.quantized

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """Rows of a quantised table [V, H] by their numbers; only those that are asked for become dense."""

    def __init__(self, quantized: Quantized, like: nn.Embedding) -> None:
        QuantizedModule.__init__(self, quantized)
        self.dtype = quantized.dtype
        """Of what it gives: casting the model changes it."""
        self.num_embeddings, self.embedding_dim, self.padding_idx = *quantized.shape, like.padding_idx
        self.embed_scale = getattr(like, "embed_scale", None)  # Gemma multiplies what it looks up
        self.__dict__["_like"] = _without_weight(like)
        self.training = like.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, dense, made for whoever asks."""
        return dequantize(self.quantized, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = look_up(self.quantized, input, self.dtype)
        return rows if self.embed_scale is None else rows * torch.as_tensor(self.embed_scale).to(rows)

    def as_dense(self, w_VH: Tensor) -> nn.Module:
        """The model's own kind of embedding with ``w_VH`` as its table."""
        dense = copy.copy(self.__dict__["_like"])
        dense._parameters = {"weight": nn.Parameter(w_VH, requires_grad=False)}
        return dense.train(self.training)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._described()}"


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """(name, module) of all that holds codes of its own; a tied head doesn't."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedModule))
    return ((name, m) for name, m in found if not isinstance(m, TiedHead))


def num_quantized(model: nn.Module) -> int:
    """Weights that the model stores in codes; its ``parameters()`` are the others."""
    return sum(m.quantized.shape.numel() for _, m in quantized_modules(model))


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of all codes and scales."""
    return sum(m.quantized.nbytes for _, m in quantized_modules(model))


def _without_weight(like: nn.Embedding) -> nn.Embedding:
    bare = copy.copy(like)
    bare._parameters = {"weight": None}
    return bare
