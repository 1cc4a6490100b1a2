"""An Ollama Modelfile beside a GGUF file.

Ollama writes prompts by a template of its own language. It is derived from the tokenizer's chat template by what that
one writes: a few conversations are rendered, taken apart into what stands around each role's text, and other
conversations, all ending with the user's turn, are put together from those parts. Only where every one of them comes
out as the tokenizer's own, to the character, is there a TEMPLATE; else a comment says why there is none, and Ollama
takes what it finds in the file.

Not in here: tools, thinking, images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_S, _U, _A, _V, _B = "Sbeginsend", "Ubeginsend", "Abeginsend", "Vbeginsend", "Bbeginsend"
_CHANGING = ("strftime_now", "date_string")

Around = tuple[str, str]
"""What stands before and behind the text of a turn."""


class NoTemplate(Exception):
    """Why there is none."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A chat template as texts around each role's own."""

    user: Around
    assistant: Around
    system: Around | None
    """None: the chat template has no system turns."""
    default_system: str | None
    """What the chat template says where a conversation has no system turn."""

    def render(self, messages: list[tuple[str, str]], *, prompt: bool) -> str:
        """A conversation without BOS, as Ollama would write it; ``prompt``: up to where the assistant begins."""
        if self.default_system is not None and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        around = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        text = "".join(around[role][0] + content + around[role][1] for role, content in messages)
        return text + (self.assistant[0] if prompt else "")

    def go_template(self) -> str:
        """The same in Go's template language, over Ollama's ``.Messages``."""
        roles = [("system", self.system)] if self.system else []
        roles += [("user", self.user), ("assistant", self.assistant)]
        branches = [
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}'
            for i, (role, around) in enumerate(roles)
        ]
        return "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + self.assistant[0]


def modelfile(tokenizer: PreTrainedTokenizerBase, *, base: str, adapter: str | None, note: str = "") -> str:
    """The text of a Modelfile: ``base`` and ``adapter`` are files as Ollama will find them."""
    lines = [f"# {line}" for line in note.splitlines()] + [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    stops = [tokenizer.eos_token] if isinstance(tokenizer.eos_token, str) else []
    try:
        turns = turns_of(tokenizer)
    except NoTemplate as why:
        lines += [
            f"# No TEMPLATE: {why}.",
            "# Ollama takes the chat template in the model's own file where it knows it.",
        ]
    else:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
        if turns.default_system is not None:
            lines.append(f'SYSTEM """{turns.default_system}"""')
        stops.append(turns.assistant[1].strip())
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and '"' not in stop]
    return "\n".join(lines) + "\n"


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The tokenizer's chat template taken apart; raises ``NoTemplate`` where it is more than texts around turns."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise NoTemplate("the tokenizer has no chat template" if template is None else "it has several chat templates")
    if any(word in template for word in _CHANGING):
        raise NoTemplate("the chat template writes today's date")
    start = _start(tokenizer)

    def render(*messages: tuple[str, str], prompt: bool = False) -> str:
        given = [{"role": role, "content": content} for role, content in messages]
        text: Any = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=prompt)
        return str(text).removeprefix(start)  # Ollama's tokenizer puts it there

    try:
        turns = _taken_apart(render)
        _check(turns, render)
    except NoTemplate:
        raise
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:100]
        raise NoTemplate(f"the chat template refuses an ordinary conversation ({reason})") from None
    return turns


def _taken_apart(render: Any) -> Turns:
    _, user_after = _split(render(("user", _U)), _U)
    first, rest = _split(render(("user", _U), ("assistant", _A), ("user", _V), ("assistant", _B)), _U)
    between, rest = _split(rest, _A)
    again, rest = _split(rest, _V)
    assistant_after = _split(rest, _B)[1]
    if not between.startswith(user_after) or not again.startswith(assistant_after):
        raise NoTemplate("the chat template writes the last turn otherwise than those before it")
    user = (again.removeprefix(assistant_after), user_after)
    assistant = (between.removeprefix(user_after), assistant_after)
    if not first.endswith(user[0]):
        raise NoTemplate("the chat template writes the first turn otherwise than the others")
    head = first.removesuffix(user[0])
    try:
        before, rest = _split(render(("system", _S), ("user", _U)), _S)
        behind = _split(rest, _U)[0]
        system = (before, behind.removesuffix(user[0])) if behind.endswith(user[0]) else None
    except NoTemplate:
        raise
    except Exception:  # such as Gemma's: "System role not supported"
        system = None
    default = None
    if head:
        if system is None or not (head.startswith(system[0]) and head.endswith(system[1])):
            raise NoTemplate("the chat template begins with more than a system turn")
        default = head.removeprefix(system[0]).removesuffix(system[1])
    return Turns(user=user, assistant=assistant, system=system, default_system=default or None)


def _check(turns: Turns, render: Any) -> None:
    user, reply, system = ("user", "One\n two"), ("assistant", "Three, four."), ("system", "Be brief.")
    thought = ("assistant", "<think>\nHm.\n</think>\n\nFive.")
    talks = [[user], [user, reply, user], [user, reply, user, thought, user]]
    if turns.system is not None:
        talks += [[system, *talk] for talk in talks]
    for talk in talks:
        for prompt in (False, True):
            if render(*talk, prompt=prompt) != turns.render(talk, prompt=prompt):
                raise NoTemplate("the chat template does more than put texts around turns")
    parts = [*turns.user, *turns.assistant, *(turns.system or ()), turns.default_system or ""]
    if any('"""' in part or "{{" in part or "}}" in part or part.endswith('"') for part in parts):
        raise NoTemplate("the chat template has quotes or braces that a Modelfile can't hold")


def _split(text: str, at: str) -> Around:
    before, found, after = text.partition(at)
    if not found or at in after:
        raise NoTemplate("the chat template changes the text of a turn, or says it twice")
    return before, after


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """BOS, where the tokenizer puts it before a text."""
    bos = tokenizer.bos_token
    begins = isinstance(bos, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(bos) if begins else ""
