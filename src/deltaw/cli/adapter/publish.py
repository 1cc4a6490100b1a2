"""``deltaw adapter publish``: an adapter's folder becomes a version of a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..options import parse
from .stores import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Put an adapter into a store as the current version of a name: deltaw adapter publish runs/first tickets

    The folder is read as strictly as loading would, copied, and takes the name's place in one step: whoever asks for
    the name gets the version before or this one, never half of either, even if the machine stops. A version is named
    by the hash of what it says, so the same adapter twice is one version. Tokenizer, chat template, card and small
    texts beside the adapter come along; checkpoints don't. Earlier versions stay: NAME@VERSION is one of them.
    """

    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """The adapter: its folder, a hub id, or a name in the store."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """What to call it: letters, digits, '.', '_' and '-'."""
    tag: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A tag to give this version (--tag prod): NAME@prod is it until the tag moves."""


def main(args: list[str]) -> int:
    options = parse(Options, "adapter publish", args)
    from ...adapters.store import check_name, check_tag, locate_adapter, shown
    from ..screen import err, out, print_json, quiet_libraries, size
    from .stores import as_json

    for tag in options.tag:
        check_tag(tag)
    check_name(options.name)
    quiet_libraries()
    store = options.open()
    folder = locate_adapter(options.adapter, store.path)
    with err.status(f"publishing {options.name}"):
        version = store.publish(folder, options.name, tags=options.tag)
    if options.json:
        print_json(as_json(version))
        return 0
    tags = f", tagged {', '.join(version.tags)}" if version.tags else ""
    said = f"r {version.about.r}, {version.about.num_parameters:,} parameters, {size(version.about.num_bytes)}"
    out.print(f"{version} is the current version{tags} ({said})", markup=False, soft_wrap=True)
    if len(line := store.line(version.name)) > 1:
        undo = options.words("adapter", "rollback", version.name)
        out.print(f"Before it: {shown(line[-2])}; back to that: {undo}", markup=False, soft_wrap=True)
    out.print(f"Next: {options.words('chat', '--adapter', version.name)}", markup=False, soft_wrap=True)
    return 0
