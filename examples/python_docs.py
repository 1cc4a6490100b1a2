"""Chat pairs out of the documentation that every Python carries: real prose, no download.

A function's, class's or method's name and signature becomes a question, its docstring the answer; modules and
the topics of ``help()`` give the longer answers. Some thousands of pairs, their answers from a few to about a
thousand tokens long, which is what packing, loss masks and throughput want to be tried on.

    python examples/python_docs.py --out DIR [--limit N] [--seed S]

writes ``train.jsonl`` and ``heldout.jsonl``, one ``{"messages": [user, assistant], "module": ...}`` a line.
Whole top-level modules (and whole topics) are held out, so nothing of a held-out module is seen in training.
The same Python and the same seed give the same files. Left out: private names, special methods, modules that
act when imported or exist on one platform only, and every text that was met before.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

MIN_CHARS = 20
MAX_CHARS = 4_000
MAX_SIGNATURE_CHARS = 160
HELDOUT_SHARE = 0.1

ACT_ON_IMPORT = frozenset({"antigravity", "this", "readline", "rlcompleter", "site", "ensurepip", "distutils"})
NEED_A_SCREEN = frozenset({"idlelib", "tkinter", "turtle", "turtledemo"})
NOT_FOR_USERS = frozenset({"imp", "lib2to3", "msilib", "pydoc_data", "test", "tests"})
REPEAT_ANOTHER = frozenset({"genericpath", "nt", "ntpath", "posix", "sre_compile", "sre_constants", "sre_parse"})
HOOKS = frozenset({"breakpointhook", "displayhook", "excepthook", "set_trace", "unraisablehook"})
SKIPPED = ACT_ON_IMPORT | NEED_A_SCREEN | NOT_FOR_USERS | REPEAT_ANOTHER

QUESTIONS = {
    "function": (
        "What does `{call}` from the `{module}` module do?",
        "Explain Python's `{name}`. Its signature is `{call}`.",
        "How do I use `{call}` in the module `{module}`?",
        "I came across `{call}` in `{module}`. What is it for?",
        "Document the function `{call}` of `{module}`.",
        "In Python, what is `{name}` good for?",
    ),
    "method": (
        "What does the method `{call}` of the module `{module}` do?",
        "Explain `{name}` to me, please.",
        "What happens when I call `{call}` (from `{module}`)?",
        "Write the documentation of the method `{call}` in `{module}`.",
        "Which purpose has `{name}` in Python's standard library?",
    ),
    "class": (
        "What is the class `{call}` in `{module}`?",
        "When would I use `{name}`?",
        "Describe Python's class `{name}`, created with `{call}`.",
        "Tell me about `{call}` from `{module}`.",
    ),
    "module": (
        "What is the Python module `{module}` for?",
        "Give me an overview of the module `{module}`.",
        "Introduce me to `{module}` from Python's standard library.",
    ),
    "topic": (
        "Explain this topic of the Python language: {name}",
        "What does the Python reference say about the following? {name}",
        'I typed "{module}" into Python\'s help. What should I read about "{name}"?',
    ),
}

Example = dict[str, Any]


class Entry(NamedTuple):
    """One thing that has documentation."""

    kind: str
    """A key of ``QUESTIONS``."""
    module: str
    """Full module name, or "topics.<topic>"."""
    name: str
    """Dotted name with the module in front; a title for a topic."""
    call: str
    """The name without its module, with its signature where one is known."""
    doc: str

    @property
    def group(self) -> str:
        """What is kept on one side of the split: the top-level module, or the topic."""
        return self.module if self.kind == "topic" else self.module.partition(".")[0]


def build(limit: int | None = None, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, at most ``limit`` in all.

    The split depends on ``seed`` and not on ``limit``: a limit thins both sides out, it moves no module.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}; expected at least 2, one example for each split")
    entries = _distinct(_entries())
    rng = random.Random(f"python_docs:{seed}")
    heldout_groups = _choose_groups(entries, rng)
    examples = [(entry.group in heldout_groups, _example(entry, rng)) for entry in entries]
    train = [example for is_heldout, example in examples if not is_heldout]
    heldout = [example for is_heldout, example in examples if is_heldout]
    if limit is None or limit >= len(examples):
        return train, heldout
    num_heldout = min(len(heldout), max(1, round(limit * HELDOUT_SHARE)))
    return _thinned(train, limit - num_heldout, rng), _thinned(heldout, num_heldout, rng)


def _choose_groups(entries: list[Entry], rng: random.Random) -> set[str]:
    """Groups that together hold about ``HELDOUT_SHARE`` of the modules' entries and of the topics."""
    chosen: set[str] = set()
    for is_topic in (False, True):
        sizes: dict[str, int] = {}
        for entry in entries:
            if (entry.kind == "topic") == is_topic:
                sizes[entry.group] = sizes.get(entry.group, 0) + 1
        room = round(sum(sizes.values()) * HELDOUT_SHARE)
        for group in rng.sample(sorted(sizes), len(sizes)):
            if sizes[group] <= room:
                chosen.add(group)
                room -= sizes[group]
    return chosen


def _thinned(examples: list[Example], count: int, rng: random.Random) -> list[Example]:
    kept = rng.sample(range(len(examples)), min(count, len(examples)))
    return [examples[place] for place in sorted(kept)]


def _example(entry: Entry, rng: random.Random) -> Example:
    question = rng.choice(QUESTIONS[entry.kind])
    if entry.kind == "topic":
        question = question.format(module=entry.module.removeprefix("topics."), name=entry.name)
    else:
        question = question.format(module=entry.module, name=entry.name, call=entry.call)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": entry.doc}]
    return {"messages": messages, "module": entry.module}


def _distinct(entries: Iterator[Entry]) -> list[Entry]:
    """The entries whose text is long enough to say something and was not met before, cut to ``MAX_CHARS``."""
    seen: set[str] = set()
    kept: list[Entry] = []
    for entry in entries:
        doc = _cut(entry.doc.strip())
        if len(doc) >= MIN_CHARS and doc not in seen:
            seen.add(doc)
            kept.append(entry._replace(doc=doc))
    return kept


def _cut(text: str) -> str:
    """``text`` up to the last paragraph (or else line, or else word) that ends within ``MAX_CHARS``."""
    if len(text) <= MAX_CHARS:
        return text
    head = text[: MAX_CHARS + 1]
    for border in ("\n\n", "\n", " "):
        end = head.rfind(border)
        if end >= MAX_CHARS // 4:
            return head[:end].rstrip()
    return head[:MAX_CHARS]


def _entries() -> Iterator[Entry]:
    """Everything documented, in alphabetical order of modules and names; topics last."""
    for module in _modules():
        yield Entry("module", module.__name__, module.__name__, "", inspect.getdoc(module) or "")
        for name, member in _public_members(module):
            if inspect.isclass(member):
                yield from _class_entries(module.__name__, name, member)
            elif inspect.isroutine(member):
                yield _entry("function", module.__name__, name, member)
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        title, _, body = text.strip().partition("\n")
        yield Entry("topic", f"topics.{topic}", title.strip(), "", body.strip().lstrip("*=-~"))


def _modules() -> Iterator[ModuleType]:
    """The public modules of the standard library that can be imported here, parents before children."""
    waiting = sorted((name for name in sys.stdlib_module_names if _is_wanted(name)), reverse=True)
    while waiting:
        module = _imported(waiting.pop())
        if module is None:
            continue
        yield module
        if hasattr(module, "__path__") and module.__name__ != "encodings":
            found = pkgutil.iter_modules(module.__path__, module.__name__ + ".")
            waiting += sorted((info.name for info in found if _is_wanted(info.name)), reverse=True)


def _is_wanted(name: str) -> bool:
    return not any(part.startswith("_") or part in SKIPPED for part in name.split("."))


def _imported(name: str) -> ModuleType | None:
    """The module, imported without a sound; None where this platform or build does not have it."""
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):
            return None


def _public_members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Names that the module offers as its own: its ``__all__``, else what was defined in it."""
    offered = getattr(module, "__all__", None)
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or name in HOOKS:  # test runners and shells put their own functions there
            continue
        if name in offered if offered is not None else getattr(member, "__module__", None) == module.__name__:
            yield name, member


def _class_entries(module: str, name: str, member: type) -> Iterator[Entry]:
    """The class and its own public methods; an inherited text is its parent's and not repeated."""
    doc = vars(member).get("__doc__")
    is_only_signature = isinstance(doc, str) and doc.startswith(f"{member.__name__}(") and "\n" not in doc
    if isinstance(doc, str) and not is_only_signature:
        yield _entry("class", module, name, member)
    for attribute, value in sorted(vars(member).items()):
        method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not attribute.startswith("_") and inspect.isroutine(method):
            yield _entry("method", module, f"{name}.{attribute}", method)


def _entry(kind: str, module: str, name: str, member: Any) -> Entry:
    doc = inspect.getdoc(member) if isinstance(getattr(member, "__doc__", None), str) else None
    return Entry(kind, module, f"{module}.{name}", name + _signature(member), doc or "")


class _Something:
    """Stands for a default whose ``repr`` tells nothing or differs from run to run."""

    def __repr__(self) -> str:
        return "..."


def _signature(member: Any) -> str:
    """The signature without annotations, or nothing where Python does not know it."""
    try:
        signature = inspect.signature(member)
    except Exception:  # mostly ValueError; a few builtins of some versions fail in other ways (select in 3.13)
        return ""
    parameters = []
    for parameter in signature.parameters.values():
        is_plain = "<" not in repr(parameter.default)
        default = parameter.default if is_plain or parameter.default is parameter.empty else _Something()
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    text = str(inspect.Signature(parameters))
    return text if len(text) <= MAX_SIGNATURE_CHARS else "(...)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _at_least_two(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of examples; expected 2 or more")
    return int(text[:9])


def _write(path: Path, examples: list[Example]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def _report(name: str, examples: list[Example]) -> str:
    """Counts, and percentiles of the answers' lengths."""
    answers = [example["messages"][1]["content"] for example in examples]
    rows = [f"{name}: {len(examples)} examples from {len({example['module'] for example in examples})} modules"]
    for unit, lengths in (
        ("characters", [len(a) for a in answers]),
        ("words", [len(a.split()) for a in answers]),
    ):
        lengths.sort()
        marks = (f"p{p} {lengths[p * (len(lengths) - 1) // 100]}" for p in (0, 10, 25, 50, 75, 90, 99, 100))
        rows.append(f"  {unit}: {', '.join(marks)}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Write both files and print what they hold."""
    parser = _Parser(prog="python_docs.py", description="Chat pairs out of Python's own documentation.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--limit", type=_at_least_two, help="at most so many examples in both files together")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the wording (default: 0)")
    options = parser.parse_args(arguments)
    splits = dict(zip(("train", "heldout"), build(options.limit, options.seed), strict=True))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, examples in splits.items():
            _write(options.out / f"{name}.jsonl", examples)
    except OSError as error:
        parser.error(f"cannot write to --out {options.out}: {error.strerror}; give a folder that can be written to")
    for name, examples in splits.items():
        print(_report(name, examples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
