"""Which checkpoints of a folder exist: the marker ``COMMITTED`` and what it says.

A checkpoint is a directory that holds a marker, written last, which lists every file with its size and checksum
and says whose state this is: step, epoch, run, attempt, the monitored metric. Without a sound marker, or with a
file of another size, a directory is torn and is passed over with a reason. Costs a look at the files' sizes;
their contents are read where that is asked for, and by all ranks in :mod:`disttrain.checkpoint.verify`. Needs no torch.
Looking takes no lock: a checkpoint that another process removes meanwhile is one that is not there.

Formats: 1 listed sizes alone; 2 added checksums, run, attempt and metric. Every later disttrain reads both.
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

from disttrain.checkpoint.checksum import KIND, Sum, sum_of
from disttrain.errors import CheckpointError
from disttrain.files import plain_json, sync_directory, write_synced
from disttrain.reading import as_number, as_text, parse_json, read_text

FORMAT: Final = 3
MARKER: Final = "COMMITTED"
LATEST: Final = "LATEST"
META: Final = "meta.pt"
TEMPORARY: Final = ".tmp"
ABANDONED: Final = ".abandoned"
"""What is added to the name of a checkpoint that the run does not go on from; it does not count then."""


@dataclass(frozen=True)
class Metric:
    """The monitored metric at a checkpoint."""

    name: str
    value: float
    mode: str


@dataclass(frozen=True)
class About:
    """What a marker says besides its files.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs completed; None in format 1.
        run: id of the run; empty where it is not known.
        attempt: number of the attempt; 0 where it is not known.
        metric: the monitored metric, where a validation came before.
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
        about: all that its marker says.
        files: its files by name.
        format: the format that it was written in.
        changed_ns: when its directory last changed, in nanoseconds since 1970; 0 where there is none to look at.
    """

    path: Path
    global_step: int
    about: About = field(default_factory=lambda: About(0), compare=False)
    files: Mapping[str, Sum] = field(default_factory=dict, compare=False)
    format: int = field(default=FORMAT, compare=False)
    changed_ns: int = field(default=0, compare=False)

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.num_bytes for entry in self.files.values())


def write_marker(directory: int, about: About, files: Mapping[str, Sum]) -> None:
    """Commit a directory whose files are all written and synced.

    Args:
        directory: the open directory. Not its path: there, another process may have put one of its own meanwhile.
        about: what the marker says of the state.
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
    content = plain_json(content)  # its own checksum is that of what a reader parses
    write_synced(Path(MARKER), json.dumps({**content, "crc32": _own_sum(content)}), within=directory)
    os.fsync(directory)


def check(path: Path) -> Committed:
    """Make sure that a checkpoint is committed and whole by its marker and its files' sizes.

    Raises:
        CheckpointError: it is not, or it is of a newer format; the message says why.
    """
    itself = _look(path)
    if itself is None or not stat.S_ISDIR(itself.st_mode):
        raise CheckpointError(
            f"there is no checkpoint {path}{': it is a file' if itself is not None else ''}",
            mend="name a run folder, or a directory under its checkpoints/",
        )
    found = replace(_read(path), changed_ns=itself.st_mtime_ns)
    for name, entry in found.files.items():
        file = _look(path / name)
        there = file.st_size if file is not None and stat.S_ISREG(file.st_mode) else None
        if there != entry.num_bytes:
            state = "is missing" if there is None else f"has {there} bytes"
            raise CheckpointError(
                f"checkpoint {path} is torn: {name} {state}, its marker says {entry.num_bytes}",
                mend="resume from an earlier one",
            )
    return found


def faults(path: Path, files: Mapping[str, Sum] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, all of them or some; empty for a sound one.

    Raises:
        CheckpointError: it is not committed, or a file has another size.
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
                f"checkpoint {path} is damaged: the {there.num_bytes:,} bytes of {name} have checksum {there.crc32},"
                f" its marker says {entry.crc32}"
            )
    return told


def committed(directory: Path) -> tuple[list[Committed], list[str]]:
    """The checkpoints of a folder, oldest first, and why other directories in it are none.

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
    """The checkpoints of a folder that the run did not go on from, by name; as far as their markers can be read.

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
            f"the folder of checkpoints {directory} cannot be read: {error.strerror}",
            mend="make it readable, or name another run folder",
        ) from error


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _look(path: Path) -> os.stat_result | None:
    """What the system says of a path; None where nothing is there any more.

    Raises:
        CheckpointError: it may not be looked at.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have that name
        return None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error.strerror}", mend="make its folder readable"
        ) from error


def remove(path: Path) -> None:
    """Delete a checkpoint: its marker first, so that an interrupted deletion leaves no half that counts."""
    with suppress(FileNotFoundError):
        (path / MARKER).unlink()
        sync_directory(path)  # nor does a power cut bring it back
    shutil.rmtree(path, ignore_errors=True)


def free_path(directory: Path, name: str) -> Path:
    """A directory of that name that does not exist yet; a number is added where it does."""
    final, number = directory / name, 1
    while final.exists():
        number += 1
        final = directory / f"{name}.{number}"
    return final


def newer_format(path: Path | str, found: object) -> CheckpointError:
    """The error for a checkpoint that was written by a later disttrain."""
    return CheckpointError(
        f"{path} has checkpoint format {found}, this disttrain reads up to {FORMAT}", mend="install a newer disttrain"
    )


def _read(path: Path) -> Committed:
    try:
        text = read_text(path / MARKER)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} was never committed", mend="resume from an earlier one") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it {error}"
        raise CheckpointError(
            f"checkpoint {path} has a damaged {MARKER}: {reason}", mend="resume from an earlier one"
        ) from None
    return parse(text, path)


def parse(text: str, path: Path, *, shown: str = "") -> Committed:
    """What a marker says.

    Args:
        text: the marker's.
        path: the checkpoint's directory.
        shown: what messages call it, if not by that.

    Raises:
        CheckpointError: the marker is damaged, or of a newer format.
    """
    try:
        content = parse_json(text)
        number = _whole(content["format"])
        if number > FORMAT:
            raise newer_format(shown or path, number)
        return _first(path, content) if number == 1 else _second(path, content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(
            f"checkpoint {shown or path} has a damaged {MARKER}", mend="resume from an earlier one"
        ) from None


def _first(path: Path, content: Mapping[str, Any]) -> Committed:
    files = {_inside(name): Sum(_whole(size)) for name, size in content["files"].items()}
    step = _whole(content["global_step"])
    return Committed(path, step, About(step), files, 1)


def _second(path: Path, content: dict[str, Any]) -> Committed:
    if content.pop("crc32") != _own_sum(content):
        raise ValueError("the marker's own checksum is another")
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
    """A count.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _inside(name: str) -> str:
    """The name of a file in a checkpoint's own folder, and nowhere else.

    Raises:
        ValueError: it leads elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not within the checkpoint")
    return name


def _own_sum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
