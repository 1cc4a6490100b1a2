"""Files that are either the old one or the new one, whatever happens in between: write beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file beside ``path``, then put it in ``path``'s place in one step."""
    replace_files(path.parent, {path.name: write})


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """``replace_file`` for files of one folder that belong together: all are written before the first is replaced.

    Where one can't be put in place, those before it are put back. Only a machine that stops between two renames
    leaves files of two generations, each whole: the first ones new, the others' new generation still ``left_over``.
    """
    scratch: dict[str, Path] = {}
    old: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            scratch[name] = _scratch_file(folder, name)
            write(scratch[name])
            _sync(scratch[name])
            os.chmod(scratch[name], 0o666 & ~_umask())
        if len(writers) > 1:
            old = _second_names(folder, writers)
        for name, new in scratch.items():
            os.replace(new, folder / name)
            _sync(folder)  # renames reach the disk in their order
    except BaseException:
        for name, kept in old.items():
            os.replace(kept, folder / name)
        raise
    finally:
        for path in [*scratch.values(), *old.values()]:
            path.unlink(missing_ok=True)


def left_over(path: Path) -> Iterator[Path]:
    """What was to take ``path``'s place, or to keep it, when its machine stopped."""
    return (file for file in path.parent.glob(f".{path.name}.*") if file.is_file())


def replace_text(path: Path, text: str) -> None:
    """``replace_file`` with a text."""
    replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder to fill; it becomes ``path`` (which must not exist) when the block ends well, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch
        sync_tree(scratch)
        os.chmod(scratch, 0o777 & ~_umask())
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file to the disk, or a folder's list of names."""
    _sync(path)


def sync_tree(folder: Path) -> None:
    """Bring everything in a folder to the disk, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            _sync(path)


def _scratch_file(folder: Path, name: str) -> Path:
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    os.close(handle)
    return Path(scratch)


def _second_names(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """A hard link to each file that is there, to put it back by; none where the file system has no links."""
    kept = {}
    for name in names:
        second = _scratch_file(folder, name)
        second.unlink()
        with suppress(OSError):
            os.link(folder / name, second)
            kept[name] = second
    return kept


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask; there is no way to read it but to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
