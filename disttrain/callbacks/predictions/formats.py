"""File formats of predictions: JSON lines, Parquet, or WebDataset tars.

A format encodes the results of some samples as a *piece* of bytes, which a rank appends to its part, and joins pieces
to an output file. The output does not depend on which rank made which piece, so the same results give the same bytes at
every world size (with the same library versions). Types are preserved and nothing is rounded: bfloat16, which none of
the formats supports, is widened to float32. Cost: a piece is at most one micro batch; joining holds one row group
(Parquet) or one piece in memory.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import split_name
from disttrain.data.pack.samples import Sample, Samples
from disttrain.data.pack.shard_writer import write_shard
from disttrain.data.pack.tables import npy
from disttrain.errors import ConfigError, DataError
from disttrain.system.files import to_json

FormatName = Literal["jsonl", "parquet", "tar"]
Column = NDArray[Any] | Sequence[Any]
"""One output for some samples: an array of shape (samples, ...), or one value per sample."""
Columns = Mapping[str, Column]
Pieces = Iterator[bytes]

_GROUP_ROWS: Final = 65_536
_GROUP_BYTES: Final = 64 * 2**20
_SIZES: Final = struct.Struct("<IQ")  # of a sample's header and contents


class Format:
    """How results are written. Each rank has one object; call :meth:`settle` between the pieces and the files."""

    def piece(self, keys: Sequence[str], columns: Columns) -> bytes:
        """Encode the results of some samples, in order.

        Raises:
            DataError: the format cannot represent one of the outputs.
        """
        raise NotImplementedError

    def summary(self) -> bytes:
        """Return what the other ranks must know about this rank's pieces before any are joined."""
        return b""

    def settle(self, summaries: Sequence[bytes]) -> None:
        """Process all ranks' summaries, in rank order.

        Raises:
            DataError: they are incompatible.
        """

    def join(self, pieces: Pieces, num_samples: int, path: Path) -> Shard | None:
        """Write pieces to one file and flush it to disk; a tar returns its shard description."""
        raise NotImplementedError


def make_format(name: FormatName) -> Format:
    """Create the format of a given name.

    Raises:
        ConfigError: it needs a library that is not installed.
    """
    return {"jsonl": JsonLines, "parquet": Parquet, "tar": Tar}[name]()


class JsonLines(Format):
    """One JSON object per line, the key first; tensors become nested lists, NaN and infinities strings."""

    def piece(self, keys: Sequence[str], columns: Columns) -> bytes:
        """Encode lines."""
        _refuse_key(columns)
        plain = {
            name: column.tolist() if isinstance(column, np.ndarray) else column for name, column in columns.items()
        }
        for name, column in plain.items():
            with _refusing(name, "JSON", TypeError, ValueError):
                plain[name] = [_json(value) for value in column]
        heads = [f"{json.dumps(name)}: " for name in ("key", *plain)]
        rows = zip(map(json.dumps, keys), *plain.values(), strict=True)
        lines = (", ".join(map(str.__add__, heads, row)) for row in rows)
        return "".join(f"{{{line}}}\n" for line in lines).encode()

    def join(self, pieces: Pieces, num_samples: int, path: Path) -> None:
        """Concatenate the lines."""
        with open(path, "wb") as file:
            file.writelines(pieces)
            _to_disk(file)


class Parquet(Format):
    """One row per sample: ``key``, then one column per output; arrays become nested lists of their own type."""

    def __init__(self) -> None:
        try:
            self._arrow: Any = importlib.import_module("pyarrow")
            self._parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ConfigError(
                "the format parquet needs pyarrow, which is missing", hint="pip install 'disttrain[parquet]'"
            ) from None
        self._schema: Any = None

    def piece(self, keys: Sequence[str], columns: Columns) -> bytes:
        """Encode one table as an Arrow stream."""
        _refuse_key(columns)
        arrow = self._arrow
        arrays = {}
        for name, column in {"key": list(keys), **columns}.items():
            with _refusing(name, "Parquet", arrow.ArrowException, TypeError, ValueError):
                arrays[name] = self._array(column)
        table = arrow.table(arrays)
        self._unify([table.schema])
        stream = io.BytesIO()
        with arrow.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        return stream.getvalue()

    def summary(self) -> bytes:
        """Return the types of the columns."""
        return b"" if self._schema is None else bytes(self._schema.serialize())

    def settle(self, summaries: Sequence[bytes]) -> None:
        """Agree on one type per column for all files."""
        self._schema = None
        self._unify([self._arrow.ipc.read_schema(self._arrow.py_buffer(text)) for text in summaries if text])

    def join(self, pieces: Pieces, num_samples: int, path: Path) -> None:
        """Write row groups of up to 64 MiB or 65,536 rows; their boundaries depend only on the micro batches."""
        with open(path, "wb") as file:
            with self._parquet.ParquetWriter(file, self._schema) as writer:
                for tables in self._groups(pieces):
                    whole = self._joined(tables)
                    writer.write_table(whole.combine_chunks(), row_group_size=max(1, len(whole)))
            _to_disk(file)

    def _joined(self, tables: Sequence[Any]) -> Any:
        with self._one_type():
            return self._arrow.concat_tables([self._schema.empty_table(), *tables], promote_options="permissive")

    def _groups(self, pieces: Pieces) -> Iterator[list[Any]]:
        group: list[Any] = []
        rows = size = 0
        for piece in pieces:
            with self._arrow.ipc.open_stream(self._arrow.py_buffer(piece)) as reader:
                group.append(reader.read_all())
            rows, size = rows + len(group[-1]), size + group[-1].nbytes
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield group
                group, rows, size = [], 0, 0
        if group:
            yield group

    def _unify(self, schemas: Sequence[Any]) -> None:
        known = [] if self._schema is None else [self._schema]
        if not known and not schemas:
            return
        with self._one_type():
            self._schema = self._arrow.unify_schemas([*known, *schemas], promote_options="permissive")

    @contextmanager
    def _one_type(self) -> Iterator[None]:
        try:
            yield
        except self._arrow.ArrowException as error:
            raise DataError(
                f"an output changes its type between batches, which Parquet cannot hold: {error}",
                hint="return one type for each output from predict(), or write JSON lines",
            ) from None

    def _array(self, column: Column) -> Any:
        arrow = self._arrow
        if not isinstance(column, np.ndarray):
            values = [_array_of(value) for value in column]
            first = next((value for value in values if isinstance(value, np.ndarray)), None)
            if first is None:
                return arrow.array(values)
            # Promote over all values, not just the first: 0.5 after a 1 would become 0.
            numbers = [np.asarray(value) for value in values if isinstance(value, np.ndarray | int | float)]
            kind = arrow.from_numpy_dtype(np.result_type(*(value.dtype for value in numbers)))
            for _ in range(first.ndim):
                kind = arrow.list_(kind)
            return arrow.array([value.tolist() if isinstance(value, np.ndarray) else value for value in values], kind)
        found = arrow.array(np.ascontiguousarray(column).reshape(-1))
        for dim in range(column.ndim - 1, 0, -1):
            lists = int(np.prod(column.shape[:dim], dtype=np.int64))
            ends = np.arange(lists + 1, dtype=np.int64) * column.shape[dim]
            found = arrow.ListArray.from_arrays(arrow.array(ends, arrow.int32()), found)
        return found


class Tar(Format):
    """One file per sample and output: ``.npy`` for arrays, ``.txt`` for str, ``.bin`` for bytes, else ``.json``.

    Keys are unique within a shard, but several shards of the data may contain the same key. Readers would merge such
    samples, so in each output file the second one gets ``-2`` appended to its key, and so on.
    """

    def __init__(self) -> None:
        self.renamed = 0
        """Number of keys renamed in the files that this rank has joined."""

    def piece(self, keys: Sequence[str], columns: Columns) -> bytes:
        """Encode samples, each as a header (key, names and sizes as JSON) and its contents."""
        self._check(columns)
        files: dict[str, list[tuple[str, bytes]]] = {}
        for name, column in columns.items():
            with _refusing(name, "a tar", TypeError, ValueError):
                files[name] = [self._file(value) for value in map(_array_of, column)]
        out = []
        for row, key in enumerate(keys):
            mine = [(f"{name}.{files[name][row][0]}", files[name][row][1]) for name in files]
            head = json.dumps([key, [(name, len(content)) for name, content in mine]]).encode()
            out += [_SIZES.pack(len(head), sum(len(content) for _, content in mine)), head]
            out += [content for _, content in mine]
        return b"".join(out)

    def join(self, pieces: Pieces, num_samples: int, path: Path) -> Shard:
        """Write a shard with its sidecar, like ``disttrain shards pack``."""
        samples = self._samples(pieces)
        in_order = Samples(num_samples, lambda _: next(samples))
        return write_shard(in_order, np.arange(num_samples, dtype=np.int64), path, lambda _: None)

    def _samples(self, pieces: Pieces) -> Iterator[Sample]:
        used: dict[str, int] = {}
        for piece in pieces:
            at = 0
            while at < len(piece):
                head_size, size = _SIZES.unpack_from(piece, at)
                at += _SIZES.size
                key, sizes = json.loads(piece[at : at + head_size])
                at += head_size
                ends = np.cumsum([at, *(length for _, length in sizes)]).tolist()
                fields = {name: piece[ends[n] : ends[n + 1]] for n, (name, _) in enumerate(sizes)}
                at += size
                yield Sample(self._distinct(key, used), fields)

    def _distinct(self, key: str, used: dict[str, int]) -> str:
        """Return an unused name; ``used`` maps each name to the last number tried for it."""
        name, number = key, used.get(key, 1)
        while name in used:
            number += 1
            name = f"{key}-{number}"
        self.renamed += name != key
        used[name] = 1
        used[key] = number  # lower numbers stay used, so a key that every shard has needs no repeated search
        return name

    @staticmethod
    def _check(columns: Columns) -> None:
        for name in columns:
            if name.startswith("_") or split_name(f"key.{name}.json") != ("key", f"{name}.json"):
                raise DataError(
                    f"output {name!r} cannot be the name of a file in a tar",
                    hint="lower case, without slashes, not starting with '_'; or write Parquet or JSON lines",
                )

    @staticmethod
    def _file(value: Any) -> tuple[str, bytes]:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise TypeError("an array of Python objects")
            return "npy", npy(np.asarray(value, order="C"))
        if isinstance(value, str):
            return "txt", value.encode()
        if isinstance(value, bytes):
            return "bin", value
        return "json", _json(value).encode()


def to_column(values: Any) -> Column:
    """Convert a module's output for some samples to an array, or to a list if it is neither tensor nor array."""
    if isinstance(values, torch.Tensor):
        return _numpy(values)
    return values if isinstance(values, np.ndarray) else list(values)


def _array_of(value: Any) -> Any:
    """Convert a tensor or NumPy scalar to an array; return anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return _numpy(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _numpy(values: torch.Tensor) -> NDArray[Any]:
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _plain(value: Any) -> Any:
    """Convert tensors and arrays nested in other values for JSON."""
    if isinstance(value, torch.Tensor):
        return _numpy(value).tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _refuse_key(columns: Columns) -> None:
    if "key" in columns:
        raise DataError("an output is called 'key', as the samples' keys are", hint="give it another name")


@contextmanager
def _refusing(name: str, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's error about a value into one that names the output."""
    refused: tuple[type[Exception], ...] = (*errors, OverflowError)
    try:
        yield
    except refused as error:
        raise DataError(
            f"output {name!r} cannot be written to {kind}: {error}",
            hint="return numbers, text, or tensors of numbers from predict(), or choose another --format",
        ) from None


def _json(value: Any) -> str:
    """Encode as strict JSON, with ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` as strings."""
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:
        return to_json(json.loads(json.dumps(value, default=_plain)))


def _to_disk(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
