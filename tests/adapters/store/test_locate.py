"""An adapter is named by a path or by a name in a store; a path that is there goes first."""

from pathlib import Path

import pytest

from deltaw.adapters.store import Store, default_store, label_of, locate_adapter
from deltaw.errors import UserError


@pytest.fixture
def published(store, make, monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAW_STORE", str(store.path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return store.publish(make(), "tickets", tags=["prod"])


def test_a_name_is_found_in_the_store(published, store, make):
    for text in ("tickets", "tickets@prod", "tickets@current", str(published)):
        assert locate_adapter(text) == published.path
    other = Store(store.path.parent / "other")
    version = other.publish(make("b", 1), "tickets")
    assert locate_adapter("tickets", other.path) == version.path


def test_a_path_that_is_there_goes_first(published):
    Path("tickets").mkdir()
    assert locate_adapter("tickets") == Path("tickets")
    assert locate_adapter("tickets@current") == published.path


def test_what_is_no_name_stays_as_it_is(published):
    assert locate_adapter("owner/name") == Path("owner/name")
    assert locate_adapter(Path("tickets")) == Path("tickets")


@pytest.mark.parametrize("text", ["./nope", "/nope", "~/nope", "../nope"])
def test_paths_that_are_not_there(published, text):
    with pytest.raises(UserError, match=f"{text}: no such folder"):
        locate_adapter(text)


def test_names_that_are_not_there(published, tmp_path):
    with pytest.raises(UserError, match=r"nope: no such folder, and no adapter of that name .*it has tickets"):
        locate_adapter("nope")
    with pytest.raises(UserError, match="tickets@nope: no such version or tag"):
        locate_adapter("tickets@nope")
    with pytest.raises(UserError, match=r"nope: no such folder, and .* \(not there yet\)"):
        locate_adapter("nope", tmp_path / "none")


def test_where_the_store_is(monkeypatch):
    monkeypatch.setenv("DELTAW_STORE", "/x")
    assert default_store() == Path("/x")
    monkeypatch.delenv("DELTAW_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_store() == Path("/data/deltaw/adapters")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_store() == Path.home() / ".local/share/deltaw/adapters"


def test_a_version_is_called_by_its_name_and_not_by_64_digits(published):
    assert label_of(published.path) == f"tickets@{published.sha256[:12]}"
    assert label_of("runs/first") == "first"
