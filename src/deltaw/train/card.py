"""The card of a run's adapter, from what the run knows; ``deltaw adapter card`` measures more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.card import card, license_of, may_write, write_card
from ..adapters.peft_format import read_adapter
from ..nn.load import base_info


def write_run_card(out: Path, summary: Mapping[str, Any], model: nn.Module) -> None:
    """Write README.md beside a run's adapter; one that somebody else has written stays."""
    if not may_write(out):
        return
    info = base_info(model)
    license_name = None if info is None else license_of(info)
    write_card(out, card(read_adapter(out), name=out.resolve().name, summary=summary, license_name=license_name))
