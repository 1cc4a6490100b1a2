"""A chat template becomes Ollama's, or it says why not; never a wrong one."""

from __future__ import annotations

import re

import pytest

from deltaw.adapters.gguf_format.modelfile import NoTemplate, modelfile, turns_of

from .conftest import CHATML, Tokenizers

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim +"
    " '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
"""As reasoning models' do: what was thought in earlier turns is left out."""
FIRST_DIFFERS = "{% for m in messages %}{% if loop.first %}[BEGIN]{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, LLAMA3, GEMMA])
def test_ollamas_template_writes_what_the_tokenizer_does(template: str, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("sentencepiece" if template == GEMMA else "gpt-2", template=template)
    go = turns_of(tokenizer)
    talk = [("user", "Hi!"), ("assistant", "Hello."), ("user", "Why?")]
    talks = [talk, talk[:1], *([[("system", "Be brief."), *talk]] if go.system else [])]
    for messages in talks:
        given = [{"role": role, "content": content} for role, content in messages]
        expected = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        default = [("system", go.default_system)] if go.default_system and messages[0][0] != "system" else []
        start = str(tokenizer.bos_token) if template == GEMMA else ""  # Ollama's tokenizer puts it there
        assert start + run_go(go.go_template(), [*default, *messages]) == expected


def run_go(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template does with the few actions that such a template has."""
    whole = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S)
    assert whole is not None
    body, tail = whole.groups()
    parts = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    assert parts[0] == ""
    branches = dict(zip(parts[1::2], parts[2::2], strict=True))
    return "".join(branches.get(role, "").replace("{{ .Content }}", content) for role, content in messages) + tail


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        (THINKING, "more than"),
        (FIRST_DIFFERS, "first turn|begins with more"),
        ("{{ strftime_now('%Y') }}" + CHATML, "today's date"),
        (CHATML.replace("m.content", "m.content | upper"), "changes the text"),
        (CHATML.replace("<|im_end|>", '"""'), "quotes or braces"),
        ("{{ raise_exception('no!') }}", "refuses an ordinary conversation"),
    ],
)
def test_a_template_that_is_more_is_left_out_with_a_comment(
    template: str | None, why: str, tokenizers: Tokenizers
) -> None:
    tokenizer = tokenizers(template=template)
    with pytest.raises(NoTemplate, match=why):
        turns_of(tokenizer)
    text = modelfile(tokenizer, base="./m.gguf", adapter=None)
    assert "# No TEMPLATE: " in text
    assert 'TEMPLATE "' not in text


def test_a_modelfile_names_files_template_and_stops(tokenizers: Tokenizers) -> None:
    text = modelfile(tokenizers(template=DEFAULT_SYSTEM), base="./base.gguf", adapter="./a.gguf", note="One note.")
    lines = text.splitlines()
    assert lines[:3] == ["# One note.", "FROM ./base.gguf", "ADAPTER ./a.gguf"]
    assert 'SYSTEM """You are kind."""' in lines
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
