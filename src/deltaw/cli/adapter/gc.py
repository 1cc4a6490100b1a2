"""``deltaw adapter gc``: the space of what a store no longer needs."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import parse
from .stores import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Remove what killed publishers left behind, and with --keep old versions: deltaw adapter gc --keep 5

    What a running publish uses is never touched, nor what is damaged or was laid into the store by hand.
    """

    keep: int | None = None
    """Of each name keep only the newest so many versions; the current and the tagged stay in any case."""
    dry_run: bool = False
    """Only say what would be removed."""

    def __post_init__(self) -> None:
        from ...errors import UserError

        if self.keep is not None and self.keep < 1:
            raise UserError(f"--keep {self.keep}: expected at least 1")


def main(args: list[str]) -> int:
    options = parse(Options, "adapter gc", args)
    from ..screen import err, out, print_json, size

    store = options.open()
    with err.status(f"cleaning {store.path}"):
        found = store.collect_garbage(keep=options.keep, dry_run=options.dry_run)
    total = sum(garbage.num_bytes for garbage in found)
    if options.json:
        items = [{"path": str(g.path), "what": g.what, "num_bytes": g.num_bytes} for g in found]
        print_json({"dry_run": options.dry_run, "num_bytes": total, "removed": items})
        return 0
    for garbage in found:
        out.print(f"{garbage.what} ({size(garbage.num_bytes)})", markup=False, soft_wrap=True)
    done = "would be free" if options.dry_run else "freed"
    out.print(f"{size(total)} {done}" if found else "nothing to remove", markup=False, soft_wrap=True)
    return 0
