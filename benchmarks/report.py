"""Write the tables of docs/benchmarks.md anew from benchmarks/results/*.json: no figure there is typed by hand.

    python benchmarks/report.py [--check]

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; --check only says whether all are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def train_step(result: dict) -> str:
    """Medians and ratios: one row a configuration, one pair of columns a dtype."""
    dtypes = list(result["results"])
    lines = [
        "| | " + " | ".join(f"{d}, s | {d}, against PEFT | {d}, peak" for d in dtypes) + " |",
        "|---" + "|---:" * 3 * len(dtypes) + "|",
    ]
    for name in result["results"][dtypes[0]]:
        cells = []
        for dtype in dtypes:
            row = result["results"][dtype][name]
            peer = result["results"][dtype].get(_peer(name))
            ratio = "" if peer is None else f"{peer['seconds'] / row['seconds']:.2f}× faster"
            cells.append(f"{row['seconds']:.2f} | {ratio} | {row['peak_rss_bytes'] / 1e9:.2f} GB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", machine(result)])


def _peer(name: str) -> str:
    return name.replace("deltaw", "PEFT") if name.startswith("deltaw") else ""


def machine(result: dict) -> str:
    """One line: where, with what, by which command."""
    m = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    return (
        f"{m['processor']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB; Python {m['python']}, {versions}; "
        f"{m['day']}. `{m['command']}`"
    )


TABLES = {"train_step": train_step}


def main() -> int:
    page = PAGE.read_text()
    new = page
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            block = f"<!-- {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end {name} -->"
            new, count = re.subn(rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _: block, new, flags=re.DOTALL)
            if not count:
                print(f"{PAGE.name} has no place for {name}", file=sys.stderr)
                return 1
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
