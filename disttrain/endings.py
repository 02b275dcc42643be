"""How each rank ended, noted for the launcher.

torchrun ends with 1 whichever way its ranks ended. ``disttrain launch`` names a folder in the environment; each rank
leaves its exit code there, whether it only followed another rank's failure, and a user's mistake in words, which the
launcher then prints once, below torchrun's report. Without that folder nothing is noted. Cost: one small file a rank.

A rank that fails alone under NCCL may not come to its end: its device still runs kernels that wait for the other ranks,
and whatever frees the device waits for them. :func:`ends_within` ends the process then, with its error.
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
from disttrain.files import write_atomically
from disttrain.reading import read_record
from disttrain.terminal import tell

VARIABLE: Final = "DISTTRAIN_ENDINGS"
"""The environment variable that names the folder."""
TEARDOWN_SECONDS: Final = 60.0
"""How long a rank that has failed may take to free its device and its process groups."""
_BY_WEIGHT: Final = (OUT_OF_MEMORY_CODE, HUNG_CODE, 1, PREEMPTED_CODE, 2, 130)
"""Which of several codes is that of the run: ranks that do not end the same way follow the first of these."""


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: which one.
        code: its exit code.
        follows: whether it ended because of another rank.
        message: a user's mistake, for the launcher to print.
    """

    rank: int
    code: int
    follows: bool = False
    message: str = ""


def note_ending(code: int, *, follows: bool = False, message: str = "") -> bool:
    """Note how this rank ends, unless that is noted already; whether there is a launcher that reads it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return False
    rank = os.environ.get("RANK", "0")
    path = Path(folder) / f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{rank}"
    with suppress(OSError, ValueError):  # the launcher may be gone
        if not path.exists():
            write_atomically(path, json.dumps(asdict(Ending(int(rank), code, follows, message))))
        return True
    return False


def read_endings(folder: Path) -> list[Ending]:
    """How the ranks of the last attempt ended, by rank; those that were killed have left nothing."""
    attempts: dict[int, list[Ending]] = {}
    for path in folder.glob("*-*"):
        with suppress(OSError, ValueError, TypeError):
            attempts.setdefault(int(path.name.partition("-")[0]), []).append(Ending(**read_record(path)))
    return sorted(attempts[max(attempts)], key=lambda ending: ending.rank) if attempts else []


@contextmanager
def ends_within(error: BaseException | None) -> Iterator[None]:
    """Around what may wait for other ranks for ever: end the process after a minute of it, if it has failed anyway.

    Args:
        error: why it has failed; None changes nothing.
    """
    with nullcontext() if error is None else in_time(TEARDOWN_SECONDS, _end, error):
        yield


@contextmanager
def in_time(seconds: float, late: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Call a function, in a thread of its own, if what is inside has not ended after some seconds."""
    timer = threading.Timer(seconds, late, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(error: BaseException) -> None:
    """Print what nobody else comes to print, and end with the error's code."""
    rank, code, text = os.environ.get("RANK", "0"), _code(error), str(error)
    if isinstance(error, DisttrainError):
        follows = isinstance(error, RankError)  # another rank tells
        told = note_ending(code, follows=follows, message="" if follows else text) or follows
    else:
        told = False
        note_ending(code, follows=any(kind.__name__ == "DistError" for kind in type(error).__mro__))
        text = "".join(traceback.format_exception(error)).rstrip()
    if not told:
        tell(f"error (rank {rank}): {text}")
    tell(
        f"rank {rank} ends by force, {TEARDOWN_SECONDS:g} s after its error: it cannot free its device, which waits for"
        " the other ranks"
    )
    os._exit(code)


def _code(error: BaseException) -> int:
    if isinstance(error, DisttrainError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def code_of(endings: Sequence[Ending], launcher_code: int) -> int:
    """The exit code of a run whose launcher has ended.

    Args:
        endings: those of the ranks.
        launcher_code: torchrun's exit code; -n where signal n killed it.
    """
    if launcher_code == 0:
        return 0
    own = [ending.code for ending in endings if ending.code and not ending.follows]
    if own:
        return next((code for code in _BY_WEIGHT if code in own), own[0])
    return 128 - launcher_code if launcher_code < 0 else launcher_code
