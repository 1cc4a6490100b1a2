"""Reading data: every format, and every way a file can be wrong, named by its line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deltaw.data.formats import Chat, Completion, Text, load_examples, sha256_of
from deltaw.data.records import split_of
from deltaw.errors import UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
CHAT = {"messages": [USER, ANSWER]}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def write(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    """Rows that are strings or bytes are written as they are, one a line."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def fails(source: Any, *parts: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_examples(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- formats ---


def test_chat(tmp_path: Path) -> None:
    path = write(tmp_path, {**CHAT, "id": 3, "tools": [{"name": "f"}]}, CHAT, CHAT)
    first, second, third = load_examples(path)
    assert first == Chat(messages=(USER, ANSWER), tools=({"name": "f"},), origin=f"{path}:1")
    assert second.origin == f"{path}:2"
    assert third == Chat(messages=(USER, ANSWER), origin=f"{path}:3")  # duplicates are fine


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "t"},
        {"from": "function_response", "value": "t"},
        {"from": "function_call", "value": "no JSON"},
        {"from": "gpt", "value": "a"},
    ]
    (chat,) = load_examples([{"conversations": turns}])
    assert isinstance(chat, Chat)
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "assistant"]
    assert chat.messages[2] == {"role": "assistant", "content": None, "tool_calls": [call("f", {"x": 1})]}
    assert chat.messages[5]["content"] == "no JSON"


def test_system_key_beside_conversations() -> None:
    (chat,) = load_examples([{"system": "s", "conversations": [{"from": "gpt", "value": "a"}]}])
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "s"}


def test_prompt() -> None:
    strings, lists = {"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ANSWER]}
    assert load_examples([strings, lists]) == [
        Completion(prompt="a", completion="b", origin="list:item 1"),
        Chat(messages=(USER, ANSWER), origin="list:item 2"),
    ]


def test_answers_in_the_prompt_are_context() -> None:
    (example,) = load_examples([{"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}])
    assert example == Chat(messages=(USER, ANSWER, USER, ANSWER), unsupervised=frozenset({1}), origin="list:item 1")


def test_weights() -> None:
    turns = [{**USER, "weight": 0}, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.0}, USER, ANSWER]
    (example,) = load_examples([{"messages": turns}])
    assert example == Chat(messages=(USER, ANSWER) * 3, unsupervised=frozenset({1}), origin="list:item 1")
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 0}]
    (chat,) = load_examples([{"conversations": [*shared, *shared[:1], {"from": "gpt", "value": "yo"}]}])
    assert isinstance(chat, Chat) and chat.unsupervised == {1} and chat.messages[1] == ANSWER


@pytest.mark.parametrize("output", ["output", "response"])
def test_instruction(output: str) -> None:
    rows = [{"instruction": "do", output: "done", "input": text} for text in ("this", "", None)]
    chats = load_examples([*rows, {"instruction": "do", output: "done", "system": "s", "context": "c"}])
    contents = [[m["content"] for m in chat.messages] for chat in chats if isinstance(chat, Chat)]
    assert contents == [["do\n\nthis", "done"], ["do", "done"], ["do", "done"], ["s", "do\n\nc", "done"]]


def test_text_and_named_format() -> None:
    row = {"text": "t", "instruction": "i", "output": "o"}
    assert isinstance(load_examples([row])[0], Chat)
    assert load_examples([row], data_format="text") == [Text(text="t", origin="list:item 1")]
    fails([row], "item 1", "prompt is missing, expected a string", data_format="prompt")
    fails([row], "--data-format 'alpaca' is unknown", "auto, chat, prompt", data_format="alpaca")


def test_tool_arguments_are_not_merged(tmp_path: Path) -> None:
    calls = [call("f", {"x": 1}), call("g", {"y": "2024-01-01"}), call("h", '{"z": null}')]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [c]}]} for c in calls]
    chats = load_examples(write(tmp_path, *rows))
    found = [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in chats if isinstance(c, Chat)]
    assert found == [{"x": 1}, {"y": "2024-01-01"}, {"z": None}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (chat,) = load_examples([{"messages": [USER, {"role": "assistant", "content": parts}]}])
    assert isinstance(chat, Chat) and chat.messages[1]["content"] == "ab"


# --- rows that are wrong ---


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"foo": 1, "bar": 2}, "expected one of keys messages | prompt+completion"),
        ({"foo": 1, "bar": 2}, "found keys foo, bar"),
        ({}, "found keys (none)"),
        ([1], "expected an object"),
        ({"messages": None}, "found keys messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": {"role": "user"}}, "messages is dict"),
        ({"messages": "nonsense"}, "messages is a string that is not JSON"),
        ({"messages": ["hi"]}, "message 1 is str"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'; expected one of system"),
        ({"messages": [{"from": ["x"], "value": "x"}]}, "unknown role ['x']"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2 has content of type int"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has null content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "part of type image"),
        ({"messages": [{**ANSWER, "tool_calls": "f"}]}, "tool_calls that are str"),
        ({"messages": [{**ANSWER, "tool_calls": [{"id": 1}]}]}, "without function name"),
        (
            {"messages": [{**ANSWER, "tool_calls": [call("f", "{")]}]},
            "arguments of f is a string that is not",
        ),
        ({"messages": [{**ANSWER, "tool_calls": [call("f", [1])]}]}, "arguments of f are list"),
        ({**CHAT, "tools": ["f"]}, "tools is not a list"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2 has weight 0.5; expected 0 (not learnt) or 1"),
        ({"messages": [USER, {**ANSWER, "weight": "1"}]}, "message 2 has weight '1'; expected 0"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "message 2 has weight True; expected 0"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "message 1 has weight 1, but only the assistant's turns"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant turn has weight 0"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "every assistant turn stands in the prompt"),
        ({"text": 3}, "text is int, expected a string"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion is list"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    path = write(tmp_path, CHAT, "", row)
    fails(path, f"1 bad line in {path}; first: line 3: ", problem, "fix or name the format with --data-format")


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": 1}, CHAT, '{"text": ', {"messages": []}, {"b": 1})
    fails(path, "4 bad lines", "line 1: ", "line 3: malformed JSON at column 9", "line 4: messages is empty")


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, {"text": "b"}, CHAT, {"text": "c"})
    fails(path, "mixes formats: line 3 has messages but line 1 has text", "split it")


# --- files that are wrong ---


def test_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a\xc3\xa9"}\r', "", "  ", '{"text": "b"}\r', "")
    assert load_examples(path) == [
        Text(text="aé", origin=f"{path}:1"),
        Text(text="b", origin=f"{path}:4"),
    ]


def test_invalid_utf8(tmp_path: Path) -> None:
    row = b'{"text": "\xff"}'
    fails(write(tmp_path, '{"text": "a"}', row), "line 2: invalid UTF-8 at byte 11", "save the file as UTF-8")
    fails(write(tmp_path, "text", b"\xff", name="x.csv"), "line 2: invalid UTF-8", "save the file as UTF-8")


def test_ten_megabyte_line(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    for path in (write(tmp_path, {"text": text}), write(tmp_path, "text", text, name="x.csv")):
        (example,) = load_examples(path)
        assert isinstance(example, Text) and example.text == text


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}", '{"a": {"b": ' * 50_000])
def test_json_bombs(tmp_path: Path, line: str) -> None:
    fails(write(tmp_path, {"text": "a"}, line), "line 2: unreadable JSON")


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert load_examples(path)[1] == Text(text="b", origin=f"{path}:row 2")
    path.write_text('[\n{"text": "a"},\n{"text": oops}]')
    fails(path, "line 3: malformed JSON at column 10")
    path.write_text('[{"text": "a"}, {"txt": "a"}]')
    fails(path, "1 bad row", "row 2: expected one of keys")


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", ""), ("x.jsonl", "\n\n"), ("x.json", ""), ("x.csv", ""), ("x.csv", "text\n")],
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    fails(path, "is empty; expected at least one example")


def test_empty_list_and_array(tmp_path: Path) -> None:
    fails([], "list is empty")
    fails(write(tmp_path, "[]"), "is empty")


def test_not_a_file(tmp_path: Path) -> None:
    fails(tmp_path, "is a directory; name one file in it")
    fails(tmp_path / "no.jsonl", "no such file", "hub data set as owner/name")
    fails("no.jsonl", "no such file")
    fails(write(tmp_path, CHAT, name="x.txt"), "unknown extension '.txt'", ".jsonl, .json, .csv, .parquet")
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "is not a regular file")


# --- CSV, Parquet, hub ---


def test_csv_is_read_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "instruction,input,output", '"0012\nNA",,NA', '"a, ""b""",2024-01-01,', name="x.csv")
    first, second = load_examples(path)
    assert isinstance(first, Chat) and isinstance(second, Chat)
    assert [m["content"] for m in first.messages] == ["0012\nNA", "NA"]
    assert [m["content"] for m in second.messages] == ['a, "b"\n\n2024-01-01', ""]
    assert second.origin == f"{path}:row 2"


def test_csv_messages_as_json(tmp_path: Path) -> None:
    cell = json.dumps([USER, ANSWER]).replace('"', '""')
    path = write(tmp_path, "id,messages,tools", f'1,"{cell}",', name="x.csv")
    assert load_examples(path) == [Chat(messages=(USER, ANSWER), origin=f"{path}:row 1")]


def test_csv_errors(tmp_path: Path) -> None:
    fails(write(tmp_path, "id,text", "1,a", "2", "3,b,c", name="x.csv"), "2 bad rows", "row 2: 1 cells under")
    fails(write(tmp_path, "text,text", "1,a", name="x.csv"), "header names a column twice")
    fails(write(tmp_path, "text", '"a"b', name="x.csv"), "row 1: malformed CSV at line 2")


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [call("f", {"x": 1}), call("g", {"y": "s"})]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [c]}]} for c in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = load_examples(tmp_path / "x.parquet")
    assert isinstance(first, Chat) and isinstance(second, Chat)
    assert first.messages[0] == USER
    assert first.messages[1]["tool_calls"] == [calls[0]]
    assert second.messages[1]["tool_calls"] == [calls[1]]
    assert second.origin.endswith("x.parquet:row 2")
    (tmp_path / "bad.parquet").write_bytes(b"junk")
    fails(tmp_path / "bad.parquet", "no readable Parquet file", "check the file")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(repository: str, name: str | None = None, split: str = "") -> list[dict[str, Any]]:
        if repository == "some/missing":
            raise ConnectionError("cannot reach the hub\nat all")
        return [{"text": f"{repository} {name} {split}", "messages": None}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("some/data") == [Text(text="some/data None train", origin="some/data:row 1")]
    (example,) = load_examples("some/data-v1.5:main", split="test")
    assert isinstance(example, Text) and example.text == "some/data-v1.5 main test"
    assert sha256_of("some/data") != sha256_of("some/data:main")
    fails("some/missing", "some/missing: no readable file or hub data set, split train (cannot reach the hub at all)")
    fails("some/missing", "the split (--data-split or --eval-split)", split="x")


def test_only_hub_data_sets_have_splits(tmp_path: Path) -> None:
    path = write(tmp_path, CHAT)
    assert split_of(path, None, default="test", flag="--data-split") == "test"
    assert split_of("some/data:main", "train[:9]", default="test", flag="--data-split") == "train[:9]"
    with pytest.raises(UserError, match=r"--data-split dev: .*x.jsonl is a file.* leave --data-split out"):
        split_of(path, "dev", default="test", flag="--data-split")


def test_sha256(tmp_path: Path) -> None:
    path = write(tmp_path, CHAT)
    before = sha256_of(path)
    assert len(before) == 64 and before == sha256_of(str(path))
    path.write_bytes(path.read_bytes() + b"\n")
    assert sha256_of(path) != before
    assert sha256_of([{"a": 1, "b": 2}]) == sha256_of([{"b": 2, "a": 1}]) != sha256_of([{"a": 1, "b": 3}])
    with pytest.raises(UserError, match="no such file"):
        sha256_of("no.jsonl")
