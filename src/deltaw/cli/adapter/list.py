"""``deltaw adapter list``: what a store holds, or the versions of one name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..options import parse
from .stores import StoreOptions, as_json, base, table, when

if TYPE_CHECKING:
    from ...adapters.store import Entry


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Show the names of a store, or all versions of one: deltaw adapter list, deltaw adapter list tickets

    Below the table stands what is wrong in the store: folders that were renamed, cut off, linked or edited by hand,
    each with what to do. A plain adapter folder laid into the store by hand is listed by its folder's name.
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """Show this name's versions."""
    check: bool = False
    """Read every byte of every version, and compare it with what was published."""


def main(args: list[str]) -> int:
    options = parse(Options, "adapter list", args)
    if options.name is not None:
        return _versions(options, options.name)
    from ..screen import err, out, print_json

    store = options.open()
    with err.status(f"reading {store.path}"):
        entries = store.entries(check=options.check)
    if options.json:
        print_json({"store": str(store.path), "adapters": [_entry_as_json(entry) for entry in entries]})
        return 0
    rows = [_row(entry) for entry in entries if entry.version is not None or entry.num_versions]
    if rows:
        table(("name", "version", "published", "r", "size", "base", "tags", "versions"), rows, right=("r", "versions"))
    _say_problems(entries)
    if not entries:
        out.print(f"{store.path} holds no adapters yet.", markup=False, soft_wrap=True)
        out.print(f"Next: {options.words('adapter', 'publish', 'FOLDER', 'NAME')}", markup=False, soft_wrap=True)
    return 0


def _versions(options: Options, name: str) -> int:
    from ...adapters.store import shown
    from ..screen import err, out, print_json, size

    store = options.open()
    with err.status(f"reading {store.path}"):
        versions, line = store.versions(name), store.line(name)
        entry = store.entry(name, check=options.check)
    if options.json:
        values = [as_json(version) for version in versions]
        print_json({"name": name, "versions": values, "line": line, "problems": list(entry.problems)})
        return 0
    rows = [
        (
            "→" if version.is_current else "",
            shown(version.sha256),
            when(version),
            str(version.about.r),
            size(version.about.num_bytes),
            shown(version.about.data_sha256 or "?"),
            ", ".join(version.tags),
        )
        for version in versions
    ]
    table(("", "version", "published", "r", "size", "data", "tags"), rows, right=("r",))
    _say_problems([entry])
    out.print(f"Folders: {store.path / name}", markup=False, soft_wrap=True)
    if len(line) > 1:
        back = options.words("adapter", "rollback", name)
        out.print(f"Back to {shown(line[-2])}: {back}", markup=False, soft_wrap=True)
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    from ...adapters.store import shown
    from ..screen import size

    version = entry.version
    if version is None:
        return (entry.name, "?", "", "", "", "", "", str(entry.num_versions))
    return (
        entry.name,
        shown(version.sha256),
        when(version),
        str(version.about.r),
        size(version.about.num_bytes),
        base(version),
        ", ".join(version.tags),
        str(entry.num_versions),
    )


def _say_problems(entries: list[Entry]) -> None:
    from rich.text import Text

    from ..screen import err, visible

    for problem in (problem for entry in entries for problem in entry.problems):
        err.print(Text(visible(f"! {problem}").replace("\n", " "), style="yellow"), soft_wrap=True)


def _entry_as_json(entry: Entry) -> dict[str, Any]:
    version = None if entry.version is None else as_json(entry.version)
    problems = [*entry.problems]
    return {"name": entry.name, "current": version, "num_versions": entry.num_versions, "problems": problems}
