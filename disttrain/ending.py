"""A fit loop that also ends a run whose training was over when it was interrupted, and can go back.

Lightning's loop returns at once where no step is left to do, without the hooks that end a training: a run killed
between its last checkpoint and its end would never restore its best weights nor be recorded as complete. This
loop starts and ends such a resumed training, with no step between. And a callback that raises :class:`GoBack` at a
step boundary, on all ranks, has the trainer restored and the loop run again from there, as a resume does. No cost.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.loops.fit_loop import _FitLoop


class GoBack(Exception):  # noqa: N818 - no error: the loop takes it
    """Training goes on from an earlier state.

    Args:
        restore: puts the trainer there, once its loops are left; a collective.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        super().__init__("training goes on from an earlier state")
        self.restore = restore


class EndingFitLoop(_FitLoop):
    """Lightning's loop but for :attr:`skip` and :meth:`run`."""

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do; a resumed run always has its end to come to."""
        nothing_to_read = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip and (nothing_to_read or not self._loaded_from_state_dict)

    def advance(self) -> None:
        """Run an epoch, or the rest of one."""
        super().advance()
        # Lightning leaves out schedules that wait for a metric where an epoch was resumed, since it keeps no metrics.
        self._restarting = False  # its property would set it again where there is a limit in steps

    def run(self) -> None:
        """Train; go back and train again where that is asked for."""
        while True:
            try:
                return super().run()
            except GoBack as asked:
                restore = asked.restore
            # Outside of the handler: the traceback holds the batch and the loops' frames.
            restore()
