"""Fencing: only the newest attempt in a folder may publish checkpoints.

When an attempt begins, its rank 0 writes a random token to the file ``ATTEMPT`` in the checkpoint folder and moves
away whatever earlier attempts left unfinished. It rereads the file before each step that makes a checkpoint visible.
A process of an earlier attempt that is still alive (say, on a node that was cut off) is therefore rejected. If it was
suspended between the check and the step, the directory that it would rename or mark no longer exists. The file also
holds the run id, which tells the checkpoints of different runs apart.
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

from disttrain.checkpoint.format.marker import ABANDONED, LATEST, MARKER, TEMPORARY
from disttrain.errors import CheckpointError
from disttrain.system.files import make_folder, sync_directory, write_synced
from disttrain.system.reading import read_json, read_record

FENCE: Final = "ATTEMPT"
_GONE: Final = ".gone-"
_OWN_NAME: Final = re.compile(rf"step-\d{{8,}}(\.\d+)?({re.escape(ABANDONED)}(\.\d+)?)?")


class FencedError(CheckpointError):
    """A newer attempt has taken over this run, so this one may not publish anything."""


@dataclass(frozen=True)
class Attempt:
    """One life of a run's processes.

    Attributes:
        run: run id, the same for all attempts.
        number: attempt number in the folder, from 1.
        token: random secret of this attempt.
    """

    run: str
    number: int
    token: str

    @property
    def label(self) -> str:
        """A short name unique to this attempt."""
        return f"a{self.number}-{self.token}"


def run_of(directory: Path) -> str:
    """Return the run id of a checkpoint folder; empty if unknown."""
    return str(read_record(directory / FENCE).get("run", ""))


def claim(directory: Path, *, run: str = "", after: int = 0) -> Attempt:
    """Begin an attempt in a checkpoint folder, and move away what earlier ones left unfinished. Rank 0 only.

    Args:
        directory: the folder; created if missing.
        run: run id to use if the folder has none; by default a new one.
        after: number of an earlier attempt recorded elsewhere.

    Raises:
        CheckpointError: the folder is not writable.
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
            f"the checkpoint folder {directory} cannot be written: {error.strerror}",
            hint="set trainer.run_dir to a folder that you can write to",
        ) from error
    return attempt


def guard(directory: Path, attempt: Attempt | None) -> None:
    """Raise unless this is the newest attempt; without an attempt, check nothing. Rank 0 only.

    Raises:
        FencedError: a newer attempt has begun, or the folder was moved away.
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
        f"this process is attempt {attempt.number} of the run in {directory.parent}, but {who};"
        " it will not publish anything",
        hint="let the newer attempt run; this process is stale and exits",
    )


def _clear(directory: Path, attempt: Attempt) -> None:
    """Rename, then delete, directories without a marker; also delete temporary files of ``LATEST``."""
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
        # Rename first: from then on an older process can neither rename it nor write a marker into it.
        gone = directory / f"{_GONE}{attempt.label}-{number}"
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            continue  # its writer published it first, or another attempt cleared it
        shutil.rmtree(gone, ignore_errors=True)
