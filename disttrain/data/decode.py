"""From the bytes of a field to tensors: declared decoders, a whole batch at a time.

A :class:`Field` names the extension and, where the extension does not say it, the decoder. Decoders see all
values of a batch at once, so that fields of a fixed size (``npy``, raw tensors) become a tensor by one
reshape instead of a loop. Nothing is ever unpickled: pickle-like extensions and object arrays are refused.
A value that does not fit its decoder is a :class:`BadValueError` with its place in the batch; the reader turns it
into an error that names shard, key and byte offset.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.errors import ConfigError, nearest

REFUSED: Final = frozenset({"pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill"})
IMAGES: Final = frozenset({"jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "img"})

_TYPES: Final = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)
_MAX_DIGITS: Final = 18  # of an int64

Decoded = Tensor | list[Any]


class BadValueError(ValueError):
    """A value that does not decode, by its place in the batch."""

    def __init__(self, place: int, what: str) -> None:
        super().__init__(what)
        self.place = place


@dataclass(frozen=True)
class Field:
    """One field of the samples and how it is decoded.

    Attributes:
        ext: extension in the shard, such as ``cls`` or ``image.npy``; alternatives as ``jpg;png``.
        decoder: ``npy``, ``cls``, ``txt``, ``json``, ``tensor``, ``image`` or ``bytes``; by default the one
            that the last part of the extension names.
        dtype: for ``tensor``, the type of the raw bytes, little-endian (``uint8``, ``float32``, ...).
        shape: for ``tensor``, the shape of one value; for ``image``, (3, height, width) to resize to.

    Raises:
        ConfigError: the decoder is unknown, would unpickle, or lacks ``dtype`` or ``shape``.
    """

    ext: str
    decoder: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind in REFUSED:
            raise ConfigError(
                f"field {self.ext!r} would have to be unpickled, which can run code",
                mend="store it as npy, json or a raw tensor",
            )
        if self.kind not in _DECODERS:
            raise ConfigError(
                f"field {self.ext!r}: no decoder {self.kind!r}",
                mend=f"set its decoder; {nearest(self.kind, _DECODERS)}",
            )
        if self.kind == "tensor" and not (self.dtype and self.shape):
            raise ConfigError(
                f"field {self.ext!r} is a raw tensor without dtype or shape",
                mend="declare both, such as dtype: uint8, shape: [3, 32, 32]",
            )

        if self.kind == "tensor" and self.dtype not in _TYPES:
            raise ConfigError(f"field {self.ext!r} has dtype {self.dtype!r}", mend=nearest(self.dtype, _TYPES))
        if self.kind == "image" and self.shape and (len(self.shape) != 3 or self.shape[0] != 3):
            raise ConfigError(f"field {self.ext!r} has shape {self.shape}", mend="declare (3, height, width)")

    @property
    def kind(self) -> str:
        """The decoder in force."""
        if self.decoder:
            return self.decoder
        last = self.ext.split(";")[0].rpartition(".")[2].lower()
        return "image" if last in IMAGES else {"bin": "bytes", "text": "txt", "index": "cls"}.get(last, last)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The extensions that this field may have in a shard."""
        return tuple(ext.strip().lower() for ext in self.ext.split(";"))


class RawValues:
    """The bytes of one field over a batch, given in one of three ways.

    Args:
        values: the bytes of each sample; made from the others when first asked for, if not given.
        block: one array, where all have one size. uint8, shape (samples, bytes)
        pieces: one buffer, and each sample's place in it and size. shapes (bytes,), (samples,), (samples,)
    """

    def __init__(
        self,
        values: Sequence[memoryview] | None = None,
        *,
        block: NDArray[np.uint8] | None = None,
        pieces: tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> None:
        self._values = values
        self.block = block
        self._pieces = pieces

    @property
    def values(self) -> Sequence[memoryview]:
        """The bytes of each sample."""
        if self._values is None and self._pieces is not None:
            buffer, at, sizes = self._pieces
            view = buffer.data
            self._values = [view[a : a + s] for a, s in zip(at.tolist(), sizes.tolist(), strict=True)]
        elif self._values is None:
            self._values = [memoryview(row) for row in self.block] if self.block is not None else []
        return self._values

    def aligned(self, max_bytes: int, fill: int) -> NDArray[np.uint8] | None:
        """The values as rows of one array, filled up on the left.

        Returns:
            None where that does not pay: a value is empty or longer than ``max_bytes``.
        """
        if self.block is not None:
            return self.block if 0 < self.block.shape[1] <= max_bytes else None
        if self._pieces is None:
            return None
        buffer, at, sizes = self._pieces
        width = int(sizes.max())
        if sizes.min() == 0 or width > max_bytes:
            return None
        columns = np.arange(width) - width + sizes[:, None]  # byte of the value, negative where there is none
        return np.where(columns < 0, np.uint8(fill), buffer[at[:, None] + np.maximum(columns, 0)])


def decode(field: Field, raw: RawValues) -> Decoded:
    """Decode a batch of one field.

    Returns:
        A tensor, shape (samples, ...), where the values are numbers of one shape; else a list.

    Raises:
        BadValueError: a value is not what the decoder expects.
    """
    return _DECODERS[field.kind](field, raw)


def _npy(field: Field, raw: RawValues) -> Decoded:
    if raw.block is not None:
        first = raw.block[0]
        shape, dtype, start = _npy_header(first.tobytes(), 0)
        # One header for all rows: then the batch is the block without its first columns.
        if np.array_equal(raw.block[:, :start], np.broadcast_to(first[:start], (len(raw.block), start))):
            content = np.ascontiguousarray(raw.block[:, start:])
            expected = int(np.prod(shape)) * dtype.itemsize
            if content.shape[1] != expected:
                raise BadValueError(0, f"npy of shape {shape} should hold {expected} bytes, not {content.shape[1]}")
            return torch.from_numpy(content.view(dtype).reshape(len(content), *shape))
    arrays = [_one_npy(bytes(value), place) for place, value in enumerate(raw.values)]
    return _stacked([torch.from_numpy(array) for array in arrays])


def _npy_header(data: bytes, place: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # NumPy parses the header as Python, whose parser may raise almost anything
        raise BadValueError(place, f"not an npy array: {error}") from None
    if min(shape, default=0) < 0:
        raise BadValueError(place, f"an npy array of shape {shape}")
    if dtype.hasobject:
        raise BadValueError(place, "an npy array of Python objects, which would have to be unpickled")
    if dtype.kind not in "biufc" or not dtype.isnative or dtype.itemsize > 16 or dtype == np.longdouble:
        raise BadValueError(place, f"an npy array of type {dtype}, which torch does not know")
    if fortran and len(shape) > 1:
        raise BadValueError(place, "an npy array in Fortran order; save it with np.ascontiguousarray")
    return shape, dtype, stream.tell()


def _one_npy(data: bytes, place: int) -> NDArray[Any]:
    shape, dtype, start = _npy_header(data, place)
    try:
        return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy()
    except ValueError as error:
        raise BadValueError(place, f"a damaged npy array: {error}") from None


def _cls(field: Field, raw: RawValues) -> Decoded:
    text = raw.aligned(_MAX_DIGITS, fill=ord("0"))
    if text is not None:
        digits = text - np.uint8(ord("0"))  # what is no digit wraps round to 10 or more
        if (digits < 10).all():
            return torch.from_numpy(digits @ 10 ** np.arange(digits.shape[1])[::-1])
    numbers = []  # signs, spaces and errors: one by one
    for place, value in enumerate(raw.values):
        try:
            number = int(bytes(value))
            if not -(2**63) <= number < 2**63:
                raise ValueError
            numbers.append(number)
        except ValueError:
            raise BadValueError(place, f"not a class number: {bytes(value[:40])!r}") from None
    return torch.tensor(numbers, dtype=torch.int64)


def _txt(field: Field, raw: RawValues) -> Decoded:
    return _each(raw, lambda value: str(value, "utf-8"), "not UTF-8 text")


def _json(field: Field, raw: RawValues) -> Decoded:
    return _each(raw, lambda value: json.loads(bytes(value)), "not JSON")


def _bytes(field: Field, raw: RawValues) -> Decoded:
    return [bytes(value) for value in raw.values]


def _each(raw: RawValues, read: Callable[[memoryview], Any], what: str) -> list[Any]:
    out = []
    for place, value in enumerate(raw.values):
        try:
            out.append(read(value))
        except (ValueError, RecursionError) as error:
            raise BadValueError(place, f"{what}: {error}") from None
    return out


def _tensor(field: Field, raw: RawValues) -> Decoded:
    dtype = np.dtype(field.dtype).newbyteorder("<")
    expected = int(np.prod(field.shape)) * dtype.itemsize
    block = raw.block
    for place, size in enumerate(map(len, raw.values) if block is None else block.shape[1:]):
        if size != expected:
            raise BadValueError(place, f"{size} bytes, but {field.dtype} of shape {field.shape} takes {expected}")
    if block is None:
        block = np.stack([np.frombuffer(value, np.uint8) for value in raw.values])
    return torch.from_numpy(np.ascontiguousarray(block).view(dtype).reshape(len(block), *field.shape))


def _image(field: Field, raw: RawValues) -> Decoded:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            f"field {field.ext!r} holds images, but Pillow is missing", mend="pip install 'disttrain[image]'"
        ) from None
    images = []
    for place, value in enumerate(raw.values):
        try:
            picture: Image.Image = Image.open(io.BytesIO(value)).convert("RGB")
        except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
            raise BadValueError(place, f"not an image that Pillow reads: {str(error).split(' <_io')[0]}") from None
        if field.shape:
            picture = picture.resize((field.shape[2], field.shape[1]), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous())
    return _stacked(images)


def _stacked(tensors: list[Tensor]) -> Decoded:
    one_shape = all(t.shape == tensors[0].shape and t.dtype == tensors[0].dtype for t in tensors)
    return torch.stack(tensors) if one_shape else tensors


_DECODERS: Final[dict[str, Callable[[Field, RawValues], Decoded]]] = {
    "npy": _npy,
    "cls": _cls,
    "txt": _txt,
    "json": _json,
    "bytes": _bytes,
    "tensor": _tensor,
    "image": _image,
}
