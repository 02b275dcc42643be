"""The commit marker: which checkpoints of a folder exist, and what they contain.

A checkpoint is a directory with a marker file ``COMMITTED``, written last. The marker lists every file with its size
and checksum and identifies the state: step, epoch, run, attempt, monitored metric. A directory whose marker is missing
or damaged, or in which a file has a different size, is torn; it is skipped, with a reason. A check costs one ``stat``
per file; contents are only read on request, and by all ranks in :mod:`disttrain.checkpoint.format.verification`. Needs
no torch. Takes no lock: a checkpoint that another process deletes during a listing counts as absent.

Format 1 listed sizes only; 2 added checksums, run, attempt and metric; 3 added optimizer and extra
state that are not tensors, and which parameters are frozen. Every later disttrain reads all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from disttrain.checkpoint.format.checksum import KIND, Sum, sum_of
from disttrain.errors import CheckpointError
from disttrain.system.files import plain_json, sync_directory, write_synced
from disttrain.system.reading import as_number, as_text, parse_json, read_text

FORMAT: Final = 3
MARKER: Final = "COMMITTED"
LATEST: Final = "LATEST"
META: Final = "meta.pt"
TEMPORARY: Final = ".tmp"
ABANDONED: Final = ".abandoned"
"""Suffix of a checkpoint that the run did not resume from; it no longer counts."""


@dataclass(frozen=True)
class Metric:
    """The monitored metric at a checkpoint."""

    name: str
    value: float
    mode: str


@dataclass(frozen=True)
class About:
    """What a marker records besides its files.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs completed; None in format 1.
        run: run id; empty if unknown.
        attempt: attempt number; 0 if unknown.
        metric: the monitored metric, if a validation has run.
        time: seconds since 1970; None in format 1.
    """

    global_step: int
    epoch: int | None = None
    run: str = ""
    attempt: int = 0
    metric: Metric | None = None
    time: float | None = None


@dataclass(frozen=True)
class Committed:
    """A checkpoint that exists.

    Attributes:
        path: its directory.
        global_step: optimizer steps done when it was taken.
        about: everything its marker records.
        files: its files by name.
        format: the format it was written in.
        changed_ns: when its directory last changed, in nanoseconds since 1970; 0 if there is no local directory.
    """

    path: Path
    global_step: int
    about: About = field(default_factory=lambda: About(0), compare=False)
    files: Mapping[str, Sum] = field(default_factory=dict, compare=False)
    format: int = field(default=FORMAT, compare=False)
    changed_ns: int = field(default=0, compare=False)

    @property
    def num_bytes(self) -> int:
        """Total size of its files."""
        return sum(entry.num_bytes for entry in self.files.values())


def write_marker(directory: int, about: About, files: Mapping[str, Sum]) -> None:
    """Commit a directory whose files are all written and synced.

    Args:
        directory: file descriptor of the directory; by now its path may lead to another process's directory.
        about: what the marker records about the state.
        files: all its files.

    Raises:
        OSError: the marker cannot be written, for example because the directory was removed.
    """
    metric = about.metric and {"name": about.metric.name, "value": about.metric.value, "mode": about.metric.mode}
    content: dict[str, Any] = {
        "format": FORMAT,
        "global_step": about.global_step,
        "epoch": about.epoch,
        "run": about.run,
        "attempt": about.attempt,
        "metric": metric,
        "time": time.time() if about.time is None else about.time,
        "checksum": KIND,
        "files": {name: [files[name].num_bytes, files[name].crc32] for name in sorted(files)},
    }
    content = plain_json(content)  # so that the checksum covers exactly what a reader parses
    write_synced(Path(MARKER), json.dumps({**content, "crc32": _own_sum(content)}), within=directory)
    os.fsync(directory)


def check(path: Path) -> Committed:
    """Check that a checkpoint is committed and complete, by its marker and file sizes.

    Raises:
        CheckpointError: it is not, or it has a newer format; the message says why.
    """
    itself = _look(path)
    if itself is None or not stat.S_ISDIR(itself.st_mode):
        raise CheckpointError(
            f"there is no checkpoint at {path}{': it is a file' if itself is not None else ''}",
            hint="give a run folder, or a directory under its checkpoints/",
        )
    found = replace(_read(path), changed_ns=itself.st_mtime_ns)
    for name, entry in found.files.items():
        file = _look(path / name)
        there = file.st_size if file is not None and stat.S_ISREG(file.st_mode) else None
        if there != entry.num_bytes:
            state = "is missing" if there is None else f"has {there} bytes"
            raise CheckpointError(
                f"checkpoint {path} is torn: {name} {state}, but its marker says {entry.num_bytes}",
                hint="resume from an earlier one",
            )
    return found


def faults(path: Path, files: Mapping[str, Sum] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint's files, all of them or only ``files``; empty if sound.

    Raises:
        CheckpointError: it is not committed, or a file has a different size.
    """
    found = check(path)
    told = []
    for name, entry in (found.files if files is None else files).items():
        if not entry.crc32:  # format 1 has none
            continue
        try:
            there = sum_of(path / name)
        except OSError as error:
            told.append(f"checkpoint {path} is damaged: {name} cannot be read: {error.strerror}")
            continue
        if there != entry:
            told.append(
                f"checkpoint {path} is damaged: {name} ({there.num_bytes:,} bytes) has checksum {there.crc32},"
                f" but its marker says {entry.crc32}"
            )
    return told


def committed(directory: Path) -> tuple[list[Committed], list[str]]:
    """Return a folder's checkpoints, oldest first, and why other directories in it do not count.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    found: list[Committed] = []
    passed_over: list[str] = []
    for path in _entries(directory):
        if path.name.startswith(".") or ABANDONED in path.name:
            continue
        try:
            itself = _look(path)
            if itself is not None and stat.S_ISDIR(itself.st_mode):
                found.append(check(path))
        except CheckpointError as error:
            if not _is_gone(path):
                passed_over.append(error.what)
    return sorted(found, key=lambda entry: (entry.global_step, entry.changed_ns)), passed_over


def abandoned(directory: Path) -> list[Committed]:
    """Return a folder's abandoned checkpoints by name, skipping those with unreadable markers.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    found = []
    for path in _entries(directory):
        if ABANDONED in path.name and not path.name.startswith("."):
            with suppress(CheckpointError):
                found.append(_read(path))
    return found


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint folder {directory} cannot be read: {error.strerror}",
            hint="make it readable, or use another run folder",
        ) from error


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _look(path: Path) -> os.stat_result | None:
    """Return a path's ``stat``; None if nothing exists there.

    Raises:
        CheckpointError: access is denied, or ``stat`` fails in another way.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a possible file name
        return None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error.strerror}", hint="make its folder readable"
        ) from error


def remove(path: Path) -> None:
    """Delete a checkpoint, its marker first, so that a partial deletion never counts as a checkpoint."""
    with suppress(FileNotFoundError):
        (path / MARKER).unlink()
        sync_directory(path)  # so that the marker stays deleted after a power failure
    shutil.rmtree(path, ignore_errors=True)


def free_path(directory: Path, name: str) -> Path:
    """Return ``directory / name``, with a number appended if that exists."""
    final, number = directory / name, 1
    while final.exists():
        number += 1
        final = directory / f"{name}.{number}"
    return final


def newer_format(path: Path | str, found: object) -> CheckpointError:
    """Return the error for a checkpoint written by a newer disttrain."""
    return CheckpointError(
        f"{path} has checkpoint format {found}, but this disttrain reads up to {FORMAT}",
        hint="install a newer disttrain",
    )


def _read(path: Path) -> Committed:
    try:
        text = read_text(path / MARKER)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} was never committed", hint="resume from an earlier one") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it {error}"
        raise CheckpointError(
            f"checkpoint {path} has a damaged {MARKER}: {reason}", hint="resume from an earlier one"
        ) from None
    return parse(text, path)


def parse(text: str, path: Path, *, shown: str = "") -> Committed:
    """Parse a marker.

    Args:
        text: its content.
        path: the checkpoint's directory.
        shown: how messages name the checkpoint; by default the path.

    Raises:
        CheckpointError: the marker is damaged, or has a newer format.
    """
    try:
        content = parse_json(text)
        number = _whole(content["format"])
        if number > FORMAT:
            raise newer_format(shown or path, number)
        return _first(path, content) if number == 1 else _second(path, content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(
            f"checkpoint {shown or path} has a damaged {MARKER}", hint="resume from an earlier one"
        ) from None


def _first(path: Path, content: Mapping[str, Any]) -> Committed:
    files = {_inside(name): Sum(_whole(size)) for name, size in content["files"].items()}
    step = _whole(content["global_step"])
    return Committed(path, step, About(step), files, 1)


def _second(path: Path, content: dict[str, Any]) -> Committed:
    if content.pop("crc32") != _own_sum(content):
        raise ValueError("the marker's own checksum does not match")
    files = {_inside(name): Sum(_whole(size), str(crc)) for name, (size, crc) in content["files"].items()}
    step, epoch, metric = _whole(content["global_step"]), content["epoch"], None
    if content["metric"] is not None:
        name, mode = as_text(content["metric"]["name"]), as_text(content["metric"]["mode"])
        metric = Metric(name, float(content["metric"]["value"]), mode)
    about = About(
        step,
        None if epoch is None else _whole(epoch),
        as_text(content["run"]),
        _whole(content["attempt"]),
        metric,
        as_number(content["time"]),
    )
    return Committed(path, step, about, files, _whole(content["format"]))


def _whole(value: object) -> int:
    """Return ``value`` if it is a count.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _inside(name: str) -> str:
    """Return ``name`` if it is a plain file name, which cannot lead outside the checkpoint's folder.

    Raises:
        ValueError: it is not.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is outside the checkpoint")
    return name


def _own_sum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
