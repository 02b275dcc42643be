"""``python -m disttrain.commands.torchrun``: torchrun, without the traceback that it prints when a rank fails.

It takes torchrun's own options and does what torchrun does. A failed rank has printed its own error by then, and
torchrun's traceback of thirty lines, which is about torchrun and not about the run, would push that error off the
screen. What torchrun logs of each failed rank, its exit code or the signal that killed it, stays.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Run torchrun with the arguments of this process.

    Returns:
        0, or 1 where a rank failed or a signal ended the ranks, as torchrun itself.
    """
    try:
        torchrun()
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
