"""Record which samples went into which step, to prove the order or to look up a batch.

Each micro batch is one line of JSON in ``<run_dir>/ledger/rank-00000.jsonl``: epoch, step, first position in the global
batch, keys; it is written when the step is done. Cost: one buffered line per micro batch; avoid it in long runs.
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

    A run that is resumed or rolled back appends; if a step occurs twice, the later line counts (the result of the
    earlier one was lost).
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._under_way: list[str] = []  # lines of the unfinished step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's file, unless another rank of its tensor-parallel group writes for it."""
        if not data_ranks(trainer).leads:
            return
        self.teardown(trainer, pl_module, "fit")  # training starts again after a rollback
        path = Path(trainer.default_root_dir) / "ledger" / f"rank-{trainer.global_rank:05d}.jsonl"
        append_lines(path, "")  # terminates a line torn by a power failure
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
        """Write the lines of a completed step."""
        if self._file is not None:
            self._file.writelines(self._under_way)
        self._under_way.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file and drop the lines of an unfinished step, which will be repeated."""
        self._under_way.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_ledger(folder: Path) -> dict[int, list[str]]:
    """Return the sample keys of every step in the order of their positions, over all ranks' files.

    A line cut off by a kill is ignored; if several lines cover the same position of a step, the last one counts. Their
    micro batches may differ in size.
    """
    steps: dict[int, dict[int, str]] = {}
    for path in sorted(folder.glob("rank-*.jsonl"), key=lambda p: p.stat().st_mtime_ns):
        for line in read_json_lines(path):
            steps.setdefault(line["step"], {}).update(enumerate(line["keys"], start=line["first_position"]))
    return {step: [keys[at] for at in sorted(keys)] for step, keys in sorted(steps.items())}
