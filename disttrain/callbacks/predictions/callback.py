"""Write one result per sample in the plain (unshuffled) order: the same files at any world size, no duplicates.

Each rank predicts a contiguous range of the plain order. It writes its results to parts, one per output file that they
belong to; at the end, one rank joins the parts of each file, and rank 0 renames the finished output to its final name
(:mod:`disttrain.callbacks.predictions.files`). Checked before: the output does not exist. Checked after: every
delivered sample has exactly one result, in order. Cost: results are copied to the CPU after each micro batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import IO, Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.predictions.files import Output, Workshop, write_piece
from disttrain.callbacks.predictions.formats import Column, Columns, Tar, make_format, to_column
from disttrain.data.index.shard_index import Shard
from disttrain.data.loader.batches import COUNT, FILTERED, ID, KEY
from disttrain.data.module import sharded_data
from disttrain.distributed.synchronize_errors import gather, raise_together
from disttrain.errors import DataError
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.ranks import data_ranks


class _Told(NamedTuple):
    """What a rank reports to the others.

    Attributes:
        rows: number of results for each output file.
        first: its first sample, -1 if it has none.
        last: its last sample.
        delivered: number of samples it received.
        filtered: number of samples filtered out by the transform.
        summary: its format's summary of them.
    """

    rows: dict[int, int]
    first: int
    last: int
    delivered: int
    filtered: int
    summary: bytes


class PredictionWriter(Callback):
    """Writes what a module's ``predict_step`` returns: a tensor, or a mapping of names to one value per sample.

    Args:
        output: the path and format to write.

    Raises:
        ConfigError: the format needs a library that is not installed.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.notes: list[str] = []
        """Lines for the user on what was written; on rank 0, at the end."""
        self._workshop: Workshop | None = None
        self._part: IO[bytes] | None = None
        self._begin()

    def _begin(self) -> None:
        self._format = make_format(self.output.format)
        self._rows: dict[int, int] = {}  # number of results by output file
        self._first, self._last = -1, -1
        self._delivered = self._filtered = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse an output that exists, and create the hidden folder. Collective."""
        if stage != "predict":
            return
        self._begin()
        self._workshop = Workshop(self.output, gather(os.urandom(4).hex())[0])
        with raise_together(), self._on_disk():
            if trainer.is_global_zero:
                self.output.check()
                self._workshop.open()
        with raise_together():
            self._workshop.check()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the results of a micro batch to this rank's part."""
        if not data_ranks(trainer).leads:
            return
        self._filtered += batch.get(FILTERED, 0)
        if not (count := batch[COUNT]):
            return
        keys, ids = batch[KEY][:count], batch[ID][:count].tolist()
        if any(one >= two for one, two in zip([self._last, *ids], ids, strict=False)):
            raise DataError(f"sample {ids[0]} comes after sample {self._last}", hint="predict in the plain order")
        self._first, self._last = (ids[0] if self._first < 0 else self._first), ids[-1]
        columns = _columns(outputs, batch[KEY], count, class_name(pl_module))
        begin = 0
        for number, group in groupby(ids, self.output.file_of):
            here = slice(begin, begin + len(list(group)))
            piece = self._format.piece(keys[here], {name: column[here] for name, column in columns.items()})
            with self._on_disk():
                write_piece(self._open(number, trainer.global_rank), piece)
            self._rows[number] = self._rows.get(number, 0) + here.stop - begin
            begin = here.stop
        self._delivered += count

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the files, check and publish them. Collective."""
        assert self._workshop is not None
        with raise_together(), self._on_disk():
            self._close()
        told = gather(
            _Told(self._rows, self._first, self._last, self._delivered, self._filtered, self._format.summary())
        )
        rows = {number: sum(rank.rows.get(number, 0) for rank in told) for rank in told for number in rank.rows}
        with raise_together(), self._on_disk():
            _check(told, sum(rows.values()), trainer)
            self._format.settle([rank.summary for rank in told])
            made: list[Shard] = []
            for number in sorted(rows):
                if number % trainer.world_size == trainer.global_rank:
                    pieces = self._workshop.pieces(number, [r for r, rank in enumerate(told) if number in rank.rows])
                    shard = self._format.join(pieces, rows[number], self._workshop.file(number))
                    made += [] if shard is None else [shard]
        shards = sorted((shard for part in gather(made) for shard in part), key=lambda shard: shard.path)
        renamed = sum(gather(self._format.renamed if isinstance(self._format, Tar) else 0))
        with raise_together(), self._on_disk():
            if trainer.is_global_zero:
                self._workshop.publish(shards)
                self.notes = self._report(rows, renamed, sum(rank.filtered for rank in told), trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close this rank's part; the next prediction deletes it."""
        self._close()

    def _report(self, rows: dict[int, int], renamed: int, filtered: int, trainer: pl.Trainer) -> list[str]:
        total, output = sum(rows.values()), self.output
        files = f" in {len(rows):,} {output.format} file{'s' * (len(rows) > 1)}" if output.samples_per_file else ""
        notes = [f"wrote {total:,} results to {output.path}{files}"]
        if filtered:
            notes.append(f"{filtered:,} samples were left out by data.hooks.transform and have no result")
        if (missing := _expected(trainer, total) - total - filtered) > 0:
            notes.append(f"{missing:,} bad samples were skipped and have no result")
        if renamed:
            notes.append(
                f"{renamed:,} results got a number behind their key, which other samples of their tar have too"
            )
        return notes

    def _open(self, number: int, rank: int) -> IO[bytes]:
        """Return the part for an output file; results arrive in order, so the part of an earlier file is complete."""
        assert self._workshop is not None
        if self._part is None or number not in self._rows:
            self._close()
            self._part = self._workshop.part(number, rank)
        return self._part

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"predictions cannot be written to {self.output.path}: {error.strerror or error}",
                hint="check the permissions and the space left there, or let --output name another place",
            ) from None


def _columns(outputs: Any, keys: list[str], count: int, module: str) -> Columns:
    """Return the outputs for the real samples by name; the first ``count`` samples are real, the rest padding."""
    if isinstance(outputs, torch.Tensor):
        outputs = {"output": outputs}
    if not isinstance(outputs, Mapping):
        raise DataError(
            f"predict_step of {module} returned a {type(outputs).__name__}",
            hint="return a tensor, or a dictionary of names to one value a sample",
        )
    columns: dict[str, Column] = {}
    for name, values in outputs.items():
        has_rows = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping) and _ndim(values) != 0
        rows = len(values) if has_rows else -1
        if rows not in (len(keys), count):
            what = f"{rows} value{'s' * (rows != 1)}" if has_rows else f"a {type(values).__name__}"
            raise DataError(
                f"output {name!r} of {module} is {what} for {count} samples", hint="return one value a sample"
            )
        if name == KEY and list(values)[:count] != keys[:count]:
            raise DataError(
                f"{module} returned other values of {KEY} than the samples'", hint=f"return {KEY} as it is in the batch"
            )
        if name != KEY:
            columns[str(name)] = to_column(values)[:count]
    return columns


def _ndim(values: Any) -> int | None:
    return getattr(values, "ndim", None)


def _check(told: list[_Told], total: int, trainer: pl.Trainer) -> None:
    """Check that each delivered sample has one result, and that any others are bad samples that may be skipped.

    Raises:
        DataError: the check fails.
    """
    delivered, filtered = sum(rank.delivered for rank in told), sum(rank.filtered for rank in told)
    expected = _expected(trainer, total + filtered) - filtered
    spans = [(rank.first, rank.last) for rank in told if rank.rows]
    data = sharded_data(trainer)
    may_skip = data is None or data.skip_bad
    if (
        any(one[1] >= two[0] for one, two in pairwise(spans))
        or total != delivered
        or total > expected
        or (total < expected and not may_skip)
    ):
        raise DataError(
            f"{expected} samples were to be predicted; {delivered} were delivered and have {total} results, of samples"
            f" {', '.join(f'{first} to {last}' for first, last in spans)}: not one each",
            hint="nothing was written; this is a fault of the loader or of the module",
        )
    if not total:
        raise DataError("no sample is left that could be predicted", hint="see what was skipped, and repair it")


def _expected(trainer: pl.Trainer, total: int) -> int:
    """Return the number of samples to predict if known, otherwise the number predicted."""
    data = sharded_data(trainer)
    return len(data.reader("predict").index) if data is not None else total
