"""``deltaw adapter tag``: a version of a name gets a tag, or loses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..options import parse
from .stores import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Give a version a tag: deltaw adapter tag tickets@3f2a91 prod

    tickets@prod then is that version, whatever is published later, until the tag is given to another. A tagged
    version is never removed. Without @VERSION it is the current one that gets the tag.
    """

    version: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME@VERSION")]
    """NAME alone for the current version, NAME@VERSION (its beginning will do) or NAME@TAG."""
    tag: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TAG")]
    """The tag."""
    delete: bool = False
    """Take the tag away from NAME instead."""


def main(args: list[str]) -> int:
    options = parse(Options, "adapter tag", args)
    from ...errors import UserError
    from ..screen import out, print_json
    from .stores import as_json

    store = options.open()
    if options.delete:
        if "@" in options.version:
            raise UserError(f"--delete {options.version}: a tag is taken away from a name; give the name alone")
        store.untag(options.version, options.tag)
        if options.json:
            print_json({"name": options.version, "deleted": options.tag})
        else:
            out.print(f"{options.version} has no tag {options.tag} any more", markup=False, soft_wrap=True)
        return 0
    version = store.tag(options.version, options.tag)
    if options.json:
        print_json(as_json(version))
    else:
        out.print(f"{version.name}@{options.tag} is {version}", markup=False, soft_wrap=True)
    return 0
