"""The exceptions that disttrain raises for a user's mistake or a fault in his data.

Each one says what is wrong, where (file, field, sample key, byte offset, rank) and how to mend it; the
command line prints it without a traceback and ends with exit code 2. Anything else that escapes is a bug: in the user's
own code, which keeps its traceback (:func:`passed_through_users_code`), or in disttrain, whose goes into a file.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable
from typing import Final

_LIBRARIES: Final = frozenset(
    [
        *("disttrain", "torch", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "jsonargparse"),
        *("numpy", "fsspec", "rich", "yaml", "tensorboard", "matplotlib", "safetensors", "psutil", "webdataset"),
        *("braceexpand", "PIL", "pyarrow", "sklearn", "aiohttp", "s3fs", "gcsfs", "botocore", "typeshed_client"),
    ]
)
PREEMPTED_CODE: Final = 75
"""Exit code of a run that was stopped from outside and goes on when it is started again (``EX_TEMPFAIL``)."""
HUNG_CODE: Final = 76
"""Exit code of a run in which nothing moved any more; a launcher that restarts is to restart it."""
OUT_OF_MEMORY_CODE: Final = 77
"""Exit code of a rank that ran out of memory for a micro batch, of which the next attempt takes a smaller one."""


class DisttrainError(Exception):
    """Base of all errors that a user can mend.

    Args:
        what: one sentence that says what is wrong and where.
        mend: how to mend it, if that is known.
    """

    exit_code = 2

    def __init__(self, what: str, *, mend: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.what}\n  mend: {self.mend}" if self.mend else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # A raised error travels between ranks and from worker processes, keyword argument included.
        return (_rebuild, (type(self), self.what, self.mend))


class ConfigError(DisttrainError, ValueError):
    """A setting that cannot work: wrong value, unknown name, sizes that do not divide."""


class DataError(DisttrainError):
    """Data that cannot be used as asked: missing files, absent fields, too few samples."""


class ShardError(DataError):
    """A shard that cannot be read: not a tar, truncated, duplicate keys, or changed under its index."""


class DecodeError(DataError):
    """A sample whose bytes are not what the declared decoder expects."""


class CheckpointError(DisttrainError):
    """A checkpoint that cannot be saved, read, or used for this run."""


class RankError(DisttrainError):
    """A failure on some ranks that every rank is told of, so that all stop together."""


class OutOfMemoryError(DisttrainError):
    """A rank ran out of memory; the next attempt takes a smaller micro batch (``data.micro_batch_size: auto``)."""

    exit_code = OUT_OF_MEMORY_CODE


class JoinError(DisttrainError):
    """Ranks that did not find each other in time."""


class Preempted(SystemExit):
    """Training was stopped from outside, at a step boundary, and what it had is saved.

    It ends the process with :data:`PREEMPTED_CODE` and without a traceback, unless it is caught.

    Args:
        message: step, cause and checkpoint, in one sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


def passed_through_users_code(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, was raised in or passed through a user's own code.

    That is every module but those of disttrain, of the libraries that it uses, and of Python.
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    modules = {
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for one in seen
        for frame, _ in traceback.walk_tb(one.__traceback__)
    }
    # A module that does not even compile has no frame.
    return bool(modules - _LIBRARIES - sys.stdlib_module_names) or any(isinstance(one, SyntaxError) for one in seen)


def _rebuild(kind: type[DisttrainError], what: str, mend: str) -> DisttrainError:
    return kind(what, mend=mend)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or what kind of error it is."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for an error message: the nearest known name, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none are known"
