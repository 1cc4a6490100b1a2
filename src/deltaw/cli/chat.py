"""``deltaw chat``: talk to a model; adapters switch in the middle of the conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .options import parse

HELP = """/adapter NAME  use an adapter (its name, or a folder to load); /adapter base for none
/adapters      list those that are loaded
/system TEXT   set the system message (empty: none)
/reset         forget the conversation
/exit          leave (also Ctrl-D)"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Talk to a model, with and without its adapters.

    Answers are streamed. /adapter NAME switches at once, /help lists the other commands. Ctrl-C ends an answer.
    """

    adapter: tuple[str, ...] = ()
    """Adapters to load, by folder; the first is active."""
    model: str | None = None
    """Base model; by default the one that the adapter names."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the base."""
    device: str = "auto"
    """cpu, cuda …; auto: CUDA where there is one."""


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
        from ..engine.generate import Sampling
        from ..nn.load import load_base

        self.sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        base = options.model
        if base is None and options.adapter:
            stored = read_adapter(options.adapter[0])
            base = stored.provenance.base_name or stored.config.base_model_name_or_path
        self.model, self.tokenizer = load_base(base or "smollm2-135m", dtype=options.dtype, device=options.device)
        self.active = "base"
        self.system = options.system
        self.messages: list[dict[str, Any]] = []
        for folder in reversed(options.adapter):
            self.use(folder)

    def use(self, adapter: str) -> None:
        """Switch to a loaded adapter, ``base``, or one that a folder holds. Raises ``UserError`` for anything else."""
        from ..adapters.peft_format import load_adapter
        from ..nn.inject import activate, state_of

        loaded = state_of(self.model).configs
        if adapter in ("base", "none"):
            activate(self.model, [])
            self.active = "base"
            return
        if adapter not in loaded:
            name = Path(adapter).resolve().name.replace(".", "-")
            if name not in loaded:
                load_adapter(self.model, adapter, name)
            adapter = name
        activate(self.model, [adapter], trainable=False)
        self.active = adapter

    def command(self, line: str) -> str:
        """Carry out one /command; returns what to print."""
        from ..nn.inject import state_of

        verb, _, rest = line.partition(" ")
        rest = rest.strip()
        if verb == "/adapter" and rest:
            self.use(rest)
            return f"now answering: {self.active}"
        if verb in ("/adapter", "/adapters"):
            return ", ".join(["base", *state_of(self.model).configs])
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

    tokens: list[int] = []
    shown = ""
    answer = stream(conversation.model, conversation.prompt(line), conversation.sampling)
    try:
        for token in answer:
            tokens.append(token)
            text = str(conversation.tokenizer.decode(tokens, skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        print(" …", end="")
    finally:
        answer.close()  # type: ignore[attr-defined]
    print()
    conversation.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": shown}]
