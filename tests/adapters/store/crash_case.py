"""Processes that use a store and are killed, or whose file operations fail: python crash_case.py CASE FOLDER.

Torch is imported once; every process that dies is a fork.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from conftest import make_adapter  # beside this file

from deltaw.adapters.store import Store
from deltaw.adapters.store.locks import work_folder
from deltaw.errors import UserError

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "fsync", "half a copy"}
"""Audit events that change a file system (``open`` for writing is one more), and two that have none."""


def fork(work: Callable[[], object]) -> int:
    """Do it in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(attempt(work))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return pid


def attempt(work: Callable[[], object]) -> int:
    """The exit code of a command that does this."""
    try:
        work()
    except (UserError, OSError):
        return 2
    return 0


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def at_change(number: int, happens: Callable[[], None]) -> Iterator[None]:
    """Let something happen just before the so-many-th operation that changes files."""
    left = number

    def see(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event == "open" and bool(int(args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in CHANGES or is_write:
            left -= 1
            if left == 0:
                happens()

    copy = shutil.copyfile

    def copy_by_halves(source: Path, target: Path) -> None:
        content = source.read_bytes()
        with target.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            see("half a copy", ())
        copy(source, target)

    watchers.append(see)
    os.fsync = lambda handle: see("fsync", ())  # a process that dies takes nothing from the disk, and it takes minutes
    shutil.copyfile = copy_by_halves  # type: ignore[assignment]
    try:
        yield
    finally:
        watchers.clear()
        os.fsync, shutil.copyfile = _no_sync, copy


watchers: list[Callable[[str, tuple[Any, ...]], None]] = []
sys.addaudithook(lambda event, args: [watch(event, args) for watch in watchers] and None)


def _no_sync(handle: int) -> None:
    pass


def die() -> None:
    os._exit(9)


def fail() -> None:
    raise OSError(28, "No space left on device")


def check(store: Store, allowed: set[str | None]) -> None:
    """A name means one of what it may, whole; what lies about goes, and then nothing is wrong."""
    names = store.names()
    assert ("tickets" in names) or None in allowed, names
    if "tickets" in names:
        assert store.resolve("tickets").sha256 in allowed
    store.collect_garbage()
    for entry in store.entries(check=True):
        assert not entry.problems, entry.problems
        assert entry.version is not None
    left = list((store.path / ".work").iterdir()) if (store.path / ".work").exists() else []
    assert not left, left
    assert not list(store.path.rglob(".current.json.*"))


def under(number: int, happens: Callable[[], None], change: Callable[[], object]) -> None:
    with at_change(number, happens):
        change()


def everywhere(folder: Path) -> None:
    """Every kind of change, killed before each of its file operations, and with each of them failing."""
    adapters = [make_adapter(folder / f"v{seed}", seed) for seed in range(3)]
    (adapters[1] / "README.md").write_text("a card")
    start = Store(folder / "start")
    a, b = (start.publish(adapters[seed], "tickets").sha256 for seed in (0, 1))
    (start.path / "tickets" / ("c" * 64)).mkdir()
    (adapters[1] / "README.md").write_text("another card")
    c = Store(folder / "other").publish(adapters[2], "tickets").sha256
    empty = Store(folder / "empty")
    cases: dict[str, tuple[Store, Callable[[Store], object], set[str | None]]] = {
        "publish": (start, lambda store: store.publish(adapters[2], "tickets", tags=["prod"]), {b, c}),
        "publish again": (start, lambda store: store.publish(adapters[1], "tickets"), {b}),
        "first publish": (empty, lambda store: store.publish(adapters[2], "tickets"), {None, c}),
        "rollback": (start, lambda store: store.rollback("tickets"), {a, b}),
        "remove a version": (start, lambda store: store.remove(f"tickets@{a}"), {b}),
        "remove": (start, lambda store: store.remove("tickets"), {b, None}),
        "gc": (start, lambda store: store.collect_garbage(keep=1), {b}),
    }
    os.fsync = _no_sync
    for name, (before, change, allowed) in cases.items():
        num_changes = 200
        for happens in (die, fail):
            for number in range(1, num_changes + 1):
                store = Store(folder / "now")
                shutil.rmtree(store.path, ignore_errors=True)
                if before.path.exists():
                    shutil.copytree(before.path, store.path)

                work = partial(under, number, happens, partial(change, store))
                code = exit_code(fork(work)) if happens is die else attempt(work)
                assert code in (0, 2, 9), (name, happens.__name__, number, code)
                check(store, allowed)
                if name == "publish":
                    assert store.publish(adapters[2], "tickets").sha256 == c
                elif "remove" not in name and "tickets" in store.names():
                    store.rollback("tickets", a) if name == "rollback" else change(store)
                if code == 0 and happens is die:
                    num_changes = number
                    break
        assert 2 < num_changes < 200, (name, num_changes)
        print(name, num_changes, flush=True)


def at_random(folder: Path) -> None:
    """A process that changes a store without end, killed at any moment."""
    adapters = [make_adapter(folder / f"v{seed}", seed) for seed in range(4)]
    store = Store(folder / "store")
    known = {store.publish(adapter, "tickets").sha256 for adapter in adapters}
    chance = random.Random(0)

    def work(seed: int) -> None:
        own = random.Random(seed)
        while True:
            with suppress(UserError):
                own.choice(
                    [
                        lambda: store.publish(own.choice(adapters), "tickets", tags=["prod"]),
                        lambda: store.publish(own.choice(adapters), "tickets"),
                        lambda: store.rollback("tickets"),
                        lambda: store.remove(f"tickets@{own.choice(sorted(known))}"),
                        lambda: store.collect_garbage(keep=2),
                    ]
                )()

    for seed in range(20):
        pids = [fork(lambda seed=seed, more=more: work(100 * seed + more)) for more in range(2)]
        time.sleep(chance.uniform(0.005, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert [exit_code(pid) for pid in pids] == [-9, -9]
        check(store, set(known))


def together(folder: Path) -> None:
    """Publishers of one name, a cleaner and a reader, all at once."""
    store = Store(folder / "store")
    adapters = [[make_adapter(folder / f"v{p}-{i}", 10 * p + i) for i in range(4)] for p in range(3)]
    store.publish(make_adapter(folder / "first", 99), "tickets")
    end = time.monotonic() + 60

    def publish(own: list[Path]) -> None:
        for adapter in own:
            store.publish(adapter, "tickets")

    def clean() -> None:
        while time.monotonic() < end:
            store.collect_garbage()

    def read() -> None:
        last = ""
        while time.monotonic() < end:
            version = store.resolve("tickets")
            if version.sha256 != last:
                (entry,) = store.entries(check=True)
                problems = [p for p in entry.problems if "unfinished" not in p]  # one is being published just now
                assert not problems and entry.version is not None, problems
                last = version.sha256

    others = [fork(clean), fork(read)]
    codes = [exit_code(pid) for pid in [fork(lambda own=own: publish(own)) for own in adapters]]
    assert codes == [0, 0, 0], codes
    for pid in others:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "a reader or cleaner has ended"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(store.versions("tickets")) == 13 and len(store.line("tickets")) == 13
    check(store, {store.line("tickets")[-1]})


def slowly(folder: Path) -> None:
    """Cleaning while somebody publishes slowly, and after they were killed."""
    store = Store(folder / "store")
    adapter = make_adapter(folder / "a")
    store.publish(make_adapter(folder / "b", 1), "tickets")
    copy = shutil.copyfile

    def work() -> None:
        shutil.copyfile = lambda a, b: (copy(a, b), time.sleep(0.3))[0]  # type: ignore[assignment]
        store.publish(adapter, "tickets")

    for is_killed in (False, True):
        pid = fork(work)
        for _ in _until(lambda: any((store.path / ".work").glob("*/*"))):
            assert store.collect_garbage() == []
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == (-9 if is_killed else 0)
        assert len(store.collect_garbage()) == 2 * is_killed  # a folder and its lock
    with work_folder(store.path):
        assert store.collect_garbage() == []


def _until(is_so: Callable[[], bool]) -> Iterator[None]:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        yield
        time.sleep(0.01)
    yield


if __name__ == "__main__":
    {"everywhere": everywhere, "at_random": at_random, "together": together, "slowly": slowly}[sys.argv[1]](
        Path(sys.argv[2])
    )
