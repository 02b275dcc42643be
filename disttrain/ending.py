"""A fit loop that also ends a run whose training was over when it was interrupted.

Lightning's loop returns at once where no step is left to do, without the hooks that end a training: a run killed
between its last checkpoint and its end would never restore its best weights nor be recorded as complete. This
loop starts and ends such a resumed training, with no step between. No cost.
"""

from __future__ import annotations

from lightning.pytorch.loops.fit_loop import _FitLoop


class EndingFitLoop(_FitLoop):
    """Lightning's loop but for :attr:`skip` and :meth:`advance`."""

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
