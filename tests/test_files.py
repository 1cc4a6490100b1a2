"""Files are the old ones or the new ones, never something in between."""

import os
import stat
from contextlib import suppress

import pytest

from deltaw import files
from deltaw.files import new_folder, replace_file, replace_files, replace_text


def _listing(folder):
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    replace_text(path, "Δ new")
    assert _listing(tmp_path) == {"a.txt": "Δ new"}


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        replace_text(tmp_path / "a", "x")
        with new_folder(tmp_path / "f"):
            pass
    finally:
        assert os.umask(before) == 0o022
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o755


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_halfway_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def write(scratch):
        scratch.write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        replace_file(path, write)
    with pytest.raises(type(failure)):
        replace_files(tmp_path, {"b.txt": lambda scratch: scratch.write_text("new"), "a.txt": write})
    assert _listing(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_rename_that_fails_leaves_all_old_files(tmp_path, monkeypatch, fails_at, there):
    names = ["a", "b", "c"]
    for name in names if there else []:
        replace_text(tmp_path / name, f"old {name}")
    real, calls = os.replace, []

    def fragile(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError("crash")
        real(source, target)

    monkeypatch.setattr(os, "replace", fragile)
    with pytest.raises(OSError, match="crash"):
        replace_files(tmp_path, {name: lambda scratch: scratch.write_text("new") for name in names})
    monkeypatch.undo()
    found = _listing(tmp_path)
    if there:
        assert found == {name: f"old {name}" for name in names}
    else:
        assert set(found) <= set(names) and set(found.values()) <= {"new"}


def test_everything_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files, "_sync", lambda path: events.append(("sync", path.name.split(".")[0] or "scratch")))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", b.name)), real(a, b)))
    replace_files(tmp_path, {"a": lambda s: s.write_text("1"), "b": lambda s: s.write_text("2")})
    assert [kind for kind, _ in events] == ["sync", "sync", "rename", "sync", "rename", "sync"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "deep" / "f") as scratch:
        (scratch / "x").write_text("1")
        assert not (tmp_path / "deep" / "f").exists()
    assert (tmp_path / "deep" / "f" / "x").read_text() == "1"
    with suppress(RuntimeError), new_folder(tmp_path / "g") as scratch:
        (scratch / "x").write_text("1")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
