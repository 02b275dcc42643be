"""Heartbeats of long work between steps: saving, copying, verifying and fetching checkpoints and shards.

Such work calls :func:`beat` after each part. While no step completes, the watchdog checks whether the count has changed
(:mod:`disttrain.callbacks.watchdog.callback`). Cost: one addition.
"""

from __future__ import annotations

from typing import Final

_COUNT: Final = [0]


def beat() -> None:
    """Record that a part of some long work is done, such as a block of a file. Any thread may call this."""
    _COUNT[0] += 1  # a race may lose a count, which is harmless: only a change matters


def beats() -> int:
    """Return the approximate number of beats in this process."""
    return _COUNT[0]
