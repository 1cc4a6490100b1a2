"""Files of an adapter by the name that a user gives: a local folder, or a repository on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import UserError, short


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
