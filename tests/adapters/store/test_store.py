"""Publish, resolve, roll back, tag, remove: what a name means, and what it costs to be wrong about one."""

import shutil
import time

import pytest

import deltaw
from deltaw.adapters.peft_format import read_adapter
from deltaw.adapters.store import Store, shown
from deltaw.errors import UserError


def test_publish_then_resolve(store, make):
    assert store.names() == [] == store.entries()
    folder = make()
    version = store.publish(folder, "tickets", tags=["prod"])
    assert (version.name, version.is_current, version.tags) == ("tickets", True, ("prod",))
    assert (version.about.r, version.about.num_modules, version.about.num_parameters) == (2, 2, 56)
    assert version.about.base_name == "org/base"
    assert store.names() == ["tickets"]
    for reference in ("tickets", "tickets@current", "tickets@prod", f"tickets@{version.sha256}", str(version)):
        assert store.resolve(reference) == version
    stored = read_adapter(version.path)
    assert stored.factors.keys() == read_adapter(folder).factors.keys()
    shutil.rmtree(folder)
    assert store.entries(check=True)[0].problems == ()
    assert deltaw.Store is Store


def test_the_same_adapter_twice_is_one_version(store, make, tree):
    first = store.publish(make("a"), "tickets")
    before = tree(store.path)
    assert store.publish(make("b"), "tickets") == first
    assert tree(store.path) == before and len(store.versions("tickets")) == 1


def test_the_same_adapter_with_a_card_renews_the_card(store, make):
    folder = make()
    path = store.publish(folder, "tickets").path
    generation = store.generation("tickets")
    (folder / "README.md").write_text("what it was trained on")
    assert store.publish(folder, "tickets").path == path
    assert (path / "README.md").read_text() == "what it was trained on"
    assert store.generation("tickets") == generation
    assert store.entries(check=True)[0].problems == ()


def test_rollback_goes_back_along_the_line(store, three):
    a, b, c = three
    assert [v.sha256 for v in store.versions("tickets")] == [c, b, a]
    assert store.rollback("tickets").sha256 == b
    assert store.rollback("tickets").sha256 == a
    with pytest.raises(UserError, match=rf"{shown(a)} is current, and none was before it; say which of {shown(b)}, "):
        store.rollback("tickets")
    assert store.rollback("tickets", c[:8]).sha256 == c  # forward
    assert store.rollback("tickets").sha256 == a  # what was before c this time
    assert [v.sha256 for v in store.versions("tickets")] == [c, b, a]


def test_after_a_rollback_and_a_publish_the_one_rolled_back_to_is_before(store, three, make):
    store.rollback("tickets", three[0])
    newest = store.publish(make("v3", 3), "tickets").sha256
    assert store.line("tickets") == [three[0], newest]
    assert store.rollback("tickets").sha256 == three[0]


def test_publishing_an_earlier_version_makes_it_current(store, three, make):
    assert store.publish(make("again", 0), "tickets").sha256 == three[0]
    assert store.rollback("tickets").sha256 == three[2]


def test_rollback_copies_nothing_and_is_instant(store, three, tree):
    before = tree(store.path)
    started = time.perf_counter()
    store.rollback("tickets")
    assert time.perf_counter() - started < 1
    after = tree(store.path)
    assert [name for name in before if before[name] != after.get(name)] == ["tickets/current.json"]


def test_tags(store, three):
    a, b, c = three
    assert store.tag(f"tickets@{a[:6]}", "prod").tags == ("prod",)
    assert store.resolve("tickets@prod").sha256 == a
    store.tag("tickets", "prod")  # the current one
    assert store.resolve("tickets@prod").sha256 == c and store.resolve(f"tickets@{a}").tags == ()
    store.tag("tickets@prod", "canary")
    assert store.resolve("tickets").tags == ("canary", "prod")
    store.untag("tickets", "prod")
    with pytest.raises(UserError, match="no such version or tag"):
        store.resolve("tickets@prod")
    with pytest.raises(UserError, match=r"has no tag 'prod' \(it has canary\)"):
        store.untag("tickets", "prod")
    assert b not in str(store.resolve("tickets"))


def test_remove(store, three):
    a, b, c = three
    store.tag(f"tickets@{a}", "prod")
    for reference, why in (
        (f"tickets@{c}", "is the current version; roll back first"),
        (f"tickets@{a}", "has the tag prod; take it away first"),
        ("tickets@prod", "a tag; name the version"),
        ("tickets@current", "a tag; name the version"),
        ("tickets@ffff", "no such version or tag"),
        ("nope", r"no such adapter in .* \(it has tickets\)"),
    ):
        with pytest.raises(UserError, match=why):
            store.remove(reference)
    store.remove(f"tickets@{b[:10]}")
    assert [v.sha256 for v in store.versions("tickets")] == [c, a]
    assert not (store.path / "tickets" / b).exists() and not list((store.path / ".work").iterdir())
    assert store.rollback("tickets").sha256 == a
    store.remove("tickets")
    assert store.names() == [] and not (store.path / "tickets").exists()


def test_removing_what_is_between_leaves_no_step_to_itself(store, three, make):
    store.publish(make("again", 0), "tickets")  # a b c a
    store.remove(f"tickets@{three[1]}")
    store.remove(f"tickets@{three[2]}")
    assert store.line("tickets") == [three[0]]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        ".hidden",
        "-x",
        "a@b",
        "a:b",
        "__base__",
        "a b",
        "a\n",
        "é",
        "x" * 65,
    ],
)
def test_names_that_are_none(store, make, name):
    with pytest.raises(UserError, match="is no name for an adapter"):
        store.publish(make(), name)
    assert not store.path.exists()


@pytest.mark.parametrize("tag", ["", "a/b", "current", "deadbeef", "a@b", "../x", "x" * 65])
def test_tags_that_are_none(store, make, tag):
    with pytest.raises(UserError, match="tag"):
        store.publish(make(), "tickets", tags=[tag])
    assert not store.path.exists()


def test_one_tag_may_be_given_as_a_text(store, make):
    assert store.publish(make(), "tickets", tags="prod").tags == ("prod",)


def test_names_that_differ_in_case_alone_are_one(store, three, make):
    with pytest.raises(UserError, match="the store has tickets, and names that differ in case alone are one"):
        store.publish(make(), "Tickets")


def test_mistakes_name_what_there_is(store, make):
    with pytest.raises(UserError, match="no store there"):
        store.resolve("x")
    store.publish(make(), "tickets")
    for reference in ("tickts", "x"):
        with pytest.raises(UserError, match=rf"{reference}: no such adapter in .* \(it has tickets\)"):
            store.resolve(reference)
    with pytest.raises(UserError, match="expected NAME, NAME@VERSION or NAME@TAG"):
        store.resolve("tickets@")
    (store.path.parent / "file").write_text("")
    with pytest.raises(UserError, match="not a folder; a store is one"):
        Store(store.path.parent / "file").publish(make(), "x")


def test_the_beginning_of_a_version_must_be_one(store, make, monkeypatch):
    import deltaw.adapters.store.content as content

    hashes = iter(["abcd" + "0" * 60, "abcd" + "1" * 60])
    monkeypatch.setattr(content, "content_hash", lambda folder: next(hashes))
    for seed in (0, 1):
        store.publish(make(f"v{seed}", seed), "tickets")
    with pytest.raises(UserError, match=r"several versions begin so \(there are abcd00000000, abcd11111111"):
        store.resolve("tickets@abcd")
    assert store.resolve("tickets@abcd0").sha256 == "abcd" + "0" * 60


def test_a_generation_changes_with_what_a_name_means(store, make):
    seen = []
    for change in (
        lambda: store.publish(make("a", 0), "tickets"),
        lambda: store.publish(make("b", 1), "tickets"),
        lambda: store.rollback("tickets"),
        lambda: store.publish(make("b", 1), "tickets"),
        lambda: store.tag("tickets", "prod"),
    ):
        change()
        seen.append(store.generation("tickets"))
        assert store.generation("tickets") == seen[-1]
    assert len({*seen}) == len(seen)


def test_gc_keeps_what_is_needed(store, three, make):
    a, b, c = three
    store.tag(f"tickets@{a}", "prod")
    store.publish(make("v3", 3), "tickets")
    would = store.collect_garbage(keep=1, dry_run=True)
    assert {g.path.name for g in would} == {b, c} and all(g.num_bytes > 500 for g in would)
    assert len(store.versions("tickets")) == 4
    assert store.collect_garbage(keep=1) == would
    assert [v.sha256 for v in store.versions("tickets")][1:] == [a]
    assert store.collect_garbage(keep=1) == []
    with pytest.raises(UserError, match="expected at least 1"):
        store.collect_garbage(keep=0)


def test_gc_without_a_store_or_garbage(store, three):
    assert store.collect_garbage() == []
    assert Store(store.path / "none").collect_garbage() == []


def test_a_version_can_be_published_under_another_name(store, three):
    version = store.resolve(f"tickets@{three[0]}")
    copy = store.publish(version.path, "prod")
    assert copy.sha256 == version.sha256 and copy.path != version.path
    store.remove("tickets")
    read_adapter(store.resolve("prod").path)
