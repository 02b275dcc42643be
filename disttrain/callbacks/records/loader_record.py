"""Store in checkpoints how a custom loader splits its epoch into batches, and compare that on resume.

The position in such a loader is a number of batches, so it identifies the same samples only if batch size and order are
the same. disttrain's own order has a fingerprint instead. No cost per step.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves

from disttrain.data.loader.user_loaders import ResumableLoader
from disttrain.errors import CheckpointError


class LoaderRecord(Callback):
    """Refuses to continue in the middle of an epoch that is now split differently."""

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return how the epoch is split; empty for other loaders."""
        return dict(self._now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how it was split."""
        self._saved = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, if training continues within an epoch.

        Raises:
            CheckpointError: the epoch was split differently.
        """
        leaves, saved = tree_leaves(trainer.train_dataloader), self._saved
        loader = leaves[0] if len(leaves) == 1 else None
        self._now, self._saved = (loader.cut() if isinstance(loader, ResumableLoader) else {}), {}
        if not trainer.fit_loop.epoch_loop.batch_progress.current.ready or not saved or not self._now:
            return
        different = [f"{name} was {saved.get(name)}, is {now}" for name, now in self._now.items() if saved[name] != now]
        if different:
            raise CheckpointError(
                f"the checkpoint is in the middle of an epoch of a loader that has changed: {'; '.join(different)}",
                hint="restore that, or resume from a checkpoint at the end of an epoch (Checkpointing(every_epochs=1));"
                " ShardedDataModule resumes on any number of ranks",
            )
