"""Keeps in checkpoints how a loader that is not disttrain's cut its epoch, and compares that at a resume.

The position in such a loader is a number of batches, so it means the same samples only with the same samples a step in
the same order. disttrain's own order has a fingerprint instead. No cost in a step.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves

from disttrain.data.loader.user_loaders import ResumableLoader
from disttrain.errors import CheckpointError


class LoaderRecord(Callback):
    """Refuses to continue in the middle of an epoch that is now cut otherwise."""

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """How the epoch is cut; nothing for other loaders."""
        return dict(self._now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know how it was cut."""
        self._saved = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, where training continues within an epoch.

        Raises:
            CheckpointError: it was cut otherwise.
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
