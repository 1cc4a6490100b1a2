"""deltaw: the whole life of a low-rank adapter, ΔW = (α/r)·B·A, beside a frozen base."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LoraConfig, PeftConfig, TaskType
    from .errors import UserError
    from .nn.load import load_base
    from .peft import PeftModel, get_peft_model

__all__ = ["LoraConfig", "PeftConfig", "PeftModel", "TaskType", "UserError", "get_peft_model", "load_base"]

_HOMES = {
    "LoraConfig": ".config",
    "PeftConfig": ".config",
    "PeftModel": ".peft",
    "TaskType": ".config",
    "UserError": ".errors",
    "get_peft_model": ".peft",
    "load_base": ".nn.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``deltaw --help`` shall not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
