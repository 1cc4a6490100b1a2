"""Read training data: a file, a hub data set or a Python list becomes a list of typed examples.

Job: tell the format of each row by its keys, validate every row, and return all of them or raise one error
that names the first bad lines. No row is ever dropped, filled in or repaired silently.

What a row may be (``data_format`` names one; "auto" tells them apart, in this order; ? means optional):

- chat         ``messages`` [{role, content, tool_calls?, weight?}] or ShareGPT's ``conversations``; ``tools``?
- prompt       ``prompt`` + ``completion``: two strings (a raw continuation) or two message lists (a chat)
- instruction  ``instruction`` + ``output`` (or ``response``), ``input`` (or ``context``)?, ``system``?
- text         ``text``

Other keys (ids, sources) are ignored. One file holds one format. An assistant's turn is learnt unless its ``weight``
is 0 (OpenAI's key) or it stands in a ``prompt``.

Left out: images and audio, preference pairs, data larger than memory, tokenisation (see ``render``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import UserError
from .records import BadRow, Row, Source, existing_file, name_of, records

Message: TypeAlias = dict[str, Any]

EXPECTED_KEYS = {
    "chat": "messages",
    "prompt": "prompt+completion",
    "instruction": "instruction+output",
    "text": "text",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
NUM_ERRORS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation with at least one assistant turn."""

    messages: tuple[Message, ...]
    """As chat templates take them; contents are strings (None only beside tool_calls), arguments dicts."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions the assistant may call."""
    unsupervised: frozenset[int] = frozenset()
    """Indices of the assistant's turns that are context only; there is at least one other."""
    origin: str
    """Where it came from, for error messages: "data.jsonl:17"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A raw prompt and its continuation, joined without anything between them."""

    prompt: str
    completion: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document, every token of which is a target."""

    text: str
    origin: str


Example: TypeAlias = Chat | Completion | Text


def load_examples(source: Source, *, data_format: str = "auto", split: str = "train") -> list[Example]:
    """All examples of ``source``: a path, a hub id ("owner/name" or "owner/name:config"), or a list of dicts.

    ``split`` is for hub data sets only ("test", "train[:90%]"). Raises UserError when the source cannot be read, is
    empty, mixes formats, or has any bad row.
    """
    if data_format != "auto" and data_format not in EXPECTED_KEYS:
        known = ", ".join(["auto", *EXPECTED_KEYS])
        raise UserError(f"--data-format {data_format!r} is unknown; expected one of {known}")
    name = name_of(source)
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str, str] = {}  # format → the first place that has it
    for place, row in records(source, split):
        try:
            found, example = _parse(row, data_format, origin=f"{name}:{place.removeprefix('line ')}")
        except BadRow as problem:
            problems.append(f"{place}: {problem}")
        else:
            seen.setdefault(found, place)
            examples.append(example)
    if problems:
        count = f"{len(problems)} bad {problems[0].split()[0]}{'s' * (len(problems) > 1)}"
        shown = "; ".join(problems[:NUM_ERRORS_SHOWN])
        raise UserError(f"{count} in {name}; first: {shown}; fix or name the format with --data-format")
    if len(seen) > 1:
        (first, place), (other, where) = list(seen.items())[:2]
        mix = f"{where} has {EXPECTED_KEYS[other]} but {place} has {EXPECTED_KEYS[first]}"
        raise UserError(f"{name} mixes formats: {mix}; split it into files of one format each")
    if not examples:
        raise UserError(f"{name} is empty; expected at least one example")
    return examples


def sha256_of(source: Source, *, split: str = "train") -> str:
    """The data's identity: a hash of the file's bytes, else of the rows as canonical JSON."""
    path = existing_file(source)
    if path is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for _, row in records(source, split):
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return digest.hexdigest()


def _parse(row: object, data_format: str, origin: str) -> tuple[str, Example]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with keys {_expected()}, found {type(row).__name__}")
    found = _format_of(row) if data_format == "auto" else data_format
    if found is None:
        keys = ", ".join(map(str, row)) or "(none)"
        raise BadRow(f"expected one of keys {_expected()}, found keys {keys}")
    return found, _PARSERS[found](row, origin)


def _expected() -> str:
    return " | ".join(EXPECTED_KEYS.values())


def _format_of(row: Row) -> str | None:
    keys = {key for key, value in row.items() if value is not None}
    if keys & {"messages", "conversations"}:
        return "chat"
    if {"prompt", "completion"} <= keys:
        return "prompt"
    if "instruction" in keys and keys & {"output", "response"}:
        return "instruction"
    return "text" if "text" in keys else None


def _parse_chat(row: Row, origin: str) -> Chat:
    key = "messages" if row.get("messages") is not None else "conversations"
    turns = _unquoted(row.get(key), key)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _chat([*system, *turns] if isinstance(turns, list) else turns, row, origin)


def _parse_prompt(row: Row, origin: str) -> Chat | Completion:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion], row, origin, num_context=len(prompt))
    return Completion(prompt=_string(row, "prompt"), completion=_string(row, "completion"), origin=origin)


def _parse_instruction(row: Row, origin: str) -> Chat:
    user = _string(row, "instruction")
    if extra := row.get("input") or row.get("context"):
        user += "\n\n" + _string({"input": extra}, "input")
    answer = _string(row, "output" if row.get("output") is not None else "response")
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": _string(row, "system")})
    return Chat(messages=tuple(turns), origin=origin)


def _parse_text(row: Row, origin: str) -> Text:
    return Text(text=_string(row, "text"), origin=origin)


_PARSERS: dict[str, Callable[[Row, str], Example]] = {
    "chat": _parse_chat,
    "prompt": _parse_prompt,
    "instruction": _parse_instruction,
    "text": _parse_text,
}


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key} is {_kind(value)}, expected a string")
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _unquoted(value: Any, key: str) -> Any:
    """CSV has no lists, and some data sets keep ``tools`` as text: a string is read as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{key} is a string that is not JSON ({error})") from error


def _chat(turns: Any, row: Row, origin: str, *, num_context: int = 0) -> Chat:
    """``num_context``: so many turns at the beginning are not learnt."""
    if not isinstance(turns, list) or not turns:
        what = "empty" if turns == [] else _kind(turns)
        raise BadRow(f"messages is {what}, expected a list of role and content")
    tools = _unquoted(row.get("tools") or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of JSON schemas")
    messages = tuple(_message(turn, f"message {number}") for number, turn in enumerate(turns, 1))
    weights = [_weight(message, f"message {number}") for number, message in enumerate(messages, 1)]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    unsupervised = frozenset(index for index in answers if index < num_context or not weights[index])
    if not answers:
        raise BadRow("no assistant turn, so nothing to learn from")
    if len(unsupervised) == len(answers):
        why = "stands in the prompt" if num_context else "has weight 0"
        raise BadRow(f"every assistant turn {why}, so nothing to learn from")
    return Chat(messages=messages, tools=tuple(tools), unsupervised=unsupervised, origin=origin)


def _weight(message: Message, place: str) -> int:
    """Take OpenAI's ``weight`` off a message: 1 where the assistant's turn is learnt."""
    is_answer = message["role"] == "assistant"
    weight = message.pop("weight", int(is_answer))
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"{place} has weight {weight!r:.60}; expected 0 (not learnt) or 1 (learnt)")
    if weight and not is_answer:
        raise BadRow(f"{place} has weight 1, but only the assistant's turns are learnt; give it 0 or no weight")
    return int(weight)


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {_kind(turn)}, expected an object with role and content")
    if "from" in turn and "role" not in turn:
        turn = _from_sharegpt(turn) | {"weight": turn.get("weight")}
    if turn.get("role") not in ROLES:
        known = ", ".join(ROLES)
        raise BadRow(f"{place} has the unknown role {turn.get('role')!r}; expected one of {known}")
    message = {key: value for key, value in turn.items() if value is not None}
    content = message["content"] = _content(turn.get("content"), place)
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise BadRow(f"{place} has tool_calls that are {_kind(calls)}, expected a list")
    if calls:
        message["tool_calls"] = [_tool_call(call, place) for call in calls]
    elif content is None:
        raise BadRow(f"{place} has null content, which only a turn with tool_calls may have")
    return message


def _content(content: Any, place: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{place} has content of type {_kind(content)}, expected a string, text parts or null")
    for part in content:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow(f"{place} has a content part of type {kind}; only text parts can be trained on")
    return "".join(part["text"] for part in content)  # templates of text models take strings, not parts


def _tool_call(call: Any, place: str) -> Message:
    """OpenAI's shape with ``arguments`` as a dict: templates dump it, and would quote a string twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        raise BadRow(f"{place} has a tool call without function name")
    arguments = _unquoted(function.get("arguments") or {}, f"{place}: arguments of {name}")
    if not isinstance(arguments, dict):
        raise BadRow(f"{place}: arguments of {name} are {_kind(arguments)}, expected an object")
    outer = call if "function" in call else {"type": "function"}
    return {**outer, "function": {**function, "arguments": arguments}}


def _from_sharegpt(turn: Message) -> Message:
    """from/value → role/content. A function_call that is not JSON stays the text the assistant said."""
    said, value = turn["from"], turn.get("value")
    if said != "function_call":
        return {"role": SHAREGPT_ROLES.get(str(said), said), "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(call, "") for call in calls]}
    except ValueError:
        return {"role": "assistant", "content": value}
