"""Lean training blocks for the hottest architectures, beside the general path: see ``decoder.py``."""

from __future__ import annotations

from .decoder import LeanLayer, lean, plain, recompute_mlp

__all__ = ["LeanLayer", "lean", "plain", "recompute_mlp"]
