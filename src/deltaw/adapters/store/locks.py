"""Locks between processes, and scratch folders whose owners can be seen to live.

A lock is ``flock`` on a file that stays: the system lets go of it when its holder ends, however it ends, so nothing is
ever left locked. The store's lock is held for renames and small files only, never while an adapter is copied.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import UserError

LOCK_NAME, WORK_NAME = ".lock", ".work"
_PATIENCE = 60.0
"""Seconds to wait for the store's lock, which is held for milliseconds."""


@contextmanager
def store_lock(store: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the store against all other changes. Raises ``UserError`` where somebody else holds it for too long."""
    handle = os.open(store / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        deadline = time.monotonic() + patience
        while not _try(handle):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{store}: another process holds its lock for {patience:.0f} s; see who with: fuser {store}/.lock"
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


@contextmanager
def work_folder(store: Path) -> Iterator[Path]:
    """A scratch folder in the store, which goes when the block ends; ``is_abandoned`` sees whether its owner lives.

    Entered under the store's lock, the folder is never seen without its own.
    """
    path = new_work(store)
    lock = path.with_suffix(".lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def new_work(store: Path) -> Path:
    """A name that nothing has yet, where things are made or thrown away."""
    (store / WORK_NAME).mkdir(exist_ok=True)
    return store / WORK_NAME / uuid.uuid4().hex


def is_abandoned(path: Path) -> bool:
    """Whether nobody works with a scratch folder, or a scratch folder's lock, any more. Under the store's lock."""
    try:
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:  # nothing that was made here
        return False
    try:
        return _try(handle)
    finally:
        os.close(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
