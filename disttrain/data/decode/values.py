"""The bytes of one field over a batch, and vectorized decoders of numbers.

Values of the same size and type become a tensor by one reshape instead of a loop; only other values are decoded one
by one. Every decoder reports all bad values of a batch, by place, in one :class:`BadValuesError`. Nothing is ever
unpickled here.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.system.device import uses_cuda

_MAX_DIGITS: Final = 18  # of an int64
_LONGEST_NUMBER: Final = 100  # bytes of a class number and the white space around it
_CLASS: Final = re.compile(rb"[ \t\r\n]*-?[0-9]+[ \t\r\n]*")
MAX_EXPANDED: Final = 2**30
"""Maximum bytes of a decompressed value."""

Decoded = Tensor | list[Any]
_Value = TypeVar("_Value")


class BadValuesError(ValueError):
    """Values that do not decode.

    Args:
        faults: what is wrong with each bad value, by its place in the batch.
        hint: hint, if there is a better one than declaring another decoder.
    """

    def __init__(self, faults: Mapping[int, str], hint: str = "") -> None:
        super().__init__(dict(faults), hint)
        self.faults, self.hint = dict(faults), hint

    def __str__(self) -> str:
        return "; ".join(f"value {place}: {what}" for place, what in self.faults.items())


class RawValues:
    """The bytes of one field over a batch.

    Args:
        values: the bytes of each sample; or, instead,
        pieces: a block of memory, and offset and size of each value in it; no other part of it is accessed.
            shapes (bytes,), (samples,), (samples,)
    """

    def __init__(
        self,
        values: Sequence[memoryview] | None = None,
        *,
        pieces: tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> None:
        self._values = values
        self._pieces = pieces
        self.size: int | None = None
        """Bytes of each value if all are in one block and have the same size; else None."""
        if pieces is not None:
            _, _, sizes = pieces
            size = int(sizes[0]) if len(sizes) else 0
            self.size = size if size > 0 and bool((sizes == size).all()) else None

    @property
    def values(self) -> Sequence[memoryview]:
        """The bytes of each sample."""
        if self._values is None:
            assert self._pieces is not None
            memory, at, sizes = self._pieces
            view = memory.data
            self._values = [view[a : a + s] for a, s in zip(at.tolist(), sizes.tolist(), strict=True)]
        return self._values

    def first(self, size: int) -> bytes:
        """Return the first bytes of the first value; needs ``pieces``."""
        assert self._pieces is not None
        memory, at, _ = self._pieces
        return bytes(memory[at[0] : at[0] + size])

    def columns(self, start: int, stop: int) -> Tensor:
        """Copy a byte range of each value, all of one size, to new memory, pinned if CUDA is in use.

        Returns:
            uint8, shape (samples, stop - start).
        """
        assert self._pieces is not None
        memory, at, _ = self._pieces
        width = stop - start
        # View every run of `width` bytes as an overlapping row, without a copy; only the rows needed are then copied.
        if uses_cuda():
            rows = _writable(memory).as_strided((len(memory) - width + 1, width), (1, 1))
            out = torch.empty((len(at), width), dtype=torch.uint8, pin_memory=True)
            return torch.index_select(rows, 0, torch.from_numpy(at + start), out=out)
        # NumPy, because it starts no threads; PyTorch's would wait for each other on busy cores.
        runs: NDArray[Any] = np.ndarray((len(memory) - width + 1,), dtype=f"V{width}", buffer=memory, strides=(1,))
        return torch.from_numpy(runs[at + start].view(np.uint8).reshape(len(at), width))

    def aligned(self, max_bytes: int, fill: int) -> NDArray[np.uint8] | None:
        """Return the values as rows of one array, padded on the left.

        Returns:
            None if that does not pay off: a value is empty or longer than ``max_bytes``.
        """
        if self._pieces is None or not len(self._pieces[2]):
            return None
        memory, at, sizes = self._pieces
        width = int(sizes.max())
        if sizes.min() == 0 or width > max_bytes:
            return None
        columns = np.arange(width) - width + sizes[:, None]  # byte index in the value, negative for padding
        return np.where(columns < 0, np.uint8(fill), memory[at[:, None] + np.maximum(columns, 0)])


class _Alias:
    """A second view of an array's memory that keeps the array alive."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        address, _ = memory.__array_interface__["data"]
        self.__array_interface__ = {"data": (address, False), "shape": memory.shape, "typestr": "|u1", "version": 3}
        self._memory = memory


def _writable(memory: NDArray[np.uint8]) -> Tensor:
    """Return an array as a tensor, which must not be written to.

    PyTorch has no read-only tensors and warns about read-only arrays.
    """
    return torch.from_numpy(np.asarray(_Alias(memory)))


@dataclass(frozen=True)
class Declared:
    """What a field declares about the array in each of its values.

    Attributes:
        dtype: its type, such as ``float32``; empty for any.
        shape: its shape; empty for any.
        ragged: the first dimension varies from value to value, so there must be one.
        exact: an empty shape means a single number.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    ragged: bool = False
    exact: bool = False

    def check(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Check the array of a value.

        Raises:
            ValueError: it does not match.
        """
        if (self.shape or self.exact) and shape != self.shape:
            raise ValueError(f"an array of shape {shape}, but shape {self.shape} is declared")
        if self.dtype and dtype != self.dtype:
            raise ValueError(f"an array of {dtype}, but {self.dtype} is declared")
        if self.ragged and not shape:
            raise ValueError("a single number, but an array of variable length is declared")

    def check_value(self, value: object) -> None:
        """Check a value that may not be a tensor.

        Raises:
            ValueError: something is declared, and the value is not a tensor or does not match.
        """
        if isinstance(value, Tensor):
            self.check(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        elif self != _ANYTHING:
            raise ValueError(f"a {type(value).__name__}, but an array is declared")


_ANYTHING: Final = Declared()


def each(
    raw: RawValues,
    read: Callable[[memoryview], _Value],
    what: str = "",
    *,
    catch: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> list[_Value]:
    """Decode values one by one.

    Args:
        raw: the values.
        read: decodes one.
        what: description of a value that fails.
        catch: exceptions that ``read`` may raise.

    Raises:
        BadValuesError: some values failed; the others were still tried.
    """
    out, faults = [], {}
    for place, value in enumerate(raw.values):
        try:
            out.append(read(value))
        except catch as error:
            faults[place] = f"{what}: {error}" if what else str(error)
    if faults:
        raise BadValuesError(faults)
    return out


def stacked(values: list[Any]) -> Decoded:
    """Return one tensor, shape (samples, ...), if all values are tensors of one type and shape; else the list."""
    first = values[0] if values else None
    if not isinstance(first, Tensor) or first.layout != torch.strided:
        return values
    alike = all(isinstance(v, Tensor) and v.shape == first.shape and v.dtype == first.dtype for v in values)
    return torch.stack(values) if alike else values


def npy(raw: RawValues, declared: Declared = _ANYTHING) -> Decoded:
    """Decode arrays in NumPy's format."""
    if raw.size is not None and (batch := _alike_npy(raw, raw.size, declared)) is not None:
        return batch
    return stacked(each(raw, partial(_one_npy, declared=declared)))


def _alike_npy(raw: RawValues, size: int, declared: Declared) -> Tensor | None:
    """Decode arrays that share one header; the batch is the bytes after it."""
    try:
        shape, dtype, start = _npy_header(raw.first(size), declared)
    except ValueError:
        return None  # decode one by one, to find which values are bad
    if start == size:
        return None  # arrays without elements
    headers = raw.columns(0, start).numpy()
    if size - start != math.prod(shape) * dtype.itemsize or (headers != headers[0]).any():
        return None
    return _seen_as(raw.columns(start, size), dtype, shape)


def _seen_as(rows: Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
    """View rows of bytes as numbers, shape (samples, *shape).

    The tensor keeps its own storage. A round trip through NumPy would hide it from the pinned-memory allocator, which
    could then reuse the block while a copy to the device still reads it.
    """
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    if not rows.numel():
        return torch.empty(len(rows), *shape, dtype=kind)
    return rows.view(kind).view(len(rows), *shape)


def _npy_header(data: bytes, declared: Declared) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # NumPy parses the header as a Python literal, and that parser may raise almost anything
        raise ValueError(f"not an npy array: {error}") from None
    if min(shape, default=0) < 0 or any(isinstance(size, bool) for size in shape):
        raise ValueError(f"an npy array of shape {shape}")
    if dtype.hasobject:
        raise ValueError("an npy array of Python objects, which would need unpickling")
    if dtype.kind not in "biufc" or not dtype.isnative or dtype.itemsize > 16 or dtype == np.longdouble:
        raise ValueError(f"an npy array of type {dtype}, which torch does not support")
    if fortran and len(shape) > 1:
        raise ValueError("an npy array in Fortran order; save it with np.ascontiguousarray")
    declared.check(dtype.name, shape)
    return shape, dtype, stream.tell()


def _one_npy(value: memoryview, declared: Declared) -> Tensor:
    data = bytes(value)
    shape, dtype, start = _npy_header(data, declared)
    try:
        return torch.from_numpy(np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy())
    except ValueError as error:
        raise ValueError(f"a damaged npy array: {error}") from None


def cls(raw: RawValues) -> Tensor:
    """Decode class numbers in decimal digits."""
    text = raw.aligned(_MAX_DIGITS, fill=ord("0"))
    if text is not None:
        digits = text - np.uint8(ord("0"))  # anything but a digit wraps around to 10 or more
        if (digits < 10).all():
            return torch.from_numpy(digits @ 10 ** np.arange(digits.shape[1])[::-1])
    return torch.tensor(each(raw, one_cls), dtype=torch.int64)  # signs, spaces and errors: one by one


def one_cls(value: memoryview) -> int:
    """Decode a class number: decimal digits with an optional minus sign, ignoring surrounding white space.

    Python would also accept ``1_0`` and ``+1``, which other tools do not.

    Raises:
        ValueError: it is something else, or takes more than 64 bits.
    """
    data = bytes(value)
    if len(data) > _LONGEST_NUMBER or not _CLASS.fullmatch(data):
        raise ValueError(f"not a class number: {data[:40]!r}")
    return int64(int(data))


def int64(number: int) -> int:
    """Return the number unchanged.

    Raises:
        ValueError: it takes more than 64 bits.
    """
    if -(2**63) <= number < 2**63:
        return number
    raise ValueError(f"{number} does not fit in 64 bits")


def tensor(raw: RawValues, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Decode raw little-endian numbers, all of one shape."""
    kind = np.dtype(dtype).newbyteorder("<")
    expected = math.prod(shape) * kind.itemsize
    if raw.size != expected or not expected:
        sizes = [len(value) for value in raw.values]
        wrong = f"{{}} bytes, but {dtype} of shape {shape} takes {expected}"
        if faults := {place: wrong.format(size) for place, size in enumerate(sizes) if size != expected}:
            raise BadValuesError(faults)
        block = torch.zeros(len(sizes), expected, dtype=torch.uint8)
        for row, value in zip(block.numpy(), raw.values, strict=True):
            row[:] = np.frombuffer(value, np.uint8)
    else:
        block = raw.columns(0, expected)
    return _seen_as(block, kind, shape)
