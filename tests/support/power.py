"""What a power cut leaves of a folder: the names and contents that were synced, and nothing else.

The strictest file system that POSIX allows: a file's content is what it was at its last ``fsync``, a folder's names are
those of its last ``fsync``; what was never synced is empty, or not there. ``names="all"`` is the other extreme, as ext4
without ``auto_da_alloc`` is: every name is on disk at once, a content only when it was synced. It works by watching
``os.fsync`` of this process, through which everything goes, DCP's files too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Key = tuple[int, int]
Names = Literal["synced", "all"]


class Disk:
    """The disk below a folder.

    Args:
        root: the folder; it is on disk, empty.
        after: called after each sync, with this disk and the path that was synced.
    """

    def __init__(self, root: Path, after: Callable[[Disk, Path], None] = lambda disk, path: None) -> None:
        self.root, self._after = root, after
        self._contents: dict[Key, bytes] = {}
        self._names: dict[Key, dict[str, Key]] = {}
        self._pinned: list[int] = []  # no other file gets the number of one that was synced
        self.syncs = 0

    @contextmanager
    def watching(self) -> Iterator[Disk]:
        """Watch this process's syncs."""
        real = os.fsync

        def fsync(file: int) -> None:
            real(file)
            path = Path(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
            if path.is_relative_to(self.root):
                self._note(file if isinstance(file, int) else file.fileno(), path)

        os.fsync = fsync
        try:
            yield self
        finally:
            os.fsync = real
            for descriptor in self._pinned:
                os.close(descriptor)
            self._pinned.clear()

    def _note(self, file: int, path: Path) -> None:
        found = os.fstat(file)
        key = (found.st_dev, found.st_ino)
        if key not in self._contents and key not in self._names:
            self._pinned.append(os.dup(file))
        if stat.S_ISDIR(found.st_mode):
            self._names[key] = {entry.name: _key(entry.stat(follow_symlinks=False)) for entry in os.scandir(file)}
        else:
            self._contents[key] = Path(f"/proc/self/fd/{file}").read_bytes()
        self.syncs += 1
        self._after(self, path)

    def image(self, into: Path, *, names: Names = "synced", at: Path | None = None) -> Path:
        """Make what would be there after a power cut now, in a new folder."""
        at = at or self.root
        into.mkdir(parents=True)
        here = {entry.name: entry for entry in os.scandir(at)} if at.is_dir() else {}
        listed = {name: _key(entry.stat(follow_symlinks=False)) for name, entry in here.items()}
        if names == "synced":
            listed = self._names.get(_key(at.stat()), {}) if at.is_dir() else {}
        by_key = {_key(entry.stat(follow_symlinks=False)): entry for entry in here.values()}
        for name, key in listed.items():
            if key in self._contents or (key in by_key and not by_key[key].is_dir(follow_symlinks=False)):
                (into / name).write_bytes(self._contents.get(key, b""))
            else:  # a folder; one that has another name by now is found by its number
                self.image(into / name, names=names, at=Path(by_key[key].path) if key in by_key else at / name)
        return into


def _key(found: os.stat_result) -> Key:
    return found.st_dev, found.st_ino
