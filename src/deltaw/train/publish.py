"""After training: the adapter into a store, under a name. Whatever goes wrong there, the run in ``--out`` is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..adapters.store import Store, default_store
from ..errors import UserError
from ..files import replace_text
from .options import TrainOptions

SUMMARY = "summary.json"


def check_publish(options: TrainOptions) -> None:
    """Raises ``UserError`` before anything is trained where the store can't take the name."""
    if options.publish_as is not None:
        _store(options).check_free(options.publish_as)


def publish(options: TrainOptions, summary: dict[str, Any], warn: Callable[[str], object]) -> dict[str, Any]:
    """Publish a run that has come to its end, and note it in its summary: the version, or why there is none."""
    if options.publish_as is None or summary["status"] == "interrupted":
        return summary
    store = _store(options)
    published = {"store": str(store.path), "name": options.publish_as}
    try:
        published["version"] = store.publish(options.out, options.publish_as).sha256
    except (UserError, OSError) as error:
        published["error"] = str(error)
        again = f"deltaw adapter publish {options.out} {options.publish_as} --store {store.path}"
        warn(f"not published: {error}; the adapter is whole in {options.out}; once that is mended: {again}")
    summary = summary | {"published": published}
    try:
        replace_text(options.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        warn(f"{options.out / SUMMARY} doesn't say what was published ({error})")
    return summary


def _store(options: TrainOptions) -> Store:
    return Store(default_store() if options.publish_to is None else options.publish_to)
