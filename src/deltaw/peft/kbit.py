"""A quantised base made ready for training adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..nn import bnb
from ..nn.quantized import QuantizedEmbedding, QuantizedModule
from .model import checkpointing


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze a ``transformers`` model, cast what isn't quantised to float32, and turn on activation checkpointing.

    Norms, embeddings and the head in float32 keep the residual stream exact where few bits carry the weights
    (Dettmers et al. 2023, arXiv:2305.14314). Checkpointing is for quantised models only, as in PEFT; with
    ``use_reentrant`` in ``gradient_checkpointing_kwargs`` the embeddings' output requires a gradient, else nothing
    needs to. Returns the model. Raises ``UserError`` for a model that has no checkpointing.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.float32)
    for layer in model.modules():
        if isinstance(layer, QuantizedEmbedding):
            layer.to(torch.float32)
    bnb.keep_differentiable(model)
    if use_gradient_checkpointing and any(_is_quantized(layer) for layer in model.modules()):
        if not hasattr(model, "activation_checkpointing_enable"):
            raise UserError(f"{type(model).__name__} has no checkpointing; use_gradient_checkpointing=False")
        checkpointing(model, gradient_checkpointing_kwargs)
    return model


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedModule) or bnb.is_quantized(layer)
