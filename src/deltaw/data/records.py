"""Read a source row by row: a file, a hub data set or a Python list becomes (place, row) records.

``datasets`` reads Parquet and hub data sets, which are typed to begin with. JSON and CSV are read with the
standard library: a columnar reader must give all rows one schema, and that distorts text (measured with
datasets 5.2). A row with other keys is filled with nulls, a string that looks like a date becomes a datetime,
CSV's "0012" becomes 12 and "NA" becomes null, and a malformed line is reported without its number. Nulls in
Parquet and hub rows mean "this row has no such key" and are removed; else every tool call would carry the
argument names of all the others.

What a row means is ``formats``' business.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UserError

Row: TypeAlias = Mapping[str, Any]
Source: TypeAlias = str | Path | Sequence[Row]
log = logging.getLogger("deltaw")
BOM = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """What is wrong with one row; collected, and raised as one UserError for the whole source."""


# Place ("line 17", "row 3" or "item 3") and what was read there: a row or a BadRow.
Record: TypeAlias = tuple[str, object]


def name_of(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "list"


def records(source: Source, split: str) -> Iterator[Record]:
    path = existing_file(source)
    if path is not None:
        read = _READERS.get(path.suffix.lower())
        if read is None:
            known = ", ".join(_READERS)
            raise UserError(f"{source}: unknown extension {path.suffix!r}; expected one of {known}")
        try:
            yield from read(path)
        except OSError as error:
            raise UserError(f"{source}: cannot be read: {error}") from error
    elif isinstance(source, str | Path):
        yield from _read_hub(str(source), split)
    else:
        yield from ((f"item {number}", row) for number, row in enumerate(source, 1))


def existing_file(source: Source) -> Path | None:
    """The path of a file; None for a list and for what may be a hub id; UserError for anything else."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{source}: is a directory; name one file in it")
    if path.exists():
        raise UserError(f"{source}: is not a regular file; save the data to a file and name that")
    if path.suffix.lower() in _READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", str(source)):
        raise UserError(f"{source}: no such file; check the path, or give a hub data set as owner/name")
    return None


def split_of(source: Source, given: str | None, *, default: str, flag: str) -> str:
    """The split to read of a hub data set: the one given, else the default. ``UserError`` for a split of a file."""
    if given is not None and existing_file(source) is not None:
        raise UserError(f"{flag} {given}: {source} is a file, and only hub data sets have splits; leave {flag} out")
    return given or default


def _read_json(path: Path) -> Iterator[Record]:
    """One object a line or one array of objects: the first character tells, not the file's name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    return _read_json_array(path) if start.startswith(b"[") else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8").rstrip()
                if line:
                    yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", _unreadable(error)


def _read_json_array(path: Path) -> Iterator[Record]:
    try:
        rows = json.loads(_decoded(path))
    except (ValueError, RecursionError) as error:
        yield f"line {getattr(error, 'lineno', 1)}", _unreadable(error)
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _unreadable(error: Exception) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        hint = "expected one object a line, or one array of objects"
        return BadRow(f"malformed JSON at column {error.colno}: {error.msg}; {hint}")
    if isinstance(error, UnicodeDecodeError):
        return BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    return BadRow(f"unreadable JSON: {error}")  # 1000 nested brackets, integers of more than 4300 digits


def _decoded(path: Path) -> str:
    raw = path.read_bytes().removeprefix(BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: invalid UTF-8; save the file as UTF-8") from error


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses cells above 128 kB; there is no limit per reader
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    number = 0
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise UserError(f"{path}: the header names a column twice: {', '.join(header)}; rename one")
        for cells in filter(None, reader):
            number += 1
            fits = len(cells) == len(header)
            problem = BadRow(f"{len(cells)} cells under a header of {len(header)}; quote cells with commas")
            yield f"row {number}", dict(zip(header, cells, strict=True)) if fits else problem
    except csv.Error as error:
        yield f"row {number + 1}", BadRow(f"malformed CSV at line {reader.line_num}: {error}")


def _read_parquet(path: Path) -> Iterator[Record]:
    # Streaming reads the file where it lies; otherwise datasets would first write a copy into its cache.
    return _read_datasets(str(path), "parquet", data_files=str(path), split="train", streaming=True)


def _read_hub(source: str, split: str) -> Iterator[Record]:
    repository, _, config = source.partition(":")
    log.info("looking up the data set %s on the hub", source)
    return _read_datasets(source, repository, name=config or None, split=split)


def _read_datasets(source: str, *args: Any, **options: Any) -> Iterator[Record]:
    import datasets  # half a second, and only needed here

    try:
        for number, row in enumerate(datasets.load_dataset(*args, **options), 1):
            yield f"row {number}", _without_nulls(row)
    except Exception as error:  # a dozen kinds: network, access, unknown split or config, corrupt Parquet
        why = " ".join(str(error).split())[:300]  # the second line may list the configs that there are
        if options.get("streaming"):
            raise UserError(f"{source}: no readable Parquet file ({why}); check the file") from error
        raise UserError(
            f"{source}: no readable file or hub data set, split {options['split']} ({why}); check the path, or the "
            "hub's name (owner/name, or owner/name:config) and the split (--data-split or --eval-split)"
        ) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
