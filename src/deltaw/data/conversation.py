"""A conversation as text, and where in it the assistant speaks.

Where the assistant's turns lie is found by rendering prefixes of the conversation. A template that rewrites
earlier turns (Qwen3 drops their <think> parts) has no such prefixes; then its ``{% generation %}`` marks are
used, and without marks each turn is searched for behind its opening. If that fails, it is an error.

Left out: tokens (see ``render``).
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UserError
from .formats import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Span: TypeAlias = tuple[int, int]  # characters of a rendered text, end exclusive


def end_of_text(tokenizer: Tokenizer) -> str:
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    return str(tokenizer.eos_token)


def chat_text(chat: Chat, tokenizer: Tokenizer, num_messages: int, *, is_prompt: bool = False) -> str:
    """The first messages as text; a prompt ends where the assistant is to begin."""
    messages = [_with_content(message, chat.origin) for message in chat.messages[:num_messages]]
    if tokenizer.chat_template is None:
        return _plain_text(messages, end_of_text(tokenizer), is_prompt)
    options: dict[str, Any] = {"tools": list(chat.tools) or None, "add_generation_prompt": is_prompt}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is the model maker's program: it may raise anything
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise UserError(
            f"{chat.origin}: the model's chat template refuses this conversation ({what}); change the line"
        ) from error


def _with_content(message: Message, origin: str) -> Message:
    """None becomes "" beside tool_calls, where it means "no text" and many templates fail; nowhere else."""
    if message.get("content") is not None:
        return message
    if not message.get("tool_calls"):
        raise UserError(f"{origin}: a turn has null content and no tool_calls; give it content")
    return {**message, "content": ""}


def _plain_text(messages: list[Message], eos: str, is_prompt: bool) -> str:
    closings = {"assistant": eos}
    turns = [f"### {m['role'].title()}:\n{m['content']}{closings.get(m['role'], '')}" for m in messages]
    return "\n\n".join([*turns, "### Assistant:\n"] if is_prompt else turns)


def check_tools(chat: Chat, tokenizer: Tokenizer) -> None:
    """Refuse templates that ignore tools or calls (SmolLM2's): a unique name given to each must show up."""
    if not chat.tools and not any(message.get("tool_calls") for message in chat.messages):
        return
    tools, messages = json.loads(json.dumps([chat.tools, chat.messages], default=str))  # nothing shared
    functions = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    functions += [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    if strange := [function for function in functions if not isinstance(function, dict)]:
        raise UserError(f"{chat.origin}: a tool must be an object with a name, found {strange[0]!r:.60}; mend the line")
    names = [str(function.get("name")) for function in functions]
    for number, function in enumerate(functions):
        function["name"] = f"deltaw_probe_{number}_"
    probe = Chat(messages=tuple(messages), tools=tuple(tools), origin=chat.origin)
    text = chat_text(probe, tokenizer, len(messages))
    if ignored := [name for number, name in enumerate(names) if f"deltaw_probe_{number}_" not in text]:
        raise UserError(
            f"{chat.origin}: the model's chat template does not render tool calls ({', '.join(ignored)} "
            "would be lost); use a model whose template does, or write the calls into the content"
        )


def turn_spans(chat: Chat, tokenizer: Tokenizer, text: str) -> list[Span]:
    """Where in ``text``, the rendered conversation, the assistant's turns lie that are to be learnt."""
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    ends = _end_tokens(tokenizer, text)
    spans = _prefix_spans(chat, tokenizer, text)
    if spans is None:
        spans = _generation_spans(chat, tokenizer)
        if not spans or (chat.unsupervised and len(spans) != len(turns)):  # a template may mark a turn in parts
            spans = _searched_spans(chat, tokenizer, text, ends)
    settled = [_settle(text, span, ends) for span in spans]
    if not chat.unsupervised:
        return settled
    return [span for turn, span in zip(turns, settled, strict=True) if turn not in chat.unsupervised]


def _prefix_spans(chat: Chat, tokenizer: Tokenizer, text: str) -> list[Span] | None:
    """A turn is what its message adds to the prompt before it; None if the template rewrites earlier ones."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        try:
            before = chat_text(chat, tokenizer, index, is_prompt=True)
            after = chat_text(chat, tokenizer, index + 1)
        except UserError:  # the whole conversation renders, but some templates refuse an empty or open beginning
            return None
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _generation_spans(chat: Chat, tokenizer: Tokenizer) -> list[Span]:
    """What the template itself marks with ``{% generation %}``; empty without such marks."""
    tools: Any = list(chat.tools) or None
    template = tokenizer.get_chat_template(tools=tools)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return []
    encoding: Any = tokenizer.apply_chat_template(
        [_with_content(message, chat.origin) for message in chat.messages],
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    marks = zip(encoding["assistant_masks"], encoding["offset_mapping"], strict=True)
    runs = [(mark, [offset for _, offset in run]) for mark, run in groupby(marks, key=lambda pair: pair[0])]
    return [(offsets[0][0], offsets[-1][1]) for mark, offsets in runs if mark]


def _searched_spans(chat: Chat, tokenizer: Tokenizer, text: str, ends: list[str]) -> list[Span]:
    """Find each turn's content, in order, behind the opening that the template gives the assistant."""
    prompted = chat_text(chat, tokenizer, len(chat.messages), is_prompt=True)
    opening = prompted.removeprefix(text) if prompted.startswith(text) else ""
    spans: list[Span] = []
    cursor = 0
    for message in chat.messages:
        if message["role"] != "assistant":
            continue
        start = text.find(opening, cursor) + len(opening)
        span = _search(text, start, message, ends) if opening and start >= len(opening) else None
        if span is None:
            raise UserError(
                f"{chat.origin}: assistant turn {len(spans) + 1} is not to be found in what the chat "
                "template renders; use --loss-on all, or a template with {% generation %} marks"
            )
        spans.append(span)
        cursor = span[1]
    return spans


def _search(text: str, start: int, message: Message, ends: list[str]) -> Span | None:
    """The turn that begins at ``start``: its content, or what is left of it, before any end of turn."""
    content = message.get("content") or ""
    for wanted in (content, content.strip(), content.rpartition("</think>")[2].strip()):
        found = text.find(wanted, start)
        if found < 0 or any(end in text[start:found] for end in ends):
            continue
        stop = found + len(wanted)
        if not message.get("tool_calls"):
            return found, stop
        stops = [at for end in ends if (at := text.find(end, stop)) >= 0]
        return (found, min(stops)) if stops else None  # how calls look is the template's affair
    return None


def _end_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """EOS, and the special token that closes the text: templates may end turns with another one than EOS."""
    text = text.rstrip()
    closing = {token for token in _special_tokens(tokenizer) if text.endswith(token)}
    return sorted(closing | ({str(tokenizer.eos_token)} if tokenizer.eos_token else set()))


@lru_cache(maxsize=1)  # some vocabularies have thousands, and every example asks
def _special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _settle(text: str, span: Span, ends: list[str]) -> Span:
    """Take in an end-of-turn token that follows directly; leave out white space behind one."""
    start, stop = span
    for end in ends:
        trimmed = text[start:stop].rstrip()
        if trimmed.endswith(end):
            return start, start + len(trimmed)
        if text.startswith(end, stop):
            return start, stop + len(end)
    return span
