"""Many shards at a time: one function over all of them in threads, with its progress on standard error.

Results come in the order of the items, as soon as they and those before them are there; the first exception
ends it, and what had not begun is left undone. Progress is a bar on a terminal and a line every half minute
elsewhere, so that a log stays readable. Cost: a few microseconds an item.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Final, TypeVar

from disttrain.terminal import say

T = TypeVar("T")
U = TypeVar("U")

_FEW: Final = 16
_CHUNK: Final = 64
_LINE_SECONDS: Final = 30.0


def together(
    function: Callable[[T], U], items: Iterable[T], *, threads: int = 8, quick: bool = False, told: str = ""
) -> Iterator[U]:
    """Results of a function over some items, in their order.

    Args:
        function: called in threads.
        items: what it is called with.
        threads: calls at a time.
        quick: a call takes microseconds where nothing waits: several are handed to a thread at once, and a few
            are called right here.
        told: what is being done, for the progress; none is shown where this is empty.
    """
    work = list(items)
    if quick and len(work) < _FEW:
        yield from map(function, work)
        return
    size = max(1, min(_CHUNK, len(work) // (4 * threads))) if quick else 1
    chunks = [work[start : start + size] for start in range(0, len(work), size)]
    with _progress(told, len(work)) as tick, ThreadPoolExecutor(threads, thread_name_prefix="disttrain-shards") as pool:

        def run(chunk: list[T]) -> list[U]:
            done = [function(item) for item in chunk]
            tick(len(chunk))
            return done

        for results in pool.map(run, chunks):
            yield from results


@contextmanager
def _progress(told: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what to call, from any thread, with the number of items done."""
    if not told:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(told, total).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # What is printed meanwhile goes above the bar, but never from a file or a pipe to the terminal.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task(told, total=total)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Progress as lines of a log: none for what is soon done."""

    def __init__(self, told: str, total: int) -> None:
        self._told, self._total, self._done = told, total, 0
        self._next = time.monotonic() + _LINE_SECONDS
        self._lock = Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _LINE_SECONDS
                say(f"{self._told}: {self._done:,} of {self._total:,}", err=True)
