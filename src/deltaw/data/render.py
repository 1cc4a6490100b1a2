"""From an example to token ids, and which of them are targets.

Job: render an example to one text, tokenise that text once, and mark the tokens the model is to predict.

- Chat: the tokenizer's own chat template. It writes BOS if the model wants one, so none is added. Targets are
  the assistant's turns up to and including the token that ends them, never the scaffolding behind it.
- Chat without a template (base models): "### System:", "### User:", "### Assistant:" and "### Tool:", each on
  a line above its text, an empty line between turns, EOS straight after every assistant text.
- Completion: prompt + completion + EOS; completion and EOS are targets.
- Text: text + EOS, all targets. Completion and Text get BOS if the tokenizer adds one, and never twice.

A token that straddles the border of a target text is a target: it carries the answer's first characters,
which nothing else would teach. At inference the prompt is tokenised alone and such a token cannot come up, so
a prompt should not end in a space, nor an answer begin with a line break.

Where the assistant's turns lie is found by rendering prefixes of the conversation. A template that rewrites
earlier turns (Qwen3 drops their <think> parts) has no such prefixes; then its ``{% generation %}`` marks are
used, and without marks each turn is searched for behind its opening. If that fails, it is an error.

Left out: packing and padding (see ``pack``), truncation other than keeping the beginning, images, special
tokens written out in a user's text (the tokenizer takes them for real).
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from deltaw.data.formats import Chat, Completion, Example, Message, Text
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LossOn: TypeAlias = Literal["assistant", "all"]
Span: TypeAlias = tuple[int, int]  # characters of a rendered text, end exclusive


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One example as the model sees it; ``supervised[i]`` says that token i is a target to be predicted."""

    input_ids: list[int]
    supervised: list[bool]
    origin: str
    num_truncated: int = 0
    """Tokens cut off the end to keep to the maximum length."""

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.supervised)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A rendered data set, and what became of it."""

    examples: list[Tokens]
    """Those with at least one target, in order."""
    num_examples: int
    """All that were given."""
    num_truncated: int
    truncated_tokens: int
    num_unsupervised_after_truncation: int
    """Left out of ``examples``: nothing in them is a target, mostly because truncation cut the answer off."""
    first_unsupervised: str | None
    """Origin of the first of those."""


def render_all(
    examples: Sequence[Example],
    tokenizer: "Tokenizer",
    *,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """Render every example; ``progress(done, total)`` is called after each.

    Raises UserError if no example has a target left.
    """
    kept: list[Tokens] = []
    unsupervised: list[Tokens] = []
    for done, example in enumerate(examples, 1):
        tokens = render(example, tokenizer, loss_on=loss_on, max_length=max_length)
        (kept if any(tokens.supervised) else unsupervised).append(tokens)
        if progress is not None:
            progress(done, len(examples))
    if not kept:
        first = unsupervised[0].origin if unsupervised else "an empty list"
        raise UserError(
            f"nothing to learn: none of {len(examples)} examples has a supervised token within max length "
            f"{max_length}, the first is {first}; raise --max-length or use --loss-on all"
        )
    everything = [*kept, *unsupervised]
    return Rendered(
        examples=kept,
        num_examples=len(examples),
        num_truncated=sum(tokens.num_truncated > 0 for tokens in everything),
        truncated_tokens=sum(tokens.num_truncated for tokens in everything),
        num_unsupervised_after_truncation=len(unsupervised),
        first_unsupervised=unsupervised[0].origin if unsupervised else None,
    )


def render(
    example: Example,
    tokenizer: "Tokenizer",
    *,
    loss_on: LossOn = "assistant",
    max_length: int | None = None,
) -> Tokens:
    """The tokens of one example. "all" makes every token a target but the first, which nothing predicts."""
    if loss_on not in ("assistant", "all"):
        raise UserError(f"--loss-on {loss_on!r} is unknown; expected assistant or all")
    if max_length is not None and max_length < 2:
        raise UserError(f"--max-length {max_length} leaves nothing to predict; expected at least 2")
    text, spans = _layout(example, tokenizer, loss_on)
    ids, offsets = _tokenise(text, tokenizer, example.origin, is_templated=_is_templated(example, tokenizer))
    supervised = [True] * len(ids) if loss_on == "all" else _overlaps(offsets, spans)
    supervised[:1] = [False] * len(ids[:1])
    kept = len(ids) if max_length is None else max_length
    return Tokens(
        input_ids=ids[:kept],
        supervised=supervised[:kept],
        origin=example.origin,
        num_truncated=max(0, len(ids) - kept),
    )


def prompt_ids(example: Example, tokenizer: "Tokenizer") -> tuple[list[int], str]:
    """For evaluation by generation: the ids up to the last answer, and the text wanted there."""
    match example:
        case Text():
            raise UserError(f"{example.origin}: a text has no prompt to generate from; use a chat or prompt format")
        case Completion():
            text, wanted = example.prompt, example.completion
        case Chat():
            last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
            text = _chat_text(example, tokenizer, last, is_prompt=True)
            wanted = example.messages[last].get("content") or ""
    ids, _ = _tokenise(text, tokenizer, example.origin, is_templated=_is_templated(example, tokenizer))
    if not ids:
        raise UserError(f"{example.origin}: the prompt is empty and the tokenizer has no BOS to start from")
    return ids, wanted


def preview(tokens: Tokens, tokenizer: "Tokenizer") -> list[tuple[str, bool]]:
    """Runs of (text, supervised), for a person to check what will be learnt."""
    runs: list[tuple[list[int], bool]] = []
    for token, is_target in zip(tokens.input_ids, tokens.supervised, strict=True):
        if not runs or runs[-1][1] != is_target:
            runs.append(([], is_target))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), flag) for ids, flag in runs]


# --- text: an example becomes one string ---


def _layout(example: Example, tokenizer: "Tokenizer", loss_on: LossOn) -> tuple[str, list[Span]]:
    """The full text, and the spans of it that are targets (unused where everything is)."""
    match example:
        case Text():
            text = example.text + _eos(tokenizer)
            return text, [(0, len(text))]
        case Completion():
            text = example.prompt + example.completion + _eos(tokenizer)
            return text, [(len(example.prompt), len(text))]
        case Chat():
            text = _chat_text(example, tokenizer, len(example.messages))
            _check_tools(example, tokenizer)
            return text, [] if loss_on == "all" else _turn_spans(example, tokenizer, text)


def _is_templated(example: Example, tokenizer: "Tokenizer") -> bool:
    return isinstance(example, Chat) and tokenizer.chat_template is not None


def _eos(tokenizer: "Tokenizer") -> str:
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    return str(tokenizer.eos_token)


def _chat_text(chat: Chat, tokenizer: "Tokenizer", num_messages: int, *, is_prompt: bool = False) -> str:
    """The first messages as text; a prompt ends where the assistant is to begin."""
    messages = [_with_content(message, chat.origin) for message in chat.messages[:num_messages]]
    if tokenizer.chat_template is None:
        return _plain_text(messages, _eos(tokenizer), is_prompt)
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


def _check_tools(chat: Chat, tokenizer: "Tokenizer") -> None:
    """Refuse templates that ignore tools or calls (SmolLM2's): a unique name given to each must show up."""
    if not chat.tools and not any(message.get("tool_calls") for message in chat.messages):
        return
    tools, messages = json.loads(json.dumps([chat.tools, chat.messages], default=str))  # nothing shared
    functions = [tool.get("function", tool) for tool in tools]
    functions += [call["function"] for message in messages for call in message.get("tool_calls", ())]
    names = [str(function.get("name")) for function in functions]
    for number, function in enumerate(functions):
        function["name"] = f"deltaw_probe_{number}_"
    probe = Chat(messages=tuple(messages), tools=tuple(tools), origin=chat.origin)
    text = _chat_text(probe, tokenizer, len(messages))
    if ignored := [name for number, name in enumerate(names) if f"deltaw_probe_{number}_" not in text]:
        raise UserError(
            f"{chat.origin}: the model's chat template does not render tool calls ({', '.join(ignored)} "
            "would be lost); use a model whose template does, or write the calls into the content"
        )


# --- spans: where the assistant speaks in that string ---


def _turn_spans(chat: Chat, tokenizer: "Tokenizer", text: str) -> list[Span]:
    ends = _end_tokens(tokenizer, text)
    spans = _prefix_spans(chat, tokenizer, text)
    if spans is None:
        spans = _generation_spans(chat, tokenizer) or _searched_spans(chat, tokenizer, text, ends)
    return [_settle(text, span, ends) for span in spans]


def _prefix_spans(chat: Chat, tokenizer: "Tokenizer", text: str) -> list[Span] | None:
    """A turn is what its message adds to the prompt before it; None if the template rewrites earlier ones."""
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        try:
            before = _chat_text(chat, tokenizer, index, is_prompt=True)
            after = _chat_text(chat, tokenizer, index + 1)
        except UserError:  # the whole conversation renders, but some templates refuse an empty or open beginning
            return None
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _generation_spans(chat: Chat, tokenizer: "Tokenizer") -> list[Span]:
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


def _searched_spans(chat: Chat, tokenizer: "Tokenizer", text: str, ends: list[str]) -> list[Span]:
    """Find each turn's content, in order, behind the opening that the template gives the assistant."""
    prompted = _chat_text(chat, tokenizer, len(chat.messages), is_prompt=True)
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


def _end_tokens(tokenizer: "Tokenizer", text: str) -> list[str]:
    """EOS, and the special token that closes the text: templates may end turns with another one than EOS."""
    text = text.rstrip()
    closing = {token for token in _special_tokens(tokenizer) if text.endswith(token)}
    return sorted(closing | ({str(tokenizer.eos_token)} if tokenizer.eos_token else set()))


@lru_cache(maxsize=1)  # some vocabularies have thousands, and every example asks
def _special_tokens(tokenizer: "Tokenizer") -> frozenset[str]:
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


# --- tokens: the string becomes ids ---


def _tokenise(text: str, tokenizer: "Tokenizer", origin: str, *, is_templated: bool) -> tuple[list[int], list[Span]]:
    """Ids and character offsets. The tokenizer's BOS is kept unless the text has it; its EOS is dropped."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer")
    has_bos = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    try:
        encoding: Any = tokenizer(
            text,
            add_special_tokens=not (is_templated or has_bos),
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,  # "longer than the model's maximum" is answered by max_length, and counted
        )
    except TypeError as error:
        raise UserError(f"{origin}: holds half a surrogate pair, which is no text; repair the \\u escape") from error
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    while ids and offsets[-1] == (0, 0) and ids[-1] != tokenizer.bos_token_id:  # EOS or SEP: the text has its own
        ids.pop()
        offsets.pop()
    return ids, offsets


def _overlaps(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token shares a character with a span; both lists are in order."""
    flags = []
    remaining = iter([*spans, (sys.maxsize, sys.maxsize)])
    start, stop = next(remaining)
    for begin, end in offsets:
        # Byte-level tokenizers may trim spaces off a token; one of spaces alone is then empty, at its end.
        first = min(begin, end - 1)
        while stop <= first:
            start, stop = next(remaining)
        flags.append(first < stop and end > start)
    return flags
