"""Writing files that a kill or a power cut leaves whole: the old or the new one, never a part, never an empty one.

A new file is written under a temporary name, synced, renamed, and its folder is synced; so is the parent of a folder
that is made. Files that are only appended to are synced when something is about to refer to them
(:func:`sync_records`), never per line. Cost: a sync is some milliseconds on a disk, so nothing here runs per step.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from disttrain.errors import ConfigError

METRICS: Final = "metrics.csv"
EVENT_LOG: Final = "events.jsonl"
"""The records of a run that are appended to, beside those of its ranks."""
_UNSYNCABLE: Final = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""What a file system says that cannot sync a folder, or where one may write but not look."""
_held: Final[dict[Path, tuple[int, int]]] = {}
"""The folders of runs that train in this process, by path, with device and inode."""


def expand_path(text: str | Path, *, name: str) -> Path:
    """A path from a setting: ``~``, ``~user``, ``$VAR`` and ``${VAR}`` replaced; not made absolute.

    A path that exists is taken as it is, also with a ``$`` in it.

    Args:
        text: the setting.
        name: what the setting is called, for messages.

    Raises:
        ConfigError: a variable is not set, there is no such user, or the path is empty or holds a null character.
    """
    if "$" in str(text) and os.path.lexists(text):
        return Path(text)
    expanded = os.path.expanduser(os.path.expandvars(str(text)))
    missing = re.search(r"\$(\w+|\{[^}]*\})", expanded, re.ASCII)
    if missing and missing.group() in str(text):
        variable = missing.group(1).strip("{}")
        raise ConfigError(
            f"{name} is {str(text)!r}, but the environment variable {variable} is not set",
            mend=f"export {variable}=..., or write the path out",
        )
    if expanded.startswith("~"):
        raise ConfigError(
            f"{name} is {str(text)!r}, but there is no user {expanded[1:].partition('/')[0]!r}",
            mend="write the path out; a folder whose name begins with ~ is ./~NAME",
        )
    if not expanded or "\0" in expanded:
        raise ConfigError(f"{name} is {str(text)!r}, which is not a path", mend="name a file or folder")
    return Path(expanded)


def resolve_path(text: str | Path, *, name: str) -> Path:
    """The one place that a setting names, whatever happens later to the working folder or to symbolic links.

    Raises:
        ConfigError: as :func:`expand_path`, or links lead in a circle.
    """
    path = expand_path(text, name=name)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for a circle of links
        why = error.strerror if isinstance(error, OSError) else "its symbolic links lead in a circle"
        raise ConfigError(f"{name} {str(text)!r} cannot be found: {why}", mend="name another folder") from None


def place(text: str, *, name: str) -> str:
    """A setting that is a word of its own, a URL, or a path, which is then expanded."""
    return text if "://" in text or text in ("auto", "never", "best", "last") else str(expand_path(text, name=name))


def hold(folder: Path) -> None:
    """A run trains in this folder: from now on nothing here is written to another one that gets its name."""
    with suppress(OSError):  # another rank's node may not see it yet
        if folder in _held:  # since before a rollback
            return
        found = os.stat(folder)
        _held[folder] = (found.st_dev, found.st_ino)


def release(folder: Path) -> None:
    """The run in this folder has ended, or another one begins."""
    _held.pop(folder, None)


def check_held(path: Path) -> None:
    """Make sure that a path in the folder of a run that trains here is still in that folder.

    Raises:
        OSError: the folder was removed, moved away or replaced; ESTALE.
    """
    for folder, identity in _held.items():
        if path.is_relative_to(folder):
            try:
                found = os.stat(folder)
            except OSError:
                raise OSError(errno.ESTALE, "its run's folder was removed or moved away", str(path)) from None
            if (found.st_dev, found.st_ino) != identity:
                raise OSError(errno.ESTALE, "its run's folder was replaced by another one", str(path))


def make_folder(path: Path) -> None:
    """Make a folder and its parents, so that a power cut does not take their names; nothing where it exists.

    Raises:
        OSError: it cannot be made, or a run's folder that it is to be in was removed or replaced.
    """
    check_held(path)
    missing = []
    while not path.is_dir():
        missing.append(path)
        if path == path.parent:
            break
        path = path.parent
    for number, folder in enumerate(reversed(missing), 1):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            if number == len(missing):
                raise
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        sync_directory(folder.parent)


def write_atomically(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Write a small file through to the disk, so that a reader sees the old or the new one, never a part.

    Args:
        path: the file.
        content: what it is to hold.
        mode: its permissions; 0o600 where it may hold a secret.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    check_held(path)
    data = content if isinstance(content, bytes) else content.encode("utf-8", errors="surrogateescape")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.chmod(temporary, mode)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # somebody has taken the file over
            os.unlink(temporary)
        raise


def publish(temporary: Path | str, path: Path) -> None:
    """Give a synced file its name, in place of what has it, also after a power cut."""
    os.replace(temporary, path)
    sync_directory(path.parent)


def append_lines(path: Path, text: str) -> None:
    """Append whole lines by one write, so that a kill leaves all of it or nothing; its folder is made.

    What a power cut or a full disk has left of a line is ended first.

    Raises:
        OSError: it cannot be written, or the run's folder was removed or replaced.
    """
    make_folder(path.parent)
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn = b""
        if end:
            file.seek(end - 1)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + text.encode("utf-8", errors="backslashreplace"))


def sync_records(run_dir: Path, rank: int) -> None:
    """Have a run's records written to the disk: rank 0's those of the run, every rank's those of its own.

    Files that are replaced as a whole have been synced by then, and others may be no concern of ours.

    Raises:
        OSError: one of them cannot be.
    """
    found = list(run_dir.glob(f"*/rank-{rank:05d}.jsonl"))
    if rank == 0:
        found += [run_dir / name for name in (METRICS, EVENT_LOG) if (run_dir / name).is_file()]
    for path in found:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            os.fsync(file.fileno())
    for folder in {path.parent for path in found}:
        sync_directory(folder)


def plain_json(value: Any) -> Any:
    """A value as JSON can hold it: numbers that JSON has no word for become ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    ``float()`` reads these words again.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: plain_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every parser reads: see :func:`plain_json`."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(plain_json(value), indent=indent, allow_nan=False)


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
    """Have the names in a directory written to the disk; nothing where its file system cannot do that."""
    try:
        with open_directory(path) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise
