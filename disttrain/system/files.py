"""Write files that survive a kill or power failure whole: the old or the new content, never partial or empty.

A new file is written under a temporary name, synced and renamed, and its folder is synced; for a new folder, its
parent is. Append-only files are synced when something is about to refer to them (:func:`sync_records`), never per line.
Cost: a sync takes some milliseconds on a disk, so nothing here runs per step.
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
"""The append-only records of a run, besides those of each rank."""
_UNSYNCABLE: Final = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""Errors of a file system that cannot sync a folder, or of a folder that may be written to but not read."""
_held: Final[dict[Path, tuple[int, int]]] = {}
"""Run folders in which this process trains: path to (device, inode)."""


def expand_path(text: str | Path, *, name: str) -> Path:
    """Expand ``~``, ``~user``, ``$VAR`` and ``${VAR}`` in a path setting; the path is not made absolute.

    A path that exists is used as is, even if it contains a ``$``.

    Args:
        text: the setting.
        name: the setting's name, for messages.

    Raises:
        ConfigError: a variable is not set, there is no such user, or the path is empty or contains a null character.
    """
    if "$" in str(text) and os.path.lexists(text):
        return Path(text)
    expanded = os.path.expanduser(os.path.expandvars(str(text)))
    missing = re.search(r"\$(\w+|\{[^}]*\})", expanded, re.ASCII)
    if missing and missing.group() in str(text):
        variable = missing.group(1).strip("{}")
        raise ConfigError(
            f"{name} is {str(text)!r}, but the environment variable {variable} is not set",
            hint=f"export {variable}=..., or write out the full path",
        )
    if expanded.startswith("~"):
        raise ConfigError(
            f"{name} is {str(text)!r}, but there is no user {expanded[1:].partition('/')[0]!r}",
            hint="write out the full path; for a folder whose name begins with ~, use ./~NAME",
        )
    if not expanded or "\0" in expanded:
        raise ConfigError(f"{name} is {str(text)!r}, which is not a path", hint="give a file or folder")
    return Path(expanded)


def resolve_path(text: str | Path, *, name: str) -> Path:
    """Resolve a path setting to one location, whatever later happens to the working directory or symbolic links.

    Raises:
        ConfigError: as for :func:`expand_path`, or the symbolic links form a cycle.
    """
    path = expand_path(text, name=name)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for a symlink cycle
        why = error.strerror if isinstance(error, OSError) else "its symbolic links form a loop"
        raise ConfigError(f"{name} {str(text)!r} cannot be found: {why}", hint="use another folder") from None


def place(text: str, *, name: str) -> str:
    """Expand a setting that is a keyword, a URL or a path; only paths change."""
    return text if "://" in text or text in ("auto", "never", "best", "last") else str(expand_path(text, name=name))


def hold(folder: Path) -> None:
    """Pin a run's folder: from now on, nothing is written to a different folder that gets the same name."""
    with suppress(OSError):  # another rank's node may not see it yet
        if folder in _held:  # already pinned, before a rollback
            return
        found = os.stat(folder)
        _held[folder] = (found.st_dev, found.st_ino)


def release(folder: Path) -> None:
    """Unpin a run's folder, when its run has ended or another one begins."""
    _held.pop(folder, None)


def check_held(path: Path) -> None:
    """Check that a path in a pinned run folder is still in that same folder.

    Raises:
        OSError: the folder was removed, moved away or replaced (ESTALE).
    """
    for folder, identity in _held.items():
        if path.is_relative_to(folder):
            try:
                found = os.stat(folder)
            except OSError:
                raise OSError(errno.ESTALE, "its run folder was removed or moved", str(path)) from None
            if (found.st_dev, found.st_ino) != identity:
                raise OSError(errno.ESTALE, "its run folder was replaced by another one", str(path))


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably; do nothing if it exists.

    Raises:
        OSError: it cannot be created, or the pinned run folder it belongs to was removed or replaced.
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
    """Write and sync a small file; readers see the old or the new content, never a mix.

    Args:
        path: the file.
        content: its new content.
        mode: its permissions; use 0o600 for secrets.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
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
        with suppress(FileNotFoundError):  # a newer attempt has removed it
            os.unlink(temporary)
        raise


def publish(temporary: Path | str, path: Path) -> None:
    """Rename a synced file into place, replacing any existing file, and sync its folder."""
    os.replace(temporary, path)
    sync_directory(path.parent)


def append_lines(path: Path, text: str) -> None:
    """Append whole lines in one write, so that a kill leaves all or nothing; create the folder if needed.

    If a power failure or full disk has left a partial last line, terminate that first.

    Raises:
        OSError: it cannot be written, or the run folder was removed or replaced.
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
    """Sync a run's append-only records: rank 0 those of the run, every rank its own.

    Files that are replaced as a whole are already synced, and any others may belong to the user.

    Raises:
        OSError: a file cannot be synced.
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
    """Convert a value for strict JSON: NaN and infinities become ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    ``float()`` parses these strings back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: plain_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialize to JSON that every parser reads; see :func:`plain_json`."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(plain_json(value), indent=indent, allow_nan=False)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while replacing a file.

    Only for the sole writer of the file from now on: a stale process that is still writing it will fail.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")  # tempfile's naming scheme
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(path.parent)):
            if pattern.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)


def write_synced(
    path: Path, text: str, *, within: int | None = None, label: str = "", check: Callable[[], None] | None = None
) -> None:
    """Write and sync a text file under a temporary name, then rename it into place.

    Args:
        path: the file; a bare name if ``within`` is given.
        text: its new content.
        within: descriptor of a directory to create the file in, even if it has been moved.
        label: makes the temporary name unique to the writer.
        check: called before the rename; if it raises, the file is not renamed.

    Raises:
        OSError: it cannot be written; no temporary file is left.
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
    """Hold a directory open: the descriptor keeps referring to it after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Sync a directory's entries to disk; do nothing if its file system does not support that."""
    try:
        with open_directory(path) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise
