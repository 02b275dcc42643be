"""Writing small text files so that a reader sees the old or the new one, never a part; and syncing to disk."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part.

    Args:
        path: the file.
        text: what it is to hold.
        mode: its permissions; 0o600 where it may hold a secret.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # somebody has taken the file over
            os.unlink(temporary)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they replaced a file have left beside it.

    For whoever is the only one to write the file from now on: a forgotten process that is writing it fails.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # as tempfile names them
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(path.parent)):
            if pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)


def write_synced(
    path: Path, text: str, *, within: int | None = None, label: str = "", check: Callable[[], None] | None = None
) -> None:
    """Write a text file through to the disk, and only then under its name.

    Args:
        path: the file; a bare name where ``within`` is given.
        text: what it is to hold.
        within: an open directory that the file is made in, wherever that has been moved to.
        label: makes the temporary name the writer's own.
        check: called when the temporary file is there; where it raises, nothing gets the name.

    Raises:
        OSError: it cannot be written; nothing of it stays under its name.
    """
    temporary = path.with_name(f".{path.name}{label and '.'}{label}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=within), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        os.replace(temporary, path, src_dir_fd=within, dst_dir_fd=within)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=within)
        raise


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A directory held open: it stays the same one when it is renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Have the names in a directory written to the disk."""
    with open_directory(path) as descriptor:
        os.fsync(descriptor)
