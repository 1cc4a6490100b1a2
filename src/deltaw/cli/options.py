"""From arguments to a verb's dataclass: its fields are the flags, its docstrings the help, its YAML keys the same."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ..errors import UserError
from .program import command

Options = TypeVar("Options")


def parse(kind: type[Options], verb: str, args: list[str], *, negatable: bool = False) -> Options:
    """The verb's options; ``negatable``: its flags have a ``--no-`` twin, for what a file has switched on.

    Raises ``UserError`` in one line for a flag that doesn't exist or a value that isn't one.
    """
    config = () if negatable else (tyro.conf.FlagCreatePairsOff,)
    if "-h" in args or "--help" in args:
        tyro.cli(kind, prog=f"deltaw {verb}", args=["--help"], config=config)  # prints, and exits with 0
    complaint = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "5000"  # tyro draws its complaint into a box; one line of it is wanted whole
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"deltaw {verb}", args=args, config=config)
    except SystemExit:
        raise UserError(f"{_gist(complaint.getvalue())}; see {command(*verb.split(), '--help')}") from None
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width


def yaml_args(kind: type[Any], path: Path) -> list[str]:
    """A YAML file's keys as flags, so that one parser reads both. Raises ``UserError`` for what isn't a flag."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, one a line, such as 'learning-rate: 2e-4'")
    known = {f.name: f for f in dataclasses.fields(kind)}
    args: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            flags = ", ".join(sorted(n.replace("_", "-") for n in known))
            raise UserError(f"{path}: {key!r} is not a key; expected some of {flags}")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(known[name].default, bool):
            if not isinstance(value, bool):
                raise UserError(f"{path}: {key!r}: expected true or false, found {value!r}")
            args.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif value is not None:
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, dict | list) for part in parts):
                raise UserError(f"{path}: {key!r}: expected one value or a plain list, found {value!r}")
            args += [flag, ",".join(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)]
    return args


def _gist(complaint: str) -> str:
    """What a boxed complaint says, on one line, with the flags that it suggests."""
    lines = [line.strip("╭─╮│╰╯ ") for line in complaint.splitlines()]
    said = [line for line in lines if line.strip("-")] + ["", "the arguments can't be read"]
    text = said[1].removeprefix("Error parsing Options: ")  # said[0] is the box's title
    flags = [m[0] for line in said if (m := re.match(r"--[\w-]+", line))]
    if text.startswith("Missing from"):
        flags = [line for line in said if re.fullmatch(r"[A-Z][A-Z@|]+", line)] + flags  # positional ones first
        return f"{' and '.join(flags)} must be given"
    if text.startswith("Unrecognized") and flags:
        text += f" (perhaps {', '.join(flags[:3])})"
    return text
