"""A folder of adapters as a registry: publish, roll back, tag, remove, clean up.

    STORE/NAME/current.json            what the name means now (``state.py``)
    STORE/NAME/<sha256>/               one version (``versions.py``): PEFT's files, never changed after
    STORE/OTHER/adapter_config.json …  a plain adapter, laid there by hand
    STORE/.lock  STORE/.work/          held by who changes something; what is being made or thrown away

Publishing copies into ``.work``, reads the copy as strictly as loading would, brings it to the disk, renames it to its
hash and last of all renames a new ``current.json`` over the old. Killed before that, the store means what it did; what
is left lying is ``collect_garbage``'s. Readers take no lock: they see the state before a rename or after it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from ...errors import UserError
from ...files import replace_file, sync, sync_tree
from .garbage import Garbage, find_garbage
from .listing import Entry, describe_entries, describe_entry
from .locks import WORK_NAME, new_work, store_lock, work_folder
from .lookup import (
    check_home_is_free,
    check_removable,
    is_home,
    is_published,
    only,
    parsed,
    state_of,
    state_of_disk,
    version_of,
)
from .names import Reference, check_name, check_tag, is_name
from .state import STATE_NAME, State, read_state, write_state
from .versions import Version, laid_by_hand, read_version, verify, write_note


class Store:
    """The registry in one folder, which needn't exist before the first ``publish``.

    Methods raise ``UserError`` for names, versions and folders that aren't as they should be, with nothing changed, and
    ``OSError`` where the disk is full or may not be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def names(self) -> list[str]:
        """Names that an adapter can be asked for by, sorted."""
        homes = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(home.name for home in homes if is_name(home.name) and is_home(home))

    def entries(self, *, check: bool = False) -> list[Entry]:
        """Everything that lies in the store, each with what is wrong with it; one bad entry hides no other.

        ``check``: read every byte of every version, and compare it with what was published.
        """
        self._check_is_folder()
        return describe_entries(self.path, verify if check else None)

    def entry(self, name: str, *, check: bool = False) -> Entry:
        """What ``entries`` says of one name."""
        return describe_entry(self._home(name), verify if check else None)

    def versions(self, name: str) -> list[Version]:
        """All whole versions of a name, the newest first."""
        home = self._home(name)
        if not is_published(home):
            return [laid_by_hand(home)]
        state, found = state_of(home), []
        for sha256 in reversed(state.versions):
            with suppress(UserError):  # ``entries`` tells
                found.append(version_of(home, state, sha256))
        return found

    def line(self, name: str) -> list[str]:
        """Versions in the order in which they became current; ``rollback`` goes from the last to the one before."""
        home = self._home(name)
        return list(state_of(home).line) if is_published(home) else [laid_by_hand(home).sha256]

    def resolve(self, reference: str) -> Version:
        """What ``name``, ``name@version`` (its beginning will do) or ``name@tag`` means now."""
        asked = parsed(reference)
        home = self._home(asked.name)
        if not is_published(home):
            version = laid_by_hand(home)
            only(State((version.sha256,), (version.sha256,)), asked)
            return version
        state = state_of(home)
        return version_of(home, state, only(state, asked))

    def generation(self, name: str) -> str:
        """A text that changes whenever what the name means may have; costs one small file. For who looks often."""
        home = self._home(name)
        with suppress(FileNotFoundError):
            return hashlib.sha256((home / STATE_NAME).read_bytes()).hexdigest()
        stats = [file.stat() for file in sorted(home.glob("adapter_*")) if file.is_file()]
        return repr([(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats])

    def publish(self, folder: str | Path, name: str, *, tags: Iterable[str] = ()) -> Version:
        """Make the adapter in ``folder`` the current version of ``name``, under these tags as well.

        The same adapter again is the same version; only its documents (card, figures) are renewed.
        """
        from .content import content_hash, copy_adapter, whole_adapter

        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        check_name(name)
        for tag in tags:
            check_tag(tag)
        source = whole_adapter(folder)[0].path
        self.check_free(name)
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with store_lock(self.path):
                scratch = stack.enter_context(work_folder(self.path))
            essential = copy_adapter(source, scratch)
            sha256 = content_hash(scratch)  # of the copy: the source may be changing
            write_note(scratch, sha256, essential)
            sync_tree(scratch)
            home = self.path / name
            is_there = _is_sound(home / sha256)  # reads every byte, so best without the lock
            with store_lock(self.path):
                self.check_free(name)
                home.mkdir(exist_ok=True)
                sync(self.path)
                before = state_of(home) if is_published(home) else State()
                self._put(scratch, home / sha256, is_there=is_there)
                state = before.made_current(sha256)
                for tag in tags:
                    state = state.tagged(tag, sha256)
                if state != before:
                    write_state(home, state)
        return version_of(home, state, sha256)

    def _put(self, scratch: Path, place: Path, *, is_there: bool) -> None:
        """The new version to its place. A sound one that is there stays, with the new one's documents."""
        from .content import documents

        # Meanwhile somebody may have removed it, or published the same. A sound version is never replaced: a process
        # that is killed between two renames would leave the name without it.
        if place.is_dir() and (is_there or _is_sound(place)):
            for document in documents(scratch):
                replace_file(place / document.name, partial(shutil.copyfile, document))
            return
        if os.path.lexists(place):
            place.rename(trash := new_work(self.path))
            discard(trash)
        scratch.rename(place)
        sync(place.parent)

    def rollback(self, name: str, to: str | None = None) -> Version:
        """Make the version before the current one, or the one that ``to`` names, the current one.

        With ``to``, a name whose ``current.json`` is damaged is put right from the versions that are there.
        """
        with self._changing(name) as home:
            try:
                state = before = state_of(home)
            except UserError:
                if to is None:
                    raise
                before, state = State(), state_of_disk(home)
            target = None if to is None else only(state, Reference(name, to))
            try:
                state = state.rolled_back(target)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            version = version_of(home, state, state.current)
            if state != before:
                write_state(home, state)
        return version

    def tag(self, reference: str, tag: str) -> Version:
        """Give a version a tag, which it takes away from any other."""
        check_tag(tag)
        asked = parsed(reference)
        with self._changing(asked.name) as home:
            before = state_of(home)
            sha256 = only(before, asked)
            version_of(home, before, sha256)
            state = before.tagged(tag, sha256)
            if state != before:
                write_state(home, state)
        return version_of(home, state, sha256)

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away."""
        with self._changing(name) as home:
            state = state_of(home)
            if tag not in state.tags:
                raise UserError(f"{name} has no tag {tag!r} (it has {', '.join(sorted(state.tags)) or 'none'})")
            write_state(home, state.untagged(tag))

    def remove(self, reference: str) -> None:
        """Take a whole name out, or with ``name@version`` one version that is neither current nor tagged."""
        asked = parsed(reference)
        with store_lock(self._existing()):
            gone = self.path / asked.name
            if asked.wanted is not None:
                home = self._home(asked.name)
                state = state_of(home)
                sha256 = only(state, asked)
                check_removable(state, asked, sha256)
                write_state(home, state.without([sha256]))
                gone = home / sha256
            elif not os.path.lexists(gone):
                raise self._unknown(asked.name)
            trash = new_work(self.path)
            if os.path.lexists(gone):
                gone.rename(trash)
            sync(gone.parent)
        discard(trash)

    def collect_garbage(self, *, keep: int | None = None, dry_run: bool = False) -> list[Garbage]:
        """Remove what killed processes left behind and versions that no name knows; what a running publish uses stays.

        ``keep``: of each name forget all but the newest so many versions; the current and the tagged stay in any case.
        ``dry_run``: only say what would go.
        """
        if keep is not None and keep < 1:
            raise UserError(f"keep {keep}: expected at least 1")
        if not self.path.is_dir():
            return []
        with store_lock(self.path):
            found = list(find_garbage(self.path, keep))
            if dry_run:
                return found
            trash = [self._put_away(garbage) for garbage in found]
        for path in trash:
            discard(path)
        return found

    def _put_away(self, garbage: Garbage) -> Path:
        """Out of everybody's sight, so that what takes long is done without the lock."""
        if garbage.path.parent == self.path / WORK_NAME:
            return garbage.path
        home = garbage.path.parent
        if garbage.is_expired:  # the state first: it must never know a version that isn't there
            state = read_state(home)
            write_state(home, state.without([garbage.path.name]))
        trash = new_work(self.path)
        garbage.path.rename(trash)
        return trash

    def check_free(self, name: str) -> None:
        """Raises ``UserError`` where no version can be published under ``name``."""
        check_name(name)
        self._check_is_folder()
        if not self.path.is_dir():
            return
        same = [other.name for other in self.path.iterdir() if other.name.casefold() == name.casefold()]
        if same and same[0] != name:
            raise UserError(f"{name}: the store has {same[0]}, and names that differ in case alone are one; use that")
        if same:
            check_home_is_free(self.path / name)

    def _check_is_folder(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path}: not a folder; a store is one. Give another path")

    def _existing(self) -> Path:
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no store there; deltaw adapter publish makes one, --store names another")
        return self.path

    def _home(self, name: str) -> Path:
        """The folder of a name that is there."""
        check_name(name)
        home = self._existing() / name
        if home.is_symlink():
            raise UserError(f"{home}: a link; a store follows none. Copy the folder here")
        if not is_home(home):
            raise self._unknown(name)
        return home

    def _unknown(self, name: str) -> UserError:
        names = self.names()
        some = ", ".join(get_close_matches(name, names) or names[:8])
        return UserError(f"{name}: no such adapter in {self.path} (it has {some or 'none'})")

    @contextmanager
    def _changing(self, name: str) -> Iterator[Path]:
        with store_lock(self._existing()):
            yield self._home(name)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder, as far as it goes; what stays is garbage still."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_sound(place: Path) -> bool:
    """Whether a version that is there says what it did when it was published."""
    try:
        verify(read_version(place, place.parent.name))
    except (UserError, OSError):
        return False
    return True
