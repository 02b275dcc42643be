"""Check a run's folders: whether they are writable and readable, how fast, and whether all nodes see the same ones.

Each probe is bounded in time and bytes and cleans up after itself.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from disttrain.doctor.finding import Finding, failure, ok, size, warning
from disttrain.errors import ConfigError
from disttrain.system.files import expand_path
from disttrain.system.reading import ReadError, read_yaml

_MIB: Final = 2**20
_GIB: Final = 2**30
_WRITE_BYTES: Final = 32 * _MIB
_READ_BYTES: Final = 64 * _MIB
_SECONDS: Final = 1.0
_SLOW: Final = 50 * 10**6
_SEE_SECONDS: Final = 3.0


@dataclass(frozen=True)
class Folders:
    """The paths that a run reads and writes.

    Attributes:
        run_dir: the run's folder; need not exist.
        data: shards, manifests or folders; a pattern is replaced by its folder.
    """

    run_dir: Path
    data: tuple[Path, ...] = ()


def folders_of(config: str | None, run_dir: str | None, data: Sequence[str]) -> Folders:
    """Collect the folders that a configuration names; ``run_dir`` and ``data`` override it.

    Raises:
        ConfigError: the file cannot be read or is not a configuration.
    """
    settings = _settings(config) if config is not None else {}
    trainer, sources = ({} if settings.get(name) is None else settings[name] for name in ("trainer", "data"))
    for name, section in (("trainer", trainer), ("data", sources)):
        if not isinstance(section, dict):
            raise ConfigError(
                f"{config}: {name} is {section!r:.60}, not a mapping of settings",
                hint=f"write {name}: with NAME: VALUE lines below it",
            )
    named = list(data) or [text for key in ("train", "val", "test") for text in _texts(sources.get(key))]
    local = [text for text in named if "://" not in text]
    where = expand_path(run_dir or trainer.get("run_dir") or "runs", name="trainer.run_dir")
    return Folders(where, tuple(dict.fromkeys(map(_readable, local))))


def _settings(config: str) -> dict[str, Any]:
    try:
        settings = read_yaml(config)
    except ReadError as error:
        raise ConfigError(f"{config} {error}", hint="correct --config, or the file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} cannot be read: {error}", hint="correct --config") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{config} is not a mapping of settings", hint="correct --config, or write NAME: VALUE lines")
    return settings


def _texts(source: Any) -> Iterator[str]:
    """Yield the paths in a data setting: a single path, several, or weighted sources by name."""
    if isinstance(source, str):
        yield source
    elif isinstance(source, dict):
        for key, value in source.items():
            if isinstance(value, dict | list) or key in ("shards", "path"):
                yield from _texts(value)
    elif isinstance(source, list):
        for value in source:
            yield from _texts(value)


def _readable(text: str) -> Path:
    path = Path(text)
    # A manifest's shards are in its folder. A missing manifest keeps its own name, for the message.
    manifest = path.suffix == ".json" and path.exists()
    return path.parent if manifest or any(sign in path.name for sign in "{*?[") else path


def examine_folders(folders: Folders) -> list[Finding]:
    """Test writing to the run folder and reading the data. Called by the first rank of each node."""
    found = [_examine_run_folder(folders.run_dir)]
    return found + [_examine_data(path) for path in folders.data]


def _existing(path: Path) -> Path:
    """Return the path, or its nearest existing parent folder."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _examine_run_folder(run_dir: Path) -> Finding:
    check, folder = "run folder", _existing(run_dir)
    where = str(run_dir) if folder == run_dir.absolute() else f"{run_dir} (to be created in {folder})"
    hint = "set trainer.run_dir to a writable folder with space for a few checkpoints"
    probe = folder / f".disttrain-doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        if not folder.is_dir():
            return failure(check, f"{folder} is a file", hint)
        seconds, written = _write(probe)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        why = "the file system is read-only" if error.errno == errno.EROFS else error.strerror
        return failure(check, f"{where} cannot be written: {why}", hint)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    speed = written / seconds
    said = f"{where}: {size(free)} free, writes {speed / 1e6:,.0f} MB/s with fsync"
    if free < _GIB:
        return warning(
            check, said, "free some space: with Adam, a checkpoint is about three times the size of the weights"
        )
    if speed < _SLOW:
        return warning(check, said, "saving a checkpoint will be slow: save less often, or use a faster file system")
    return ok(check, said)


def _write(path: Path) -> tuple[float, int]:
    """Write and sync a test file; return seconds and bytes."""
    block, written, start = os.urandom(4 * _MIB), 0, time.perf_counter()
    with open(path, "wb") as file:
        while written < _WRITE_BYTES and time.perf_counter() - start < _SECONDS:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written += len(block)
    return time.perf_counter() - start, written


def _examine_data(path: Path) -> Finding:
    check, hint = "data", "correct data.train, data.val or data.test, or mount the file system on this node"
    if not path.exists():
        return failure(check, f"{path} does not exist", hint)
    largest = max(_files(path), key=lambda each: each[0], default=(0, path))
    try:
        seconds, read = _read(largest[1])
    except OSError as error:
        return failure(check, f"{largest[1]} cannot be read: {error.strerror}", hint)
    if not read:
        return warning(check, f"{path} contains no shards", hint)
    if read < _MIB:
        return ok(check, f"{path}: readable; {largest[1].name} is too small to measure the speed")
    said = f"{path}: reads {read / seconds / 1e6:,.0f} MB/s ({size(read)} of {largest[1].name})"
    if read / seconds < _SLOW:
        return warning(check, said, "copy the data to a local disk, or set data.cache.directory to one")
    return ok(check, said)


def _files(path: Path) -> Iterator[tuple[int, Path]]:
    """Yield sizes and paths of shard files among the first thousand entries."""
    folder = path if path.is_dir() else path.parent
    with suppress(OSError):
        for number, entry in enumerate(os.scandir(folder)):
            if number < 1000 and entry.is_file() and (entry.name.endswith(".tar") or Path(entry.path) == path):
                yield entry.stat().st_size, Path(entry.path)


def _read(path: Path) -> tuple[float, int]:
    """Read the start of a file, after asking the kernel to drop it from the page cache; return seconds and bytes."""
    if path.is_dir():
        return 0.0, 0
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read, start = 0, time.perf_counter()
        while read < _READ_BYTES and time.perf_counter() - start < _SECONDS and (block := file.read(4 * _MIB)):
            read += len(block)
    return max(time.perf_counter() - start, 1e-9), read


class SharedSign:
    """A marker file that rank 0 writes to the run folder for the other nodes to find.

    Args:
        run_dir: the run's folder.
        name: unique name of this run of the doctor.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.run_dir = run_dir
        self.path = _existing(run_dir) / f".disttrain-doctor-{name}"

    def leave(self) -> bool:
        """Write the file, on rank 0; return whether that worked."""
        try:
            self.path.write_text("")
        except OSError:
            return False
        return True

    def seen(self) -> Finding:
        """Look for the file from another node, for a few seconds, because network file systems show new files late."""
        deadline = time.monotonic() + _SEE_SECONDS
        while not self.path.exists():
            if time.monotonic() > deadline:
                return failure(
                    "run folder",
                    f"{self.run_dir} is not the folder that rank 0 writes to",
                    "set trainer.run_dir to a folder on a file system that all nodes mount at the same path",
                )
            with suppress(OSError):
                os.listdir(self.path.parent)  # listing the folder makes NFS revalidate its cache
            time.sleep(0.1)
        return ok("run folder", f"{self.run_dir} is shared with rank 0")

    def remove(self) -> None:
        """Remove the file, on rank 0."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
