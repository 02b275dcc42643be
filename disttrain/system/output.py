"""Treat stdout and stderr as lossy logs: a closed, full or unread stream does not end training.

Inside :func:`lossy_output`, text that cannot be printed is dropped and counted; :func:`dropped_output` returns the
counts for the run's record. A permanently broken pipe or terminal is replaced by the null device, also for C code and
child processes. Characters outside the stream's encoding are escaped. Cost: one extra call per print.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

_FOR_NOW: Final = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
"""Errors after which a later write may succeed."""
_dropped: Final[dict[str, dict[str, Any]]] = {}


class _Lossy:
    """A text stream whose writes never fail; everything else is delegated to the wrapped stream."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Write or drop ``text``."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # a closed stream is a ValueError
            self._drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write or drop each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush to the OS, or drop."""
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
    """Drop what cannot be printed to the named streams (default: ``stdout`` and ``stderr``).

    Args:
        names: the streams.
        last: nothing is printed afterwards, so text still buffered for a full disk must not fail at process exit.
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
            if getattr(sys, name) is stream:  # unless other code has replaced it meanwhile
                setattr(sys, name, former[name])


def dropped_output() -> dict[str, dict[str, Any]]:
    """Return how many writes to ``stdout`` and ``stderr`` this process has dropped, with the first error of each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Lossy):
            stream.flush()
    return {name: dict(entry) for name, entry in _dropped.items()}


def silence(stream: Any) -> None:
    """Permanently redirect a stream's descriptor to the null device; buffered text is discarded."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def open_descriptors() -> None:
    """Open the null device in place of a closed standard input, output or error.

    Otherwise the next file opened gets that descriptor, and receives what C code or a child process prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # POSIX: gets the lowest free descriptor
