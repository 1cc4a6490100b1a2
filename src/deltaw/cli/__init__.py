"""The command ``deltaw``: one verb, one file; each is imported only when it is called.

Exit codes: 0 done, 1 a fault of ours (with its traceback), 2 a mistake in what was asked (one line), 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback

from ..errors import UserError
from .program import command

VERBS = {
    "demo": "fine-tune a small model on a real task, and see what it learnt",
    "train": "train an adapter on your data",
    "eval": "measure loss, perplexity and exact answers on held-out data",
    "compare": "show answers of the base and of an adapter side by side",
    "chat": "talk to a model, with and without its adapters",
    "quantize": "write a model in 4 bits, to be loaded in seconds",
    "modules": "list what can be adapted in a model, and what it would cost",
    "adapter": "inspect, compress, blend, merge, export, publish … adapters",
}

_HELP = """usage: deltaw VERB [OPTIONS]

Low-rank adapters for language models: ΔW = (α/r)·B·A beside a frozen base.

{verbs}

deltaw VERB --help explains a verb. To begin:
{examples}"""

_EXAMPLES = {
    "demo": "watch a model learn a task in minutes",
    "train --data my.jsonl --preview 3": "see your data as the model will",
    "train --data my.jsonl --out runs/first": "train; --model takes a folder or a hub id",
    "compare --adapter runs/first --data my.jsonl": "look at what changed",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    verb = args[0] if args else "--help"
    try:
        code = _call(verb, args[1:])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # a verb's --help
        return stop.code if isinstance(stop.code, int) else 0
    except UserError as error:
        return _say(verb, str(error), 2)
    except KeyboardInterrupt:
        if argv is None:  # the process is ours, and another Ctrl-C would end its clean-up in a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _say(verb, "interrupted", 130)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            return _fault(verb)
        return _say(
            verb, f"{error.strerror or error}: {error.filename or 'a file'}; check the path, rights and space", 2
        )
    except Exception:
        return _fault(verb)


def _call(verb: str, args: list[str]) -> int:
    if verb in ("-h", "--help", "help"):
        examples = {command(*words.split()): what for words, what in _EXAMPLES.items()}
        width = max(map(len, examples))
        print(
            _HELP.format(
                verbs="\n".join(f"  {name:<9} {what}" for name, what in VERBS.items()),
                examples="\n".join(f"  {words:<{width}}   {what}" for words, what in examples.items()),
            )
        )
        return 0
    if verb in ("-V", "--version"):
        from importlib.metadata import version

        print(f"deltaw {version('deltaw')}")
        return 0
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}; expected one of {', '.join(VERBS)} (see {command('--help')})")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # set before the first tokenizer, not after a fork
    # Threads that wait for each other shall soon sleep instead of spinning on: with anything else on the same cores,
    # torch's default made training five times slower, and alone it was no faster. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    code: int = importlib.import_module(f".{verb}", __name__).main(args)
    return code


def _say(verb: str, message: str, code: int) -> int:
    print(f"deltaw {verb}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _fault(verb: str) -> int:
    traceback.print_exc()
    return _say(verb, "this is a fault of deltaw, not yours; please report it with the lines above", 1)
