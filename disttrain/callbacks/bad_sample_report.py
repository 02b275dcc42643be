"""Report skipped samples: quarantine files, counts, and an error if there are too many.

Each rank appends each bad sample it meets, once, to ``<run_dir>/quarantine/rank-00000.jsonl``. The number that all
ranks have met in one pass over a split (an epoch, a validation, a test) is summed on the logging interval, at each save
and at the end of the pass; if it exceeds ``data.max_bad_samples``, the run ends on every rank at the same step. Samples
that a transform filters out on purpose are counted separately and never end a run. A module that is not a Task gets a
warning that it must weight its losses.

Cost: nothing if no sample can be skipped; otherwise one sum of two numbers per logging interval and one per save.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from disttrain.data.loader.batches import BAD, FILTERED, WEIGHT
from disttrain.data.module import ShardedDataModule, sharded_data
from disttrain.data.reader.bad_sample_policy import BadSample
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import DataError
from disttrain.lightning.callback import Callback
from disttrain.parallel.ranks import data_ranks
from disttrain.system.files import append_lines, to_json
from disttrain.system.reading import read_json_lines
from disttrain.tasks.base import Task

FOLDER = "quarantine"


class BadSamples(Callback):
    """Records skipped samples and enforces the limit on their number.

    Args:
        run_dir: the run folder.
        every_steps: optimizer steps between two sums.
    """

    def __init__(self, run_dir: Path, every_steps: int) -> None:
        self.run_dir, self._every_steps = run_dir, every_steps
        self.total = 0
        """Samples skipped in training so far, over all ranks; a sample counts each time it is met."""
        self.filtered = 0
        """Samples filtered out by the transform in training so far, counted the same way."""
        self._epoch = self._summed_step = -1
        self._of_pass: dict[str, int] = {}  # bad samples of all ranks, by split
        self._unsummed: dict[str, tuple[int, int]] = {}  # this rank's bad and filtered samples since the last sum
        self._seen: set[tuple[str, str]] = set()
        self._under_way: list[Any] = []  # training batches of the unfinished step
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the run so far, the same on all ranks."""
        return {
            "total": self.total,
            "filtered": self.filtered,
            "epoch": self._epoch,
            "train": self._of_pass.get("train", 0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of a checkpoint."""
        self.total, self._epoch = state_dict["total"], state_dict["epoch"]
        self.filtered = state_dict.get("filtered", 0)
        self._of_pass["train"] = state_dict["train"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Clear the counts not yet summed; a resumed checkpoint restores the sums."""
        self._summed_step = trainer.global_step
        if stage == "fit":
            self._under_way.clear()
            self._unsummed.clear()
            self._of_pass.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the module does not weight its losses; steps up to a loaded checkpoint are already summed."""
        self._summed_step = trainer.global_step
        data = sharded_data(trainer)
        if data is not None and (data.hooks.weight or data.skip_bad):
            self._warn_of_weights(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Include everything met since the last sum in the checkpoint's counts. Collective."""
        # No collective in a rehearsal, where no step is done yet: if a hook failed on one rank, the others would hang.
        if trainer.global_step != self._summed_step:
            self._add_up(trainer, "train")
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the count for a new pass, unless the epoch was resumed."""
        if trainer.current_epoch != self._epoch:
            self._epoch = trainer.current_epoch
            self._begin("train")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what was skipped in a micro batch."""
        if isinstance(batch, dict) and (batch.get(BAD) or batch.get(FILTERED)):
            skipped = {name: batch[name] for name in (BAD, FILTERED) if name in batch}
            self._under_way.append((skipped, trainer.global_step))

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record what was skipped in a step; sum the counts if a log line is due."""
        for skipped, step in self._under_way:
            self._note(trainer, "train", skipped, step)
        self._under_way.clear()
        if trainer.global_step % self._every_steps == 0:
            self._sum_up(trainer, "train")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum the rest of an epoch."""
        self._sum_up(trainer, "train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new pass."""
        self._begin("val")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record what was skipped in a micro batch."""
        self._note(trainer, "val", batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum a pass."""
        self._sum_up(trainer, "val")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new pass."""
        self._begin("test")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record what was skipped in a micro batch."""
        self._note(trainer, "test", batch)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum a pass."""
        self._sum_up(trainer, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new pass."""
        self._begin("predict")

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record what was skipped in a micro batch."""
        self._note(trainer, "predict", batch)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum a pass."""
        self._sum_up(trainer, "predict")

    def skipped(self, split: str) -> int:
        """Return how many samples all ranks skipped in the current or last pass over a split."""
        return self._of_pass.get(split, 0)

    def _begin(self, split: str) -> None:
        self._of_pass[split], self._unsummed[split] = 0, (0, 0)

    def _note(self, trainer: pl.Trainer, split: str, batch: Any, step: int | None = None) -> None:
        bad: list[BadSample] = batch.get(BAD, []) if isinstance(batch, dict) else []
        filtered: int = batch.get(FILTERED, 0) if isinstance(batch, dict) else 0
        if not (bad or filtered) or not data_ranks(trainer).leads:
            return
        before = self._unsummed.get(split, (0, 0))
        self._unsummed[split] = before[0] + len(bad), before[1] + filtered
        fresh = [sample for sample in bad if (sample.shard, sample.key) not in self._seen]
        self._seen.update((sample.shard, sample.key) for sample in fresh)
        if fresh:
            number = trainer.global_step if step is None else step
            place = {"split": split, "epoch": trainer.current_epoch, "step": number}
            told = [place | sample._asdict() | {"reason": sample.reason.lstrip(" ,")} for sample in fresh]
            path = self.run_dir / FOLDER / f"rank-{trainer.global_rank:05d}.jsonl"
            append_lines(path, "".join(to_json(line) + "\n" for line in told))

    def _sum_up(self, trainer: pl.Trainer, split: str) -> None:
        """Add the counts since the last sum; raise on all ranks if there are too many. Collective."""
        data = self._add_up(trainer, split)
        if data is not None and self._of_pass[split] > data.max_bad_samples:
            with raise_together():
                raise DataError(
                    f"{self._of_pass[split]} bad samples in one pass over data.{split}, more than"
                    f" data.max_bad_samples {data.max_bad_samples}",
                    hint=f"repair the samples that {self.run_dir / FOLDER} lists, or raise data.max_bad_samples",
                )

    def _add_up(self, trainer: pl.Trainer, split: str) -> ShardedDataModule | None:
        """Add the counts since the last sum; return the data module if samples can be skipped. Collective."""
        data = sharded_data(trainer)
        # The samples of Lightning's sanity check depend on the number of ranks, so they must not decide anything.
        if data is None or trainer.sanity_checking or not (data.skip_bad or data.hooks.transform is not None):
            return None
        mine = torch.tensor(self._unsummed.get(split, (0, 0)), device=trainer.strategy.root_device)
        new, filtered = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        if filtered:
            self._warn_of_weights(trainer)
        self._unsummed[split] = 0, 0
        self._of_pass[split] = self._of_pass.get(split, 0) + new
        if split == "train":
            self.total, self.filtered = self.total + new, self.filtered + filtered
            self._summed_step = trainer.global_step
        return data

    def _warn_of_weights(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        if self._has_warned or isinstance(module, Task) or not trainer.is_global_zero:
            return
        self._has_warned = True
        warnings.warn(
            f"{type(module).__name__} is not a disttrain.Task: multiply its losses by batch[{WEIGHT!r}], which is 0 for"
            " samples that were skipped or filtered",
            stacklevel=2,
        )


def quarantined(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples that a run has skipped, each once, from its quarantine files."""
    seen = set()
    for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        for line in read_json_lines(path):
            if (line["shard"], line["key"]) not in seen:
                seen.add((line["shard"], line["key"]))
                yield line
