"""`deltaw adapter publish`, `rollback`, `tag`, `list`, `rm`, `gc`, and names wherever an adapter is asked for."""

import os
import re
import subprocess
import sys
import time

import pytest

from deltaw.adapters.store import Store, shown
from deltaw.cli.adapter import SUBVERBS

MINE = ("publish", "rollback", "tag", "list", "rm", "gc")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_STORE", str(tmp_path / "store"))
    return Store(tmp_path / "store")


@pytest.fixture
def two(run, store, adapters):
    """Two versions of tickets, the second current; their hashes."""
    for place in ("first", "second"):
        assert run("adapter", "publish", adapters[place], "tickets")[0] == 0
    return store.line("tickets")


def test_help_names_every_subverb(run):
    for args in ([], ["--help"], ["help"]):
        code, out, err = run("adapter", *args)
        assert code == 0 and not err and all(f"\n  {subverb} " in out for subverb in SUBVERBS)
    code, out, err = run("adapter", "nope")
    assert code == 2 and not out and "no subverb 'nope'; expected one of inspect, compress" in err
    for subverb in MINE:
        code, out, err = run("adapter", subverb, "--help")
        assert code == 0 and not err and f"usage: deltaw adapter {subverb}" in out and "--store" in out


def test_publish_says_what_it_did_and_what_is_next(run, store, adapters, only_json):
    code, out, err = run("adapter", "publish", adapters["first"], "tickets", "--tag", "prod", "--tag", "canary")
    version = store.resolve("tickets")
    assert code == 0 and not err and version.tags == ("canary", "prod")
    assert out.startswith(f"tickets@{shown(version.sha256)} is the current version, tagged canary, prod (r 4, ")
    assert out.endswith("Next: deltaw chat --adapter tickets\n") and "Before it" not in out
    out = run("adapter", "publish", adapters["second"], "tickets")[1]
    assert f"Before it: {shown(version.sha256)}; back to that: deltaw adapter rollback tickets\n" in out
    found = only_json(run("adapter", "publish", "tickets@prod", "other", "--json")[1])
    assert (found["name"], found["sha256"], found["is_current"]) == ("other", version.sha256, True)


def test_list_and_rollback(run, store, two, only_json):
    first, second = two
    out = run("adapter", "list")[1]
    assert re.search(rf"tickets +{shown(second)} .* 4 .*kB .* 2", out)
    out = run("adapter", "list", "tickets")[1]
    assert re.search(rf"→ +{shown(second)}", out) and f"Back to {shown(first)}: deltaw adapter rollback tickets" in out
    code, out, _ = run("adapter", "rollback", "tickets")
    assert code == 0 and out == (
        f"tickets@{shown(first)} is the current version\n"
        f"Forward again: deltaw adapter rollback tickets --to {shown(second)}\n"
    )
    assert run("adapter", "rollback", "tickets", "--to", first)[1].endswith("is the current version already\n")
    found = only_json(run("adapter", "rollback", "tickets", "--to", second, "--json")[1])
    assert (found["sha256"], found["before"]) == (second, first)
    found = only_json(run("adapter", "list", "--check", "--json")[1])
    (entry,) = found["adapters"]
    assert entry["current"]["sha256"] == second and entry["problems"] == [] and entry["num_versions"] == 2
    found = only_json(run("adapter", "list", "tickets", "--json")[1])
    assert [v["sha256"] for v in found["versions"]] == [second, first] and found["line"] == [first, second]


def test_problems_are_listed_below(run, store, two):
    (store.path / "[red]x").mkdir()
    code, out, err = run("adapter", "list")
    assert code == 0 and "tickets" in out and "! '[red]x' is no name for an adapter" in err and "Traceback" not in err


def test_tag_rm_and_gc(run, store, two):
    first = two[0]
    assert run("adapter", "tag", f"tickets@{first[:8]}", "prod")[1] == f"tickets@prod is tickets@{shown(first)}\n"
    assert run("adapter", "gc", "--keep", 1)[1] == "nothing to remove\n"
    assert run("adapter", "tag", "tickets", "prod", "--delete")[1] == "tickets has no tag prod any more\n"
    out = run("adapter", "gc", "--keep", 1, "--dry-run")[1]
    assert f"tickets@{shown(first)}: not among the newest 1" in out and out.endswith("would be free\n")
    assert run("adapter", "rm", f"tickets@{first}")[1] == f"removed tickets@{first}\n"
    assert run("adapter", "rm", "tickets")[0] == 0
    assert run("adapter", "list")[1].startswith(f"{store.path} holds no adapters yet.\nNext: deltaw adapter publish")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["publish"], "ADAPTER and NAME must be given; see deltaw adapter publish --help"),
        (["publish", "x"], "NAME must be given"),
        (["publish", "nope", "x"], "nope: no such folder, and no adapter of that name in the store"),
        (["publish", "TMP", "x"], "is not an adapter: it has no adapter_config.json"),
        (["publish", "TMP", "../x"], "'../x' is no name for an adapter"),
        (["publish", "TMP", "x", "--tag", "current"], "'current' is no tag"),
        (["rollback", "nope"], "nope: no such adapter in"),
        (["rollback", "tickets", "--to", "nope"], "tickets@nope: no such version or tag"),
        (["rm", "tickets@current"], "tickets@current: a tag; name the version"),
        (["rm"], "NAME@VERSION must be given"),
        (["gc", "--keep", "0"], "--keep 0: expected at least 1"),
        (["tag", "tickets@current", "x", "--delete"], "give the name alone"),
        (["list", "nope"], "nope: no such adapter"),
        (["list", "--store", "FILE"], "not a folder"),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_a_mistake_is_one_line(run, two, tmp_path, args, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    code, out, err = run("adapter", *({"TMP": tmp_path / "here", "FILE": tmp_path / "file"}.get(a, a) for a in args))
    assert code == 2 and not out and err.count("\n") == 1 and message in err


def test_an_adapter_is_named_wherever_one_is_asked_for(run, store, two, data, only_json, adapters, monkeypatch):
    args = ["eval", "--data", data, "--dtype", "float32", "--max-length", 64, "--json"]

    def loss(*which):
        return only_json(run(*args, "--adapter", *which)[1])["loss"]

    by_path = loss(adapters["first"])
    assert loss(f"tickets@{two[0][:8]}") == by_path != loss("tickets")
    monkeypatch.delenv("DELTAW_STORE")
    assert loss(f"tickets@{two[0]}", "--store", store.path) == by_path
    compared = run("compare", "--data", data, "--adapter", "tickets", "--store", store.path, "--n", 1, "--json")
    assert compared[0] == 0 and only_json(compared[1])["examples"] == 1


def test_a_chat_calls_adapters_as_the_store_does(store, two):
    from deltaw.cli.chat import Conversation, Options

    conversation = Conversation(Options(adapter=("tickets",), dtype="float32"))
    assert conversation.active == "tickets"
    conversation.use(f"tickets@{two[0][:8]}")
    assert conversation.loaded == ["tickets", f"tickets@{two[0][:8]}"]


def test_looking_and_rolling_back_are_quick_and_import_no_torch(store, two, environment):
    script = (
        "import sys; from deltaw.cli import main; "
        "codes = [main(['adapter', 'list']), main(['adapter', 'rollback', 'tickets'])]; "
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment | os.environ)
    assert time.perf_counter() - started < 10


def test_training_publishes(run, store, data, tiny_base, tmp_path, only_json, monkeypatch):
    args = ["train", "--data", data, "--model", tiny_base, "--dtype", "float32", "--max-steps", 1, "--max-length", 64]
    code, out, _ = run(*args, "--out", tmp_path / "a", "--as", "tickets")
    assert code == 0 and f"published as tickets@{shown(store.line('tickets')[-1])} in {store.path}" in out
    (store.path / "tickets" / "current.json").write_text("{")
    code, out, err = run(*args, "--out", tmp_path / "b", "--as", "tickets")
    assert code == 2 and "rollback tickets --to VERSION" in err and not (tmp_path / "b").exists()  # before training

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "publish", fail)
    code, out, err = run(*args, "--out", tmp_path / "b", "--as", "other", "--json")
    assert code == 2 and "not published: " in err and "error" in only_json(out)["published"]
    assert (tmp_path / "b" / "adapter_model.safetensors").exists()
