"""Adapters of small models, away from their start, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import deltaw


@pytest.fixture
def stir() -> Callable[[nn.Module], None]:
    """``stir(model)`` moves every trainable tensor away from its start."""

    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)

    return move


@pytest.fixture
def adapted(stir: Callable[[nn.Module], None]) -> Callable[..., deltaw.PeftModel]:
    """``adapted(base, config, name)``: our model with a random adapter, on all linear layers unless told."""

    def make(base: PreTrainedModel, config: dict[str, Any], name: str = "default") -> deltaw.PeftModel:
        config = dict(target_modules="all-linear") | config
        model = deltaw.get_peft_model(base, deltaw.LoraConfig(r=4, **config), name)
        stir(model)
        return model

    return make


@pytest.fixture
def saved(tiny: Callable[..., PreTrainedModel], adapted: Callable[..., deltaw.PeftModel], tmp_path: Path) -> Path:
    """A folder with a Llama adapter on q and v."""
    adapted(tiny(), dict(target_modules="qv")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
