"""From what a user names an adapter by to its folder: a path, or a name in a store."""

from __future__ import annotations

import os
from pathlib import Path

from ...config import CONFIG_NAME
from ...errors import UserError
from .names import parse_reference
from .store import Store


def default_store() -> Path:
    """Where adapters are kept by name: ``$DELTAW_STORE``, else ``deltaw/adapters`` in the user's data folder."""
    own = os.environ.get("DELTAW_STORE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "deltaw" / "adapters"


def locate_adapter(text: str | Path, store: str | Path | None = None) -> Path:
    """The folder of an adapter: ``text`` itself where that is there, else what it names in the store.

    What is no name (``owner/name`` on the hub) comes back as it is. Raises ``UserError`` for a name that is neither a
    path nor in the store (``default_store`` unless given), and for ``./x`` that isn't there: as a ``Path`` it would no
    longer differ from the hub's ``x``.
    """
    path = Path(text)
    if str(text).startswith((".", "/", "~")) and not os.path.lexists(path):
        raise UserError(f"{text}: no such folder; expected a folder with {CONFIG_NAME}, or a name in the store")
    reference = parse_reference(str(text)) if isinstance(text, str) else None
    if reference is None or os.path.lexists(path):
        return path
    place = Store(default_store() if store is None else store)
    try:
        return place.resolve(str(text)).path
    except UserError as error:
        if reference.name in (names := place.names()):
            raise
        has = f"it has {', '.join(names[:8])}" if names else "it is empty" if place.path.is_dir() else "not there yet"
        raise UserError(
            f"{text}: no such folder, and no adapter of that name in the store {place.path} ({has}); expected a folder "
            f"with {CONFIG_NAME}, a name in the store, or a hub id like owner/name"
        ) from error
