"""``deltaw adapter SUBVERB``: what can be done with an adapter once it is trained; one subverb, one file.

A subverb's file has ``main(args: list[str]) -> int``, and is imported only when it is called.
"""

from __future__ import annotations

import importlib

from ...errors import UserError
from ..program import command

SUBVERBS = {
    "inspect": "look inside an adapter, or compare two: ranks, norms, singular values",
    "compress": "lower an adapter's rank, and say what that changed",
    "blend": "make one adapter out of several",
    "merge": "put an adapter into its base: a plain transformers checkpoint",
    "export": "write GGUF files for llama.cpp and Ollama",
    "card": "describe an adapter in a README.md",
    "publish": "put an adapter into a store, as a new version of a name",
    "rollback": "make an earlier version of a name the current one",
    "tag": "give a version of a name a tag, or take it away",
    "list": "show what a store holds, and what is wrong in it",
    "rm": "take a name or a version out of a store",
    "gc": "free the space of what a store no longer needs",
}

_HELP = """usage: deltaw adapter SUBVERB [OPTIONS]

Look into adapters, combine them, shrink them, ship them. Where an adapter is asked for, give its folder, or
its name in a store: NAME, NAME@VERSION or NAME@TAG (--store, else $DELTAW_STORE, else {default}).

{subverbs}

deltaw adapter SUBVERB --help explains a subverb. To begin:
{examples}"""

_EXAMPLES = {
    "inspect runs/first": "which modules learnt something, and how much",
    "publish runs/first tickets": "keep it under a name",
    "list": "see names, versions and tags",
    "rollback tickets": "go back to the version before",
}


def main(args: list[str]) -> int:
    """Run one subverb; returns the exit code."""
    subverb = args[0] if args else "--help"
    if subverb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if subverb not in SUBVERBS:
        expected = ", ".join(SUBVERBS)
        raise UserError(f"no subverb {subverb!r}; expected one of {expected} (see {command('adapter', '--help')})")
    code: int = importlib.import_module(f".{subverb}", __name__).main(args[1:])
    return code


def _help() -> str:
    examples = {command("adapter", *words.split()): what for words, what in _EXAMPLES.items()}
    width = max(map(len, examples))
    return _HELP.format(
        default="~/.local/share/deltaw/adapters",
        subverbs="\n".join(f"  {name:<9} {what}" for name, what in SUBVERBS.items()),
        examples="\n".join(f"  {words:<{width}}   {what}" for words, what in examples.items()),
    )
