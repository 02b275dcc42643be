"""How each rank ended, recorded for the launcher.

torchrun exits with 1 however its ranks ended. ``disttrain launch`` passes a folder in an environment variable. There
each rank records its exit code, whether it only followed another rank's failure, and the message of a user's mistake,
which the launcher prints once, below torchrun's report. Without the folder nothing is recorded. Cost: one small file
per rank.

Under NCCL, a rank that fails alone may never exit: its GPU still runs kernels that wait for the other ranks, and
freeing the device waits for them. :func:`ends_within` then ends the process with its error.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from disttrain.errors import HUNG_CODE, OUT_OF_MEMORY_CODE, PREEMPTED_CODE, DisttrainError, RankError
from disttrain.system.files import write_atomically
from disttrain.system.reading import read_record
from disttrain.system.terminal import tell

VARIABLE: Final = "DISTTRAIN_ENDINGS"
"""Environment variable that holds the folder's path."""
TEARDOWN_SECONDS: Final = 60.0
"""How long a failed rank may take to free its device and process groups."""
_BY_WEIGHT: Final = (OUT_OF_MEMORY_CODE, HUNG_CODE, 1, PREEMPTED_CODE, 2, 130)
"""Precedence of exit codes: if ranks end differently, the run returns the first of these."""


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: the rank.
        code: its exit code.
        follows: whether another rank's failure ended it.
        message: a user's mistake, for the launcher to print.
    """

    rank: int
    code: int
    follows: bool = False
    message: str = ""


def note_ending(code: int, *, follows: bool = False, message: str = "") -> bool:
    """Record how this rank ends, unless already recorded; return whether a launcher will read it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return False
    rank = os.environ.get("RANK", "0")
    path = Path(folder) / f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{rank}"
    with suppress(OSError, ValueError):  # the launcher may be gone, and its folder with it
        if not path.exists():
            write_atomically(path, json.dumps(asdict(Ending(int(rank), code, follows, message))))
        return True
    return False


def read_endings(folder: Path) -> list[Ending]:
    """Return how the ranks of the last attempt ended, in rank order; killed ranks have no record."""
    attempts: dict[int, list[Ending]] = {}
    for path in folder.glob("*-*"):
        with suppress(OSError, ValueError, TypeError):
            attempts.setdefault(int(path.name.partition("-")[0]), []).append(Ending(**read_record(path)))
    return sorted(attempts[max(attempts)], key=lambda ending: ending.rank) if attempts else []


@contextmanager
def ends_within(error: BaseException | None) -> Iterator[None]:
    """End the process if the body, which may wait for other ranks forever, takes more than a minute after an error.

    Args:
        error: the error that this rank has failed with; None changes nothing.
    """
    with nullcontext() if error is None else in_time(TEARDOWN_SECONDS, _end, error):
        yield


@contextmanager
def in_time(seconds: float, late: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Call a function in a separate thread if the body has not finished after some seconds."""
    timer = threading.Timer(seconds, late, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(error: BaseException) -> None:
    """Print the error if nothing else will, and exit with its code."""
    rank, code, text = os.environ.get("RANK", "0"), _code(error), str(error)
    if isinstance(error, DisttrainError):
        follows = isinstance(error, RankError)  # another rank reports it
        told = note_ending(code, follows=follows, message="" if follows else text) or follows
    else:
        told = False
        note_ending(code, follows=any(kind.__name__ == "DistError" for kind in type(error).__mro__))
        text = "".join(traceback.format_exception(error)).rstrip()
    if not told:
        tell(f"error (rank {rank}): {text}")
    tell(
        f"rank {rank} is forced to exit {TEARDOWN_SECONDS:g} s after its error: it cannot free its device, which"
        " waits for the other ranks"
    )
    os._exit(code)


def _code(error: BaseException) -> int:
    if isinstance(error, DisttrainError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def code_of(endings: Sequence[Ending], launcher_code: int) -> int:
    """Return the exit code of a run whose launcher has ended.

    Args:
        endings: how the ranks ended.
        launcher_code: torchrun's exit code; -n if signal n killed it.
    """
    if launcher_code == 0:
        return 0
    own = [ending.code for ending in endings if ending.code and not ending.follows]
    if own:
        return next((code for code in _BY_WEIGHT if code in own), own[0])
    return 128 - launcher_code if launcher_code < 0 else launcher_code
