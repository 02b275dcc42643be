"""``python -m disttrain.commands.torchrun``: torchrun without its traceback when a rank fails.

Takes torchrun's options and does what torchrun does. A failed rank has already printed its own error, and torchrun's
30-line traceback is about torchrun, not the run; it would push that error off the screen. torchrun's log line for each
failed rank, with its exit code or signal, stays.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Run torchrun with the arguments of this process.

    Returns:
        0, or 1 if a rank failed or a signal ended the ranks, like torchrun itself.
    """
    try:
        torchrun()
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
