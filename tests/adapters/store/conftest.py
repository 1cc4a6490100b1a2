"""Small adapters on disk, all different, and a store for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltaw.adapters.store import Store

OWN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def make_adapter(folder: Path, seed: int = 0, **config: Any) -> Path:
    """PEFT's two files with random factors; the same seed is the same adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, out_features in (("q_proj", 8), ("v_proj", 4)):
        key = f"base_model.model.model.layers.0.self_attn.{module}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(2, 8, generator=g)
        tensors[f"{key}B.weight"] = torch.randn(out_features, 2, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(OWN | {"base_model_name_or_path": "org/base"} | config))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """``make("a", seed=1, lora_alpha=8)``: an adapter's folder."""
    return lambda name="a", seed=0, **config: make_adapter(tmp_path / "made" / name, seed, **config)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that isn't there yet."""
    return Store(tmp_path / "store")


@pytest.fixture
def three(store: Store, make: Callable[..., Path]) -> list[str]:
    """Three versions of ``tickets`` in the store, the last current; their hashes."""
    return [store.publish(make(f"v{seed}", seed), "tickets").sha256 for seed in range(3)]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by relative path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture(name="tree")
def _tree() -> Callable[[Path], dict[str, bytes | None]]:
    return tree
