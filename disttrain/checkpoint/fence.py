"""Which attempt may publish checkpoints: the newest one that began in the folder.

Rank 0 of every attempt writes its own random token into the file ``ATTEMPT`` of the checkpoints' folder when it
begins, and moves away what earlier attempts have left unfinished. It reads the file again before each step that
makes a checkpoint visible. So a process of an earlier attempt that is still alive, on a node that was cut off
say, is refused; and where it was stopped between the look and the step, the directory that it would rename or
mark is no longer there. The file also holds the id of the run, by which another run's checkpoints are told.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from disttrain.checkpoint.marker import ABANDONED, LATEST, MARKER, TEMPORARY
from disttrain.errors import CheckpointError
from disttrain.files import make_folder, sync_directory, write_synced
from disttrain.reading import read_json, read_record

FENCE: Final = "ATTEMPT"
_GONE: Final = ".gone-"
_OWN_NAME: Final = re.compile(rf"step-\d{{8,}}(\.\d+)?({re.escape(ABANDONED)}(\.\d+)?)?")


class FencedError(CheckpointError):
    """A newer attempt has taken this run over, so this one may not publish anything."""


@dataclass(frozen=True)
class Attempt:
    """A process group's try at a run.

    Attributes:
        run: id of the run, the same for all its attempts.
        number: counts the attempts of a folder from 1.
        token: what only this attempt knows.
    """

    run: str
    number: int
    token: str

    @property
    def label(self) -> str:
        """A short name that no other attempt has."""
        return f"a{self.number}-{self.token}"


def run_of(directory: Path) -> str:
    """Id of the run that a folder of checkpoints belongs to; empty where it is not known."""
    return str(read_record(directory / FENCE).get("run", ""))


def claim(directory: Path, *, run: str = "", after: int = 0) -> Attempt:
    """Begin an attempt in a folder of checkpoints, and move away what earlier ones left unfinished. Rank 0 only.

    Args:
        directory: the folder; it is made if it is not there.
        run: id of the run where the folder does not know it; by default a new one.
        after: the number of an attempt elsewhere that came before.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        make_folder(directory)
        was = read_record(directory / FENCE)
        number = was.get("number", 0)
        attempt = Attempt(
            run=str(was.get("run") or run or secrets.token_hex(6)),
            number=max(number if isinstance(number, int) else 0, after) + 1,
            token=secrets.token_hex(4),
        )
        who = {"host": platform.node(), "pid": os.getpid(), "time": time.time()}
        write_synced(directory / FENCE, json.dumps({**asdict(attempt), **who}) + "\n")
        sync_directory(directory)
        _clear(directory, attempt)
    except OSError as error:
        raise CheckpointError(
            f"the folder of checkpoints {directory} cannot be written: {error.strerror}",
            mend="set trainer.run_dir to a folder that you may write to",
        ) from error
    return attempt


def guard(directory: Path, attempt: Attempt | None) -> None:
    """Go on only as the newest attempt. Rank 0 only; without an attempt, nothing is checked.

    Raises:
        FencedError: another attempt has begun since, or the folder was moved away.
        OSError: the file cannot be read.
    """
    if attempt is None:
        return
    try:
        content = read_json(directory / FENCE)
        there = content if isinstance(content, dict) else {"number": "?"}
    except (FileNotFoundError, NotADirectoryError):
        there = {}
    except ValueError:
        there = {"number": "?"}
    if there.get("token") == attempt.token:
        return
    if there:
        who = f"attempt {there.get('number')} (host {there.get('host')}, process {there.get('pid')}) has taken it over"
    else:
        who = f"{directory / FENCE} is gone, so the folder was moved or cleared"
    raise FencedError(
        f"this process is attempt {attempt.number} of the run in {directory.parent}, but {who}; it publishes nothing",
        mend="leave the newer attempt to itself; this process was forgotten, and ends here",
    )


def _clear(directory: Path, attempt: Attempt) -> None:
    """Take out of reach, then delete, what no marker makes a checkpoint, and what was to replace ``LATEST``."""
    for path in directory.glob(f".{LATEST}.*"):
        path.unlink(missing_ok=True)
    unfinished = [
        path
        for path in directory.iterdir()
        if path.is_dir()
        and (
            path.name.endswith(TEMPORARY)
            or path.name.startswith(_GONE)
            or (_OWN_NAME.fullmatch(path.name) and not (path / MARKER).exists())
        )
    ]
    for number, path in enumerate(unfinished):
        # Renamed first: from then on an older process can neither rename it nor write a marker into it.
        gone = directory / f"{_GONE}{attempt.label}-{number}"
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            continue  # its writer was quicker: published before, or cleared by another attempt
        shutil.rmtree(gone, ignore_errors=True)
