"""CSV and Parquet tables as sources of samples.

A row becomes a sample with ``features.npy`` (float32) and ``target.npy`` (float32) or ``cls``. A column is numeric if
its first filled cell is a number. After that, a cell that is not a number is an error that names file, row and
column, so nothing silently becomes NaN. Other columns are skipped and listed in the notes. Rows are numbered from 0,
as in the samples' keys. Cost: the table is held in memory.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disttrain.data.pack.samples import Labels, Sample, Samples, Source
from disttrain.errors import ConfigError, DataError, nearest

_LARGEST: Final = float(np.finfo(np.float32).max)

Column = list[str] | NDArray[np.float64] | None
"""Text, or numbers with NaN for missing values; None for any other type."""


@dataclass(frozen=True, eq=False)
class _Table:
    path: Path
    columns: dict[str, Column]
    num_rows: int
    lines: tuple[int, ...] = ()  # line number of each row in a text file

    def place(self, row: int, column: str) -> str:
        line = f" (line {self.lines[row]})" if self.lines else ""
        return f"{self.path}, row {row}{line}, column {column!r}"

    def column(self, name: str, role: str) -> Column:
        if name not in self.columns:
            raise DataError(f"{self.path} has no column {name!r} ({role})", hint=nearest(name, self.columns))
        return self.columns[name]

    def holds_numbers(self, name: str) -> bool:
        column = self.columns[name]
        if isinstance(column, list):
            return _number(next((cell for cell in column if cell.strip()), "")) is not None
        return column is not None

    def numbers(self, name: str, role: str) -> NDArray[np.float64]:
        column = self.column(name, role)
        if column is None:
            raise DataError(f"{self.path}, column {name!r} ({role}) holds neither numbers nor text", hint="convert it")
        if isinstance(column, list):
            parsed = (_number(cell) for cell in column)
            values = np.array([np.nan if value is None else value for value in parsed], dtype=np.float64)
        else:
            values = column
        bad = np.flatnonzero(~(np.abs(values) <= _LARGEST))  # NaN compares false
        if len(bad):
            row = int(bad[0])
            cell = column[row]
            what = (
                repr(cell) if isinstance(cell, str) and cell.strip() else "missing" if np.isnan(values[row]) else cell
            )
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise DataError(
                f"{self.place(row, name)}: {what}, not a finite float32 number{more}",
                hint="correct or remove the row, or choose columns with --features",
            )
        return values


def open_table(path: Path, *, target: str, task: str = "", features: Sequence[str] = ()) -> Source:
    """Open a CSV or Parquet file as a source; for the arguments see :func:`disttrain.data.pack.sources.open_source`.

    Raises:
        ConfigError: no target is given.
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="check the path") from None
    options = json.dumps([path.stem, target, task, *features])

    def load() -> Samples:
        table = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
        return _samples(table, target, task, features)

    return Source(name=path.stem, fingerprint=f"table:{content}:{options}", load=load)


def tabular_samples(
    name: str,
    features: NDArray[np.float32],
    labels: Labels,
    *,
    classes: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Samples:
    """Return rows of numbers as samples: with ``cls`` if the labels are integers, else with ``target.npy``.

    Args:
        name: prefix of the keys.
        features: shape (samples, features)
        labels: class numbers or targets. shape (samples,)
        classes: names of the classes.
        notes: see :class:`disttrain.data.pack.samples.Samples`.
    """

    def read(number: int) -> Sample:
        fields = {"features.npy": npy(features[number])}
        if labels.dtype.kind == "f":
            fields["target.npy"] = npy(np.asarray(labels[number], dtype=np.float32))
        else:
            fields["cls"] = str(labels[number]).encode()
        return Sample(row_key(name, number, len(features)), fields)

    return Samples(len(features), read, labels=labels, classes=classes, notes=notes)


def npy(array: NDArray[Any]) -> bytes:
    """Return an array in NumPy's ``.npy`` format."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def row_key(name: str, number: int, num_rows: int) -> str:
    """Return the key of a row: ``digits-000123``."""
    return f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', name)}-{number:0{max(6, len(str(num_rows - 1)))}d}"


def _samples(table: _Table, target: str, task: str, features: Sequence[str]) -> Samples:
    if not target:
        raise ConfigError(
            f"{table.path}: no target column was given",
            hint=f"add --target COLUMN, one of {', '.join(table.columns)}",
        )
    labels, classes, notes = _labels(table, target, task)
    if target in features:
        raise ConfigError(f"column {target!r} is both target and feature", hint="remove it from --features")
    names = list(features) or [name for name in table.columns if name != target and table.holds_numbers(name)]
    if not names:
        raise DataError(f"{table.path} has no numeric columns besides {target!r}", hint="name some with --features")
    left_out = [name for name in table.columns if name != target and name not in names]
    if left_out and not features:
        notes += (f"skipped non-numeric columns: {', '.join(left_out)}",)
    values = np.stack([table.numbers(name, "feature") for name in names], axis=1).astype(np.float32)
    return tabular_samples(table.path.stem, values, labels, classes=classes, notes=notes)


def _labels(table: _Table, target: str, task: str) -> tuple[Labels, tuple[str, ...], tuple[str, ...]]:
    """Return labels, names of the classes, and notes."""
    column = table.column(target, "the target")
    if task == "regression" or (not task and table.holds_numbers(target)):
        values = table.numbers(target, "the target")
        if not task and not np.any(values % 1):
            raise ConfigError(
                f"{table.path}: target {target!r} holds whole numbers, which may be classes or quantities",
                hint="add --task classification or --task regression",
            )
        return values, (), ()
    if isinstance(column, list) and any(_number(cell) is None for cell in column):
        names = [cell.strip() for cell in column]
        if "" in names:
            raise DataError(
                f"{table.place(names.index(''), target)}: the class is missing", hint="fill or drop the row"
            )
        return _numbered(names, sorted(set(names)))
    values = table.numbers(target, "the target")
    if np.any(values % 1):
        row = int(np.flatnonzero(values % 1)[0])
        raise DataError(
            f"{table.place(row, target)}: {values[row]} is not a class number",
            hint="use --task regression, or round it",
        )
    classes = values.astype(np.int64)
    present = np.unique(classes)
    if present[0] < 0:
        return _numbered(classes.tolist(), present.tolist())
    absent = present[-1] + 1 - len(present)
    return (
        classes,
        (),
        (f"{absent} of the classes 0 to {present[-1]} do not occur; the numbering is kept",) if absent else (),
    )


def _numbered(labels: list[Any], classes: list[Any]) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[str, ...]]:
    number = {label: place for place, label in enumerate(classes)}
    return np.array([number[label] for label in labels], dtype=np.int64), tuple(map(str, classes)), ()


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # Python accepts 1_000 as a number; other tools do not
    except ValueError:
        return None


def _read_csv(path: Path) -> _Table:
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} after line {lines[-1] if lines else 0}: {error}", hint="save it as CSV in UTF-8"
        ) from None
    names = [name.strip() for name in rows[0]] if rows else []
    if len(rows) < 2 or all(_number(name) is not None for name in names):
        what = "its first line holds numbers, not column names" if len(rows) > 1 else "it holds no rows"
        raise DataError(f"{path}: {what}", hint="name the columns in the first line, with the rows below")
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} cells, but {len(names)} columns are named", hint="correct the line"
            )
    _no_doubles(path, names)
    cells = zip(*rows[1:], strict=True)
    columns: dict[str, Column] = {name: list(column) for name, column in zip(names, cells, strict=True)}
    return _Table(path, columns, len(rows) - 1, tuple(lines[1:]))


def _read_parquet(path: Path) -> _Table:
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            f"{path}: Parquet needs pyarrow, which is missing", hint="pip install 'disttrain[parquet]'"
        ) from None
    try:
        content = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}", hint="write it again") from None
    _no_doubles(path, content.column_names)
    if content.num_rows == 0:
        raise DataError(f"{path}: it holds no rows", hint="point at a file with rows")
    columns = {name: _from_arrow(arrow, content.column(name)) for name in content.column_names}
    return _Table(path, columns, content.num_rows)


def _from_arrow(arrow: Any, column: Any) -> Column:
    kind = column.type.value_type if arrow.types.is_dictionary(column.type) else column.type
    is_kind = arrow.types
    if is_kind.is_string(kind) or is_kind.is_large_string(kind):
        return [cell or "" for cell in column.cast(arrow.string()).to_pylist()]
    if is_kind.is_boolean(kind):
        column = column.cast(arrow.uint8())
    elif not (is_kind.is_integer(kind) or is_kind.is_floating(kind) or is_kind.is_decimal(kind)):
        return None
    values: NDArray[np.float64] = column.cast(arrow.float64(), safe=False).to_numpy()
    return values


def _no_doubles(path: Path, names: Sequence[str]) -> None:
    double = next((name for name in names if list(names).count(name) > 1), None)
    if double is not None:
        raise DataError(f"{path} has two columns {double!r}", hint="rename one of them")
