"""Decode the bytes of a field to tensors, a whole batch at a time.

A :class:`Field` sets the extension and, if the extension does not imply it, the decoder. Decoders get all values of a
batch at once, so fixed-size fields (``npy``, raw tensors) become one tensor by a reshape instead of a loop. Nothing is
unpickled unless the user explicitly allows the decoder that does so. All values of a batch that cannot be decoded are
reported in one :class:`BadValuesError`, by place in the batch; the reader masks them, or turns the first into an error
with shard, key and byte offset.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from disttrain.data.decode import external, values
from disttrain.data.decode.field import Field
from disttrain.data.decode.images import RandomResizedCrop, check_backend, decode_image
from disttrain.data.decode.rng import Draws
from disttrain.data.decode.values import MAX_EXPANDED, BadValuesError, Declared, Decoded, RawValues, each, stacked
from disttrain.errors import ConfigError, nearest

__all__ = [
    "BadValuesError",
    "Decoded",
    "Field",
    "RandomResizedCrop",
    "RawValues",
    "check_safe",
    "decode",
    "with_default",
]


def check_safe(fields: Mapping[str, Field], unsafe_decoders: Sequence[str] = ()) -> None:
    """Reject fields whose decoders can run code from the data, except those that the user allows, with a warning.

    Args:
        fields: the fields by name.
        unsafe_decoders: allowed unsafe decoders, such as ``pickle`` or ``webdataset:pyd``.

    Raises:
        ConfigError: a field's unsafe decoder is not allowed, or an entry of ``unsafe_decoders`` is not an unsafe
            decoder.
    """
    for decoder in unsafe_decoders:
        if not external.unpickles(decoder):
            raise ConfigError(
                f"data.unsafe_decoders has {decoder!r}, which is not an unsafe decoder",
                hint=nearest(decoder, external.PICKLES),
            )
    unsafe = {name: field for name, field in fields.items() if external.unpickles(field.kind)}
    for name, field in unsafe.items():
        if field.kind not in unsafe_decoders:
            raise _unsafe(f"data.fields.{name} ({field.ext})", field.kind)
    if unsafe:
        names = ", ".join(f"{name} ({field.kind})" for name, field in unsafe.items())
        warnings.warn(f"these fields are unpickled, which runs any code that the data contains: {names}", stacklevel=2)


def _unsafe(where: str, kind: str) -> ConfigError:
    return ConfigError(
        f"{where} has to be unpickled, which can run arbitrary code",
        hint=f"store it as npy, json or a raw tensor; or, if you trust the source of the data, add {kind!r} to"
        " data.unsafe_decoders",
    )


def decode(
    field: Field, raw: RawValues, draws: Draws | None = None, *, unsafe: frozenset[str] = frozenset()
) -> Decoded:
    """Decode a batch of one field.

    Args:
        field: the field.
        raw: the bytes.
        draws: random numbers of these samples, in training; None in evaluation.
        unsafe: the decoders that may run code from the data.

    Returns:
        A tensor, shape (samples, ...), if the values are numbers of one shape; otherwise a list.

    Raises:
        BadValuesError: some values cannot be decoded.
        ConfigError: the decoder can run code and is not in ``unsafe``, or a library is missing.
    """
    if external.unpickles(field.kind) and field.kind not in unsafe:
        raise _unsafe(f"field {field.ext!r}", field.kind)
    if field.is_compressed:
        raw = _decompressed(raw)
    return _DECODERS.get(field.kind, _foreign)(field, raw, draws)


def with_default(
    field: Field,
    raw: RawValues,
    present: NDArray[np.int64],
    total: int,
    draws: Draws | None = None,
    *,
    unsafe: frozenset[str] = frozenset(),
) -> Decoded:
    """Decode a field that some samples of a batch lack, and give those its default.

    Args:
        field: the field; it has a default.
        raw: the bytes of the samples that have the field.
        present: the places of those samples in the batch. shape (samples with the field,)
        total: number of samples in the batch.
        draws: random numbers of the samples that have the field.
        unsafe: as for :func:`decode`.

    Raises:
        BadValuesError: some values cannot be decoded, by place in the batch.
    """
    out = [field.filler() for _ in range(total)]
    places = present.tolist()
    try:
        for place, value in zip(places, decode(field, raw, draws, unsafe=unsafe) if places else [], strict=True):
            out[place] = value
    except BadValuesError as found:
        raise BadValuesError({places[place]: what for place, what in found.faults.items()}) from None
    return stacked(out)


def _decompressed(raw: RawValues) -> RawValues:
    """Decompress gzip values into new memory."""
    values = each(raw, _expanded, "gzip decompression failed", catch=(ValueError, zlib.error))
    sizes = np.array([len(value) for value in values], dtype=np.int64)
    memory = np.frombuffer(b"".join(values), dtype=np.uint8)
    return RawValues(pieces=(memory, np.cumsum(sizes) - sizes, sizes))


def _expanded(value: memoryview) -> bytes:
    """Decompress a gzip file, which may have several members and trailing zeros."""
    out, rest, size = [], bytes(value), 0
    while True:
        stream = zlib.decompressobj(wbits=31)
        out.append(stream.decompress(rest, MAX_EXPANDED - size + 1))
        size += len(out[-1])
        if size > MAX_EXPANDED:
            raise ValueError(f"more than {MAX_EXPANDED:,} bytes when decompressed")
        if not stream.eof:
            raise ValueError("the data is truncated")
        rest = stream.unused_data.lstrip(b"\0")
        if not rest:
            return b"".join(out)


def _npy(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.npy(raw, _declared(field))


def _cls(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.cls(raw)


def _tensor(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.tensor(raw, field.dtype, field.shape)


def _txt(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return each(raw, lambda value: str(value, "utf-8"), "not valid UTF-8")


def _json(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return each(raw, lambda value: json.loads(bytes(value)), "not valid JSON", catch=(ValueError, RecursionError))


def _bytes(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return [bytes(value) for value in raw.values]


def _image(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    check_backend(field.ext, field.backend)
    size = (field.shape[1], field.shape[2]) if field.shape else None
    drawn = None if field.augment is None else draws
    read = partial(
        decode_image,
        size=size,
        augment=field.augment,
        backend=field.backend,
        mode=field.mode,
        orient=field.orient,
        max_pixels=field.max_pixels,
    )
    batch = torch.empty((len(raw.values), *field.shape), dtype=torch.uint8)
    images, faults = [], {}
    for place, value in enumerate(raw.values):
        try:
            pixels = read(value, generator=None if drawn is None else drawn.generator(place, "decode"))
        except ValueError as error:
            faults[place] = str(error)
            continue
        if size is None:
            images.append(torch.from_numpy(np.ascontiguousarray(pixels)))
        else:
            batch.numpy()[place] = pixels
    if faults:
        raise BadValuesError(faults)
    return stacked(images) if size is None else batch


def _foreign(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    read, declared = external.reader(field.kind), _declared(field)

    def one(value: memoryview) -> Any:
        try:
            found = read(value)
        except Exception as error:  # the library may raise anything
            raise ValueError(f"{field.kind} cannot read it: {type(error).__name__}: {error}") from None
        declared.check_value(found)
        return found

    return stacked(each(raw, one))


def _declared(field: Field) -> Declared:
    return Declared(field.dtype, tuple(field.shape), field.pad is not None, field.default is not None)


_DECODERS: Final[dict[str, Callable[[Field, RawValues, Draws | None], Decoded]]] = {
    "npy": _npy,
    "cls": _cls,
    "txt": _txt,
    "json": _json,
    "bytes": _bytes,
    "tensor": _tensor,
    "image": _image,
    "torch": _foreign,
    "pickle": _foreign,
}
