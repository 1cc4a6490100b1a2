"""Whatever is done in whatever order: the store agrees with a plain model of it, and nothing in it is ever wrong."""

import os
import shutil
import tempfile
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltaw.adapters.store import Store
from deltaw.errors import UserError

SEEDS = st.integers(0, 3)
NAMES = st.sampled_from(["a", "b"])
TAGS = st.sampled_from(["prod", "canary"])


class Registry(RuleBasedStateMachine):
    """name → (versions in the order of publishing, line, tags), as lists and dicts."""

    adapters: list[Path]
    """Different adapters, made once."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder / "store")
        self.model: dict[str, tuple[list[str], list[str], dict[str, str]]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(name=NAMES, seed=SEEDS, tags=st.sets(TAGS))
    def publish(self, name: str, seed: int, tags: set[str]) -> None:
        sha = self.store.publish(self.adapters[seed], name, tags=tags).sha256
        versions, line, named = self.model.setdefault(name, ([], [], {}))
        if sha not in versions:
            versions.append(sha)
        if line[-1:] != [sha]:
            line.append(sha)
        named |= dict.fromkeys(tags, sha)

    @precondition(lambda self: self.model)
    @rule(name=NAMES)
    def rollback(self, name: str) -> None:
        _, line, _ = self.model.get(name, ([], [], {}))
        if len(line) < 2:
            with pytest.raises(UserError):
                self.store.rollback(name)
        else:
            line.pop()
            assert self.store.rollback(name).sha256 == line[-1]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rollback_to(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        versions, line, _ = self.model[name]
        sha = data.draw(st.sampled_from(versions))
        if sha in line:
            del line[len(line) - line[::-1].index(sha) :]
        else:
            line.append(sha)
        assert self.store.rollback(name, sha[:16]).sha256 == sha

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tag=TAGS)
    def tag(self, data: st.DataObject, tag: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        sha = data.draw(st.sampled_from(self.model[name][0]))
        self.store.tag(f"{name}@{sha}", tag)
        self.model[name][2][tag] = sha

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_version(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        versions, line, tags = self.model[name]
        sha = data.draw(st.sampled_from(versions))
        if sha == line[-1] or sha in tags.values():
            with pytest.raises(UserError):
                self.store.remove(f"{name}@{sha}")
            return
        self.store.remove(f"{name}@{sha}")
        self._forget(name, {sha})

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if self.model.pop(name, None) is None:
            with pytest.raises(UserError):
                self.store.remove(name)
        else:
            self.store.remove(name)

    @rule(keep=st.none() | st.integers(1, 3))
    def collect_garbage(self, keep: int | None) -> None:
        would = self.store.collect_garbage(keep=keep, dry_run=True)
        assert self.store.collect_garbage(keep=keep) == would
        assert self.store.collect_garbage(keep=keep) == []
        for name, (versions, line, tags) in self.model.items():
            gone = set() if keep is None else {*versions[:-keep]} - {line[-1], *tags.values()}
            assert {garbage.path.name for garbage in would if garbage.path.parent.name == name} == gone
            self._forget(name, gone)

    def _forget(self, name: str, gone: set[str]) -> None:
        versions, line, _ = self.model[name]
        versions[:] = [sha for sha in versions if sha not in gone]
        line[:] = [sha for sha, _ in groupby(sha for sha in line if sha not in gone)]

    @invariant()
    def it_is_as_modelled(self) -> None:
        assert self.store.names() == sorted(self.model)
        for name, (versions, line, tags) in self.model.items():
            assert [version.sha256 for version in self.store.versions(name)] == versions[::-1]
            assert self.store.line(name) == line
            assert self.store.resolve(name).sha256 == line[-1] == self.store.resolve(f"{name}@current").sha256
            assert {tag: self.store.resolve(f"{name}@{tag}").sha256 for tag in tags} == tags
            assert sorted(os.listdir(self.store.path / name)) == sorted(["current.json", *versions])
        for entry in self.store.entries(check=True):
            assert not entry.problems and entry.num_versions == len(self.model[entry.name][0])
        if self.store.path.exists():
            assert {*os.listdir(self.store.path)} - {".lock", ".work"} == {*self.model}
            assert not os.listdir(self.store.path / ".work")


def test_any_order(make, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # thousands of them, of which nothing is tested here
    Registry.adapters = [make(f"v{seed}", seed) for seed in range(4)]
    case = Registry.TestCase
    checks = list(HealthCheck)
    case.settings = settings(
        max_examples=25, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=checks
    )
    case("runTest").runTest()
