"""Training ends in a store; what goes wrong there never costs the run."""

import dataclasses
import json

import pytest

from deltaw.adapters.store import Store
from deltaw.errors import UserError
from deltaw.train.events import Warned
from deltaw.train.run import run_training


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_a_trained_adapter_is_published(options, store):
    ready = options(publish_to=store.path, publish_as="tickets", max_steps=2)
    summary = run_training(ready)
    version = store.resolve("tickets")
    assert summary["published"] == {"store": str(store.path), "name": "tickets", "version": version.sha256}
    assert json.loads((ready.out / "summary.json").read_text()) == summary
    assert (version.path / "summary.json").exists() and not (version.path / "checkpoints").exists()
    assert version.about.data_sha256 == summary["data_sha256"] and version.about.r == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("taken meanwhile")], ids=repr)
def test_a_store_that_fails_after_training_costs_nothing(options, store, monkeypatch, error):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(Store, "publish", fail)
    ready, told = options(publish_to=store.path, publish_as="tickets", max_steps=2), []
    summary = run_training(ready, [told.append])
    assert str(error) in summary["published"]["error"] and summary["status"] == "done"
    assert json.loads((ready.out / "summary.json").read_text()) == summary
    assert (ready.out / "adapter_model.safetensors").exists()
    (warned,) = [event.message for event in told if isinstance(event, Warned) and "publish" in event.message]
    assert warned.startswith(f"not published: {error}; ") and f"deltaw adapter publish {ready.out} tickets" in warned
    monkeypatch.undo()
    summary = run_training(dataclasses.replace(ready, resume=True))  # the same command again makes up for it
    assert summary["published"]["version"] == store.resolve("tickets").sha256


def test_what_cannot_be_published_is_said_before_training(options, store, tmp_path):
    (store.path / "Tickets").mkdir(parents=True)
    for given, message in (
        ({"publish_as": "a/b"}, "'a/b' is no name for an adapter"),
        ({"publish_to": store.path}, "--publish-to .*: under which name. Give it with --as"),
        ({"publish_as": "x", "full": True}, "--full trains no adapter"),
        ({"publish_as": "tickets", "publish_to": store.path}, "names that differ in case alone"),
    ):
        with pytest.raises(UserError, match=message):
            run_training(options(**given))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_publishes_nothing(options, store, run_until):
    summary = run_until(options(publish_to=store.path, publish_as="tickets"), 1)
    assert summary["status"] == "interrupted" and "published" not in summary and store.names() == []
