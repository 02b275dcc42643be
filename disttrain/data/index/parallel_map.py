"""Apply a function to many shards in threads, with progress on standard error.

Results are yielded in item order, as soon as they and all earlier ones are ready. The first exception ends the
iteration and cancels calls that have not started. Progress is a bar on a terminal, and one line every half minute
elsewhere, so that logs stay readable. Cost: a few microseconds per item.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Final, TypeVar

from disttrain.system.terminal import say

T = TypeVar("T")
U = TypeVar("U")

_FEW: Final = 16
_CHUNK: Final = 64
_LINE_SECONDS: Final = 30.0


def together(
    function: Callable[[T], U], items: Iterable[T], *, threads: int = 8, quick: bool = False, label: str = ""
) -> Iterator[U]:
    """Yield the results of a function over some items, in order.

    Args:
        function: called in threads.
        items: its arguments.
        threads: number of concurrent calls.
        quick: calls usually take microseconds, so each thread gets several at once, and a few items run in the caller.
        label: description for the progress display; no progress if empty.
    """
    work = list(items)
    if quick and len(work) < _FEW:
        yield from map(function, work)
        return
    size = max(1, min(_CHUNK, len(work) // (4 * threads))) if quick else 1
    chunks = [work[start : start + size] for start in range(0, len(work), size)]
    with (
        _progress(label, len(work)) as tick,
        ThreadPoolExecutor(threads, thread_name_prefix="disttrain-shards") as pool,
    ):

        def run(chunk: list[T]) -> list[U]:
            done = [function(item) for item in chunk]
            tick(len(chunk))
            return done

        for results in pool.map(run, chunks):
            yield from results


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a thread-safe function that takes the number of items done."""
    if not label:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(label, total).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Rich reprints stdout above the bar, on the terminal: not wanted if stdout is a file or a pipe.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Progress as log lines; none for short work."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._next = time.monotonic() + _LINE_SECONDS
        self._lock = Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _LINE_SECONDS
                say(f"{self._label}: {self._done:,} of {self._total:,}", err=True)
