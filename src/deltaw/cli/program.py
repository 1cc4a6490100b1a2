"""Commands to type next, by the name that this program can be started by from here."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "deltaw"


def program() -> str:
    """``deltaw`` where the shell finds this one by that name, else its path (.venv/bin/deltaw)."""
    path = Path(sys.argv[0])
    if path.name != NAME or not path.is_file():  # python -m, python -c, a test
        return NAME
    known = shutil.which(NAME)
    if known is not None and Path(known).resolve() == path.resolve():
        return NAME
    path = path.absolute()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def command(*words: object) -> str:
    """A command of this program, as it is typed into a shell."""
    return " ".join([program(), *(shlex.quote(str(word)) for word in words)])
