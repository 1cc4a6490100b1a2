"""Files of an adapter by the name that a user gives: a local folder, or a repository on the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError, short

MAX_CONFIG_BYTES = 2 * 2**20
"""An ``adapter_config.json`` is a few kilobytes; one that is larger is not read at all."""

MAX_LISTS = 10_000
"""Lists and objects in such a file: a thousand times what PEFT writes, and soon made."""


def resolve_file(path: str | Path, name: str, **hub: Any) -> Path:
    """``name`` in a local folder, else from the hub repository ``path``. ``UserError`` where there is neither."""
    folder = Path(path)
    try:
        is_there, is_folder, has_file = folder.exists(), folder.is_dir(), (folder / name).is_file()
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if is_folder and not has_file else ""
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
        raise UserError(f"{short(str(path))}: {error}; expected a folder with {name}, or a hub id") from None
    if has_file:
        return folder / name
    if is_folder:
        lacks = f"its {name} is no file" if os.path.lexists(folder / name) else f"it has no {name}"
        raise UserError(f"{folder} is not an adapter: {lacks} (found {found or 'nothing'})")
    if is_there or len(folder.parts) != 2 or str(path).startswith((".", "/", "~")):
        what = "a file" if is_there else "no such folder"
        raise UserError(f"{path}: {what}; expected a folder with {name}, or a hub id like owner/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(path), name, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no such folder, and the hub gave no {name} ({reason})") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; ``UserError`` names the file and what is wrong with it."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_CONFIG_BYTES else ""
        num_lists = text.count("[") + text.count("{")
        raw = json.loads(text) if size <= MAX_CONFIG_BYTES and num_lists <= MAX_LISTS else None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or endless digits
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: {size:,} bytes are not an adapter config (at most {MAX_CONFIG_BYTES:,})")
    if num_lists > MAX_LISTS:
        raise UserError(f"{path}: {num_lists:,} lists and objects are not an adapter config (at most {MAX_LISTS:,})")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object with PEFT's fields, found {type(raw).__name__}")
    return raw
