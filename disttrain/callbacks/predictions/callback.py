"""One result a sample, in the plain order, the same files at any world size, and never twice.

Each rank holds a contiguous run of the plain order. It keeps its results in parts, one for each output file that
they belong to; at the end each file is joined from its parts by one rank, and rank 0 gives the whole its name
(:mod:`disttrain.callbacks.predictions.files`). What is checked before: nothing is there yet. And after: every
sample that was delivered has one result, in order. Cost: results go to the CPU after each micro batch.
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
    """What a rank tells the others.

    Attributes:
        rows: how many results it has for each output file.
        first: the first of its samples, -1 where it has none.
        last: the last of them.
        delivered: how many samples it was given.
        filtered: how many the transform left out.
        summary: what its format has to say of them.
    """

    rows: dict[int, int]
    first: int
    last: int
    delivered: int
    filtered: int
    summary: bytes


class PredictionWriter(Callback):
    """Writes what a module's ``predict_step`` returns: names to one value a sample, or a tensor.

    Args:
        output: where to, and as what.

    Raises:
        ConfigError: the format needs a library that is missing.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.notes: list[str] = []
        """What was written, in lines for the user; on rank 0, once it is done."""
        self._workshop: Workshop | None = None
        self._part: IO[bytes] | None = None
        self._begin()

    def _begin(self) -> None:
        self._format = make_format(self.output.format)
        self._rows: dict[int, int] = {}  # results by output file
        self._first, self._last = -1, -1
        self._delivered = self._filtered = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse an output that exists, and make the hidden folder. A collective."""
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
        """Keep the results of a micro batch."""
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
        """Join the files, check them, and publish them. A collective."""
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
        """Close this rank's part; the next prediction removes it."""
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
        """The part for an output file; results come in order, so an earlier file's is done."""
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
    """The outputs for the real samples, by name; ``count`` of them, from the left, are real."""
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
    """Every sample that was delivered has one result, and only bad ones that may be skipped were not delivered.

    Raises:
        DataError: not so.
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
    """Samples to predict, as far as that is known: as many as were predicted otherwise."""
    data = sharded_data(trainer)
    return len(data.reader("predict").index) if data is not None else total
