"""``deltaw adapter rollback``: an earlier version of a name becomes the current one, at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..options import parse
from .stores import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Make an earlier version of a name the current one: deltaw adapter rollback tickets

    Without --to it is the one that was current before; once more goes one further back. Nothing is copied and nothing
    lost: the version that was current stays, and --to goes forward to it again. A name whose current.json was damaged
    is put right by --to from the versions that are there.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The name."""
    to: str | None = None
    """Version (its beginning will do) or tag to go to."""


def main(args: list[str]) -> int:
    options = parse(Options, "adapter rollback", args)
    from ...adapters.store import shown
    from ..screen import out, print_json
    from .stores import as_json

    store = options.open()
    before = _current(options)
    version = store.rollback(options.name, options.to)
    if options.json:
        print_json(as_json(version) | {"before": before})
        return 0
    if before == version.sha256:
        out.print(f"{version} is the current version already", markup=False, soft_wrap=True)
        return 0
    out.print(f"{version} is the current version", markup=False, soft_wrap=True)
    if before is not None:
        forward = options.words("adapter", "rollback", version.name, "--to", shown(before))
        out.print(f"Forward again: {forward}", markup=False, soft_wrap=True)
    return 0


def _current(options: Options) -> str | None:
    """What is current before anything is done; None where that can't be read."""
    from ...errors import UserError

    try:
        return options.open().line(options.name)[-1]
    except UserError:
        return None
