"""Killed at any moment, or out of disk: the name means the old version or the new one, whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw import files
from deltaw.adapters.store.locks import store_lock
from deltaw.errors import UserError


@pytest.mark.parametrize("case", ["everywhere", "at_random", "together", "slowly"])
def test_whatever_happens_a_name_means_a_whole_version(tmp_path, case):
    script = Path(__file__).with_name("crash_case.py")
    done = subprocess.run(
        [sys.executable, script, case, tmp_path], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_lock_that_somebody_holds_is_told(store, three):
    with (
        store_lock(store.path),
        pytest.raises(UserError, match=r"another process holds its lock for 0 s; see who with: fuser .*/\.lock"),
        store_lock(store.path, patience=0),
    ):
        pass
    with store_lock(store.path, patience=0):
        pass


def test_everything_is_on_disk_before_anybody_can_see_it(store, three, make, monkeypatch):
    """A machine without power: a rename must never be on the disk before what it shows."""
    events = []
    real_sync, real_replace, real_rename = files._sync, os.replace, Path.rename
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(("sync", Path(path))), real_sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", Path(b))), real_replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(("rename", Path(b))), real_rename(a, b)))
    version = store.publish(make("new", 7), "tickets")
    home = store.path / "tickets"
    shown, current = events.index(("rename", version.path)), events.index(("rename", home / "current.json"))
    assert shown < current
    synced = [path for kind, path in events[:shown] if kind == "sync"]
    scratch = next(path.parent for path in synced if path.name == "version.json")
    assert {path.name for path in synced if path.parent == scratch} == {p.name for p in version.path.iterdir()}
    assert scratch in synced and store.path in synced
    assert ("sync", home) in events[shown:current] and events[-1] == ("sync", home)
