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

Options = TypeVar("Options")

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def parse(kind: type[Options], verb: str, args: list[str]) -> Options:
    """The verb's options. Raises ``UserError`` in one line for a flag that doesn't exist or a value that isn't one."""
    if "-h" in args or "--help" in args:
        tyro.cli(kind, prog=f"deltaw {verb}", args=["--help"], config=_CONFIG)  # prints, and exits with 0
    complaint = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "500"  # tyro draws its complaint into a box; one line of it is wanted whole
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=f"deltaw {verb}", args=args, config=_CONFIG)
    except SystemExit:
        raise UserError(f"{_gist(complaint.getvalue())}; see deltaw {verb} --help") from None
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width


def yaml_args(kind: type[Any], path: Path) -> list[str]:
    """A YAML file's keys as flags, so that one parser reads both. Raises ``UserError`` for what isn't a flag."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, one a line, such as 'learning-rate: 2e-4'")
    known = {f.name for f in dataclasses.fields(kind)}
    args: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            flags = ", ".join(sorted(n.replace("_", "-") for n in known))
            raise UserError(f"{path}: {key!r} is not a key; expected some of {flags}")
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            args.append(flag)
        elif isinstance(value, list):
            args += [flag, ",".join(map(str, value))]
        elif isinstance(value, dict):
            raise UserError(f"{path}: {key!r}: expected one value, found a mapping")
        elif value is not None and value is not False:
            args += [flag, str(value)]
    return args


def _gist(complaint: str) -> str:
    """What a boxed complaint says, on one line, with the flags that it suggests."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in complaint.splitlines()]
    said = [line for line in lines if line]
    text = next((line for line in said[1:] if line), said[0] if said else "the arguments can't be read")
    suggested = [m[0] for line in said if (m := re.match(r"--[\w-]+", line))]
    if "Unrecognized" in text and suggested:
        text += f" (perhaps {', '.join(suggested[:3])})"
    return text.removeprefix("Error parsing Options: ")
