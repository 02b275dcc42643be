"""A training loop that tells callbacks when a step is over: ``on_step_end(trainer, pl_module)``.

Lightning calls ``on_train_batch_end`` of all callbacks before that of the module, so what a module does there, such as
moving a teacher's weights, belongs to a step whose checkpoint has been taken already, and a resumed run would lack it.
``on_step_end`` comes once everything of an optimizer step has been done, before the validation that may follow; what
saves or ends a run does so there. Cost: one look at each callback a step.
"""

from __future__ import annotations

from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class SteppingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the micro batches of an epoch, with the hook after those that end a step."""

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on a micro batch."""
        before = self.batch_progress.total.ready
        super().advance(data_fetcher)
        # A resumed loop may only stand where it stood.
        if self.batch_progress.total.ready == before or self._should_accumulate():
            return
        for callback in self.trainer.callbacks:
            if hasattr(callback, "on_step_end"):
                callback.on_step_end(self.trainer, self.trainer.lightning_module)
