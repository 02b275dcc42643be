"""Exceptions for user mistakes and faulty data.

Each one states what is wrong, where (file, field, sample key, byte offset, rank), and how to fix it. The command line
prints it without a traceback and exits with code 2. Anything else that escapes is a bug: in the user's own code, which
keeps its traceback (:func:`passed_through_users_code`), or in disttrain, whose traceback is saved to a file.
"""

from __future__ import annotations

import difflib
import sys
import traceback
import warnings
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
"""Exit code of a run stopped from outside, which resumes when restarted (``EX_TEMPFAIL``)."""
HUNG_CODE: Final = 76
"""Exit code of a run that made no more progress; a restarting launcher should restart it."""
OUT_OF_MEMORY_CODE: Final = 77
"""Exit code of a rank that ran out of memory for a micro batch; the next attempt uses a smaller one."""


class DisttrainError(Exception):
    """Base class of all errors that a user can fix.

    Args:
        what: one sentence that says what is wrong and where.
        hint: a hint on how to fix it, if known.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    @property
    def mend(self) -> str:
        """The former name of :attr:`hint`; goes with version 0.2."""
        warnings.warn("DisttrainError.mend is now called hint", DeprecationWarning, stacklevel=2)
        return self.hint

    def __str__(self) -> str:
        return f"{self.what}\n  hint: {self.hint}" if self.hint else self.what

    def __reduce__(self) -> tuple[object, ...]:
        # Errors are pickled between ranks and from worker processes; the default would lose the keyword argument.
        return (_rebuild, (type(self), self.what, self.hint))


class ConfigError(DisttrainError, ValueError):
    """A setting that cannot work: a wrong value, an unknown name, sizes that do not divide."""


class DataError(DisttrainError):
    """Data that cannot be used as requested: missing files, missing fields, too few samples."""


class ShardError(DataError):
    """A shard that cannot be read: not a tar, truncated, duplicate keys, or changed since it was indexed."""


class DecodeError(DataError):
    """A sample whose bytes are not what the declared decoder expects."""


class CheckpointError(DisttrainError):
    """A checkpoint that cannot be saved, read, or used for this run."""


class RankError(DisttrainError):
    """A failure on some ranks, raised on every rank so that all stop together."""


class OutOfMemoryError(DisttrainError):
    """A rank ran out of memory; the next attempt uses a smaller micro batch (``data.micro_batch_size: auto``)."""

    exit_code = OUT_OF_MEMORY_CODE


class JoinError(DisttrainError):
    """Ranks did not find each other in time."""


class Preempted(SystemExit):
    """Training was stopped from outside at a step boundary, and its state is saved.

    Unless caught, it ends the process with :data:`PREEMPTED_CODE` and no traceback.

    Args:
        message: step, cause and checkpoint, in one sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


def passed_through_users_code(error: BaseException) -> bool:
    """Return whether an error, or one in its cause chain, was raised in or passed through the user's own code.

    That is any module outside disttrain, the libraries it uses, and the Python standard library.
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
    # A module that fails to compile has no frame.
    return bool(modules - _LIBRARIES - sys.stdlib_module_names) or any(isinstance(one, SyntaxError) for one in seen)


def _rebuild(kind: type[DisttrainError], what: str, hint: str) -> DisttrainError:
    return kind(what, hint=hint)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name for an error message, or list all of them if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none are known"
