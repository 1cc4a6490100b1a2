"""``deltaw chat``: talk to a model; adapters switch in the middle of the conversation."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from .options import parse
from .reading import BaseOptions

HELP = """/adapter NAME  use an adapter (its name here or in the store, or its folder); /adapter base for none
/adapters      list those that are loaded
/system TEXT   set the system message (empty: none)
/reset         forget the conversation
/exit          leave (also Ctrl-D)"""

NO_ADAPTER = "base"


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Talk to a model, with and without its adapters.

    Answers are streamed. /adapter NAME switches at once, /help lists the other commands. Ctrl-C ends an answer.
    """

    adapter: tuple[str, ...] = ()
    """Adapters to load, by folder or by name in a store; the first is active."""
    system: str | None = None
    """System message."""
    temperature: float = 0.0
    """0: always the most likely token."""
    top_p: float = 0.95
    """With a temperature: sample from the most likely tokens that make up this probability."""
    max_new_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    """Seed of the sampling."""


def main(args: list[str]) -> int:
    options = parse(Options, "chat", args)
    from ..errors import UserError
    from .screen import err, quiet_libraries

    quiet_libraries()
    conversation = Conversation(options)
    is_person = sys.stdin.isatty()
    if is_person:
        err.print("/help lists what you can do, /exit leaves.", style="dim")
    while True:
        try:
            line = input(f"{conversation.active}> " if is_person else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return 0
        if line == "/exit":
            return 0
        try:
            if line.startswith("/"):
                print(conversation.command(line))
            elif line:
                _answer(conversation, line)
        except UserError as error:  # a slip in a conversation ends nothing
            err.print(str(error), style="red", markup=False)


class Conversation:
    """The messages so far, and the model with the adapters that were loaded."""

    def __init__(self, options: Options) -> None:
        from ..adapters.peft_format import read_adapter
        from ..adapters.store import locate_adapter
        from ..engine.generate import Sampling
        from .models import base_of, load_model

        self.sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        base = options.model
        if base is None and options.adapter:
            base = base_of(read_adapter(locate_adapter(options.adapter[0], options.store)))
        self.model, self.tokenizer = load_model(
            base, None, dtype=options.dtype, quantization=options.quantization, device=options.device
        )
        self._allow_other_base = options.allow_other_base
        self._store = options.store
        self.active = NO_ADAPTER
        self.system = options.system
        self.messages: list[dict[str, Any]] = []
        self._names: dict[Path, str] = {}
        """What each folder's adapter is called here."""
        for adapter in (*options.adapter, *options.adapter[:1]):
            self.use(adapter)

    def use(self, adapter: str) -> None:
        """Switch to a loaded adapter, ``base``, or one that a folder or the store has; ``UserError`` for all else."""
        from ..nn.inject import activate

        name = adapter if adapter in (*self.loaded, NO_ADAPTER) else self._load(adapter)
        activate(self.model, [] if name == NO_ADAPTER else [name], trainable=False)
        self.active = name

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters there are."""
        from ..nn.state import state_of

        return list(state_of(self.model).configs)

    def _load(self, adapter: str) -> str:
        """Load an adapter, once, and return the name that it gets: its folder's or the store's, made unique."""
        from ..adapters.peft_format import load_adapter
        from ..adapters.store import locate_adapter
        from ..errors import UserError

        try:
            place = locate_adapter(adapter, self._store)
            folder = place.resolve()
            if folder not in self._names:
                called = folder.name if place == Path(adapter) else adapter
                stem = re.sub(r"[^A-Za-z0-9_@+-]", "-", called).strip("-_@+") or "adapter"
                taken = {NO_ADAPTER, *self.loaded}
                name = next(n for n in chain([stem], (f"{stem}-{i}" for i in count(2))) if n not in taken)
                load_adapter(self.model, place, name, allow_other_base=self._allow_other_base)
                self._names[folder] = name
            return self._names[folder]
        except UserError as error:
            raise UserError(f"{error} (loaded are {', '.join([NO_ADAPTER, *self.loaded])})") from None

    def command(self, line: str) -> str:
        """Carry out one /command; returns what to print."""
        verb, _, rest = line.partition(" ")
        rest = rest.strip()
        if verb == "/adapter" and rest:
            self.use(rest)
            return f"now answering: {self.active}"
        if verb in ("/adapter", "/adapters"):
            return ", ".join([NO_ADAPTER, *self.loaded])
        if verb == "/system":
            self.system = rest or None
            return "system message set" if rest else "no system message"
        if verb == "/reset":
            self.messages.clear()
            return "forgotten"
        return HELP

    def prompt(self, line: str) -> list[int]:
        """Token ids of the conversation with ``line`` as the user's next turn."""
        from ..data.formats import Chat
        from ..data.render import prompt_ids

        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*system, *self.messages, {"role": "user", "content": line}]
        ids, _ = prompt_ids(
            Chat(messages=(*turns, {"role": "assistant", "content": ""}), origin="chat"), self.tokenizer
        )
        return ids


def _answer(conversation: Conversation, line: str) -> None:
    """Stream one answer; what was said by a Ctrl-C stays said."""
    from ..engine.generate import stream
    from .screen import visible

    tokens: list[int] = []
    shown = ""
    answer = stream(conversation.model, conversation.prompt(line), conversation.sampling)
    try:
        for token in answer:
            tokens.append(token)
            text = str(conversation.tokenizer.decode(tokens, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                print(visible(text[len(shown) :]), end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        answer.close()
    print()
    conversation.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": shown}]
