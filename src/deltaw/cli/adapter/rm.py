"""``deltaw adapter rm``: a name, or one version of it, leaves a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..options import parse
from .stores import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Take a name with all its versions out of a store, or one version: deltaw adapter rm tickets@3f2a91

    The current version and tagged ones are not removed alone: roll back, or take the tag away, first. What is removed
    is gone.
    """

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME@VERSION")]
    """NAME for all of it, or NAME@VERSION (its beginning will do)."""


def main(args: list[str]) -> int:
    options = parse(Options, "adapter rm", args)
    from ..screen import out, print_json

    options.open().remove(options.what)
    if options.json:
        print_json({"removed": options.what})
    else:
        out.print(f"removed {options.what}", markup=False, soft_wrap=True)
    return 0
