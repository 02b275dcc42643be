"""Signs of life of what takes long beside the steps: saving, copying, verifying and fetching checkpoints and shards.

Whoever does such work calls :func:`beat` after each part of it; the watchdog of a run in which no step passes looks
whether the number has moved (:mod:`disttrain.callbacks.watchdog`). Cost: one addition.
"""

from __future__ import annotations

from typing import Final

_COUNT: Final = [0]


def beat() -> None:
    """A part of some long work is done, such as a block of a file. May be called by any thread."""
    _COUNT[0] += 1  # two threads at once may count as one; that it moves is all that matters


def beats() -> int:
    """How many there were in this process, about."""
    return _COUNT[0]
