"""A run's metrics in a CSV file that survives kills.

The file is wide: columns ``step,epoch,time`` (time in Unix seconds), then one per metric; a cell without a value is
empty. Each row is appended with one write and flushed, so a killed run loses at most the row being written. Readers
skip such a torn last line, and the next writer removes it. ``nan`` and ``inf`` are written as such, and every value
reads back bit-identical.

Cost: a row costs one short write. Only a new column and :meth:`MetricsFile.truncate_after` copy the file, to a
temporary one that replaces it atomically, so a reader never sees a partial file. Imports neither torch nor Lightning,
so that reports work where those are slow to load or absent.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from disttrain.errors import ConfigError, DataError
from disttrain.system.files import METRICS, check_held, make_folder, publish, remove_leftovers
from disttrain.system.reading import ReadError, read_lines

FILE_NAME: Final = METRICS
_BLOCK_BYTES: Final = 64 * 1024
FIRST_COLUMNS: Final = ("step", "epoch", "time")

Series = list[tuple[int, float]]
"""Values of one metric as (step, value), in logging order."""


@dataclass(frozen=True)
class Row:
    """One line of the file.

    Attributes:
        step: optimizer step, as the caller counts it.
        epoch: epoch from 0; None if not recorded.
        time_seconds: when it was logged, in Unix seconds; None if not recorded.
        values: this row's metrics by name.
    """

    step: int
    epoch: int | None
    time_seconds: float | None
    values: dict[str, float]


class MetricsFile:
    """Appends rows to a metrics file.

    Only one process may write at a time. Nothing is touched before the first row, so creating an instance is free and
    leaves no empty file.

    Args:
        path: the file; its folder is created if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: tuple[str, ...] = ()
        self._file: BinaryIO | None = None

    def append(
        self, metrics: Mapping[str, float], *, step: int, epoch: int | None = None, time_seconds: float | None = None
    ) -> None:
        """Append one row and flush it.

        Args:
            metrics: values by name; an unseen name becomes a new column.
            step: optimizer step, as the caller counts it.
            epoch: epoch from 0.
            time_seconds: Unix seconds; by default now.

        Raises:
            ConfigError: a metric's name is one of the first columns or contains a line break.
            DataError: the existing file is not a metrics file.
            OSError: it cannot be written; a later call retries on a new line.
        """
        try:
            self._append(metrics, step, epoch, time_seconds)
        except OSError:
            with suppress(OSError):  # the buffered rest cannot be written either
                self.close()
            self._file = None
            raise

    def _append(self, metrics: Mapping[str, float], step: int, epoch: int | None, time_seconds: float | None) -> None:
        file = self._ready(metrics)
        now = time.time() if time_seconds is None else time_seconds
        cells = [str(step), "" if epoch is None else str(epoch), f"{now:.3f}"]
        for name in self._columns[len(FIRST_COLUMNS) :]:
            value = metrics.get(name)
            cells.append("" if value is None else repr(float(value)))
        file.write((",".join(cells) + "\n").encode())
        file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop rows of later steps, so that a run resumed at ``step`` does not log them twice.

        The file is always replaced, even if no row was dropped: a stale process of an earlier attempt then keeps
        appending to the old, unlinked file. Temporary files of killed copies are removed.
        """
        self.close()
        remove_leftovers(self.path)
        columns = _read_header(self.path)
        if columns:
            _rewrite(self.path, columns, last_step=step)

    def close(self) -> None:
        """Close the file; a later row reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _ready(self, metrics: Mapping[str, float]) -> BinaryIO:
        """Return the open file, with a column for each of these metrics."""
        if self._file is None:
            make_folder(self.path.parent)
            _drop_torn_line(self.path)
            self._columns = _read_header(self.path)
        new = tuple(name for name in metrics if name not in self._columns[len(FIRST_COLUMNS) :])
        if new or not self._columns:
            _check_names(new)
            self.close()
            columns = (self._columns or FIRST_COLUMNS) + new
            _rewrite(self.path, columns)
            self._columns = columns
        if self._file is None:
            self._file = open(self.path, "ab")
        return self._file


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a metrics file in order; none if it does not exist.

    A torn last line and lines that do not parse (a power failure may leave some) are skipped.

    Raises:
        DataError: the file is not a metrics file.
    """
    columns = _read_header(path)
    if columns:
        for line in _read_lines(path):
            row = _parse(line, columns)
            if row is not None:
                yield row


def read_metrics(path: Path) -> dict[str, Series]:
    """Return every column of a metrics file except ``step``, as series by name.

    ``epoch`` and ``time`` (Unix seconds) are series too. A column without values has an empty series; a missing file
    has no series.

    Raises:
        DataError: the file is not a metrics file.
    """
    series: dict[str, Series] = {name: [] for name in _read_header(path)[1:]}
    for row in read_rows(path):
        if row.epoch is not None:
            series["epoch"].append((row.step, float(row.epoch)))
        if row.time_seconds is not None:
            series["time"].append((row.step, row.time_seconds))
        for name, value in row.values.items():
            series[name].append((row.step, value))
    return series


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name in FIRST_COLUMNS:
            raise ConfigError(
                f"a metric is named {name!r}, which is a reserved column of {FILE_NAME}",
                hint=f"log it under another name, such as 'train/{name}'",
            )
        if "\n" in name or "\r" in name:
            raise ConfigError(f"the metric name {name!r} contains a line break", hint="use a name without one")


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield complete lines: half a number still parses as a number, so a torn line must be dropped."""
    try:
        yield from (line for line in read_lines(path) if line.endswith(b"\n"))
    except FileNotFoundError:
        return
    except (OSError, ReadError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it {error}"
        raise DataError(f"{path} cannot be read: {why}", hint="move it away, or use another run folder") from None


def _read_header(path: Path) -> tuple[str, ...]:
    """Return the columns; none if the file is missing or its first line is torn."""
    line = next(_whole_lines(path), b"")
    if not line:
        return ()
    try:
        columns = tuple(next(csv.reader([line.decode("utf-8", errors="replace").rstrip("\r\n")]), ()))
    except csv.Error:
        columns = ()
    if columns[: len(FIRST_COLUMNS)] != FIRST_COLUMNS:
        raise DataError(
            f"{path} is not a metrics file: its first line begins with {','.join(columns)[:40]!r},"
            f" not with {','.join(FIRST_COLUMNS)!r}",
            hint="move it away, or use another run folder",
        )
    return columns


def _read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines after the header, without line endings."""
    lines = _whole_lines(path)
    next(lines, None)
    for line in lines:
        yield line.rstrip(b"\r\n")


def _parse(line: bytes, columns: Sequence[str]) -> Row | None:
    cells = line.split(b",")  # rows contain only numbers, so nothing is quoted
    if len(cells) != len(columns):
        return None
    start = len(FIRST_COLUMNS)
    try:
        return Row(
            step=_count(cells[0]),
            epoch=_count(cells[1]) if cells[1] else None,
            time_seconds=float(cells[2]) if cells[2] else None,
            values={
                name: float(cell) for name, cell in zip(columns[start:], cells[start:], strict=True) if cell.strip()
            },
        )
    except ValueError:
        return None


def _count(cell: bytes) -> int:
    number = int(cell)
    if abs(number) >= 2**63:
        raise ValueError("the number is too large")
    return number


def _drop_torn_line(path: Path) -> None:
    """Truncate the file after its last line ending, so that the next row starts on a new line."""
    try:
        with open(path, "rb+") as file:
            end = length = file.seek(0, os.SEEK_END)
            while length:
                start = max(0, length - _BLOCK_BYTES)
                file.seek(start)
                at = file.read(length - start).rfind(b"\n")
                length = start + at + 1
                if at >= 0:
                    break
            if length < end:
                file.truncate(length)
    except FileNotFoundError:
        return


def _rewrite(path: Path, columns: Sequence[str], *, last_step: int | None = None) -> None:
    """Rewrite the file with these columns, which must start with the existing ones.

    Args:
        path: the file; created without rows if missing.
        columns: its new columns.
        last_step: drop rows of later steps; None keeps all.
    """
    check_held(path)
    present = _read_header(path)
    padding = b"," * (len(columns) - len(present)) + b"\n"
    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(columns)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header.getvalue().encode("utf-8", errors="replace"))
            for line in _read_lines(path) if present else ():
                row = _parse(line, present)
                if row is not None and (last_step is None or row.step <= last_step):
                    file.write(line + padding)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        publish(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # a newer attempt removes it
            os.unlink(temporary)
        raise
