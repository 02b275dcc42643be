"""A record of which samples went into which step, to prove the order or to find a batch again.

One line of JSON a micro batch in ``<run_dir>/ledger/rank-00000.jsonl``: epoch, step, first position in the
global batch, keys; written when the step is done. Cost: one buffered line a micro batch; leave it out of long runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl

from disttrain.data.loader.batches import KEY
from disttrain.lightning.callback import Callback
from disttrain.lightning.position import micro_batch_of_global_batch
from disttrain.parallel.ranks import data_ranks
from disttrain.system.files import append_lines
from disttrain.system.reading import read_json_lines


class SampleLedger(Callback):
    """Writes the sample keys of every training micro batch.

    A run that is resumed or rolled back appends; where a step stands twice, the later line is the one that counts
    (the earlier step's result was lost).
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._under_way: list[str] = []  # lines of the step that is not done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's file, if the rank speaks for its samples."""
        if not data_ranks(trainer).leads:
            return
        self.teardown(trainer, pl_module, "fit")  # training may start once more, after a rollback
        path = Path(trainer.default_root_dir) / "ledger" / f"rank-{trainer.global_rank:05d}.jsonl"
        append_lines(path, "")  # it ends a line that a power cut has torn
        self._file = open(path, "a", buffering=1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note one micro batch."""
        if self._file is None:
            return
        index = micro_batch_of_global_batch(trainer, data_ranks(trainer).rank)
        line = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "first_position": index * len(batch[KEY]),
            "keys": batch[KEY],
        }
        self._under_way.append(json.dumps(line) + "\n")

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a step that is done."""
        if self._file is not None:
            self._file.writelines(self._under_way)
        self._under_way.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file; a step that was not done will come up again."""
        self._under_way.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_ledger(folder: Path) -> dict[int, list[str]]:
    """The sample keys of every step in the order of their positions, over all ranks' files.

    A line cut off by a kill is ignored; of several lines for one place of a step, the last counts. Their micro batches
    may be of different sizes.
    """
    steps: dict[int, dict[int, str]] = {}
    for path in sorted(folder.glob("rank-*.jsonl"), key=lambda p: p.stat().st_mtime_ns):
        for line in read_json_lines(path):
            steps.setdefault(line["step"], {}).update(enumerate(line["keys"], start=line["first_position"]))
    return {step: [keys[at] for at in sorted(keys)] for step, keys in sorted(steps.items())}
