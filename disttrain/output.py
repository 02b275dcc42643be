"""Standard output and error as logs like any other: one that is closed, full or read no more ends no training.

Inside of :func:`lossy_output`, what cannot be printed is dropped and counted, and :func:`dropped_output` says how much,
for the run's record. A pipe or terminal that is gone for good is replaced by the null device, also for what C code and
child processes print. Characters that the terminal's encoding lacks are written as escapes. Cost: a call per print.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

_FOR_NOW: Final = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""Errors after which the next write may succeed."""
_dropped: Final[dict[str, dict[str, Any]]] = {}


class _Lossy:
    """A text stream whose writes never fail; all else is the stream's own."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Write or drop."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # a closed stream is a ValueError
            self._drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write or drop each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand it to the system, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        told = (error.strerror if isinstance(error, OSError) else None) or str(error)
        entry = _dropped.setdefault(self._name, {"writes": 0, "error": told})
        entry["writes"] += 1
        if isinstance(error, OSError) and error.errno not in _FOR_NOW:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_output(*names: str, last: bool = False) -> Iterator[None]:
    """Let what cannot be printed be dropped, to the streams named: ``stdout`` and ``stderr`` by default.

    Args:
        names: the streams.
        last: nothing is printed afterwards: what a full disk has kept back does not fail when the process ends.
    """
    former = {name: getattr(sys, name) for name in names or ("stdout", "stderr")}
    former = {name: stream for name, stream in former.items() if stream is not None and not isinstance(stream, _Lossy)}
    made = {name: _Lossy(stream, name) for name, stream in former.items()}
    for name, stream in made.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in made.items():
            stream.flush()
            if last and name in _dropped:
                silence(former[name])
            if getattr(sys, name) is stream:  # not what somebody has put there meanwhile
                setattr(sys, name, former[name])


def dropped_output() -> dict[str, dict[str, Any]]:
    """How many writes to ``stdout`` and ``stderr`` were dropped in this process so far, and the first error of each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Lossy):
            stream.flush()
    return {name: dict(entry) for name, entry in _dropped.items()}


def silence(stream: Any) -> None:
    """Put the null device in the place of a stream's descriptor, for good; what is buffered goes there."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def open_descriptors() -> None:
    """Put the null device where standard input, output or error was closed.

    Else the next file that is opened takes its number, and what C code or a child process prints goes into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # the lowest number that is free
