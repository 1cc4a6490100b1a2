"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354).

At large width one learning rate can't suit both factors: A sees inputs of order one, B starts from zero and must
carry the change. Their rule is η_B = λ·η_A with λ well above one (16 in their experiments).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import UserError
from ..nn.embedding import AdaptedEmbedding
from ..nn.lowrank import LowRank
from .wrapper import unwrapped


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser over what requires a gradient, in PEFT's groups.

    A and whole modules get ``lr``; B, DoRA's magnitudes and other vectors ``lr·loraplus_lr_ratio``; both factors of
    adapted embeddings ``loraplus_lr_embedding``. Biases and norms don't decay. ``kwargs`` are ``optimizer_cls``'s.
    Raises ``UserError`` where nothing requires a gradient.
    """
    model = unwrapped(model)
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedEmbedding)]
    embeddings = {id(p) for layer in layers for p in layer.adapters.parameters() if p.dim() > 1}
    slow, embedded, fast, bare = ([] for _ in range(4))  # type: ignore[var-annotated]
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if id(parameter) in embeddings:
                embedded.append(parameter)
            elif name == "lora_B" or parameter.dim() == 1:
                decays = isinstance(owner, LowRank) or not (name == "bias" or "norm" in type(owner).__name__.lower())
                (fast if decays else bare).append(parameter)
            else:
                slow.append(parameter)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedded, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": fast, "lr": lr * loraplus_lr_ratio, "weight_decay": loraplus_weight_decay},
        {"params": bare, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        raise UserError("create_loraplus_optimizer: nothing in this model requires a gradient; set_adapter one")
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
