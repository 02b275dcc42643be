"""From the bytes of a field to tensors: declared decoders, a whole batch at a time.

A :class:`Field` names the extension and, where the extension does not say it, the decoder. Decoders see all
values of a batch at once, so that fields of a fixed size (``npy``, raw tensors) become a tensor by one
reshape instead of a loop. Nothing is unpickled unless the user names the decoder that does so. All the values of a
batch that do not fit their decoder come in one :class:`BadValuesError`, by their places in the batch; the reader
masks them, or turns the first into an error that names shard, key and byte offset.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from disttrain.data import foreign, values
from disttrain.data.draws import Draws
from disttrain.data.images import BACKENDS, RandomResizedCrop, check_backend, decode_image
from disttrain.data.values import BadValuesError, Declared, Decoded, RawValues, each
from disttrain.errors import ConfigError, nearest

__all__ = [
    "IMAGES",
    "BadValuesError",
    "Decoded",
    "Field",
    "RandomResizedCrop",
    "RawValues",
    "check_safe",
    "decode",
]

IMAGES: Final = frozenset({"jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "gif", "img"})

_DTYPES: Final = (
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
_OTHER_NAMES: Final = {
    "bin": "bytes",
    "text": "txt",
    "index": "cls",
    "pkl": "pickle",
    "pyd": "pickle",
    "pt": "torch",
    "pth": "torch",
}


@dataclass(frozen=True)
class Field:
    """One field of the samples and how it is decoded.

    Attributes:
        ext: extension in the shard, such as ``cls`` or ``image.npy``; alternatives as ``jpg;png``.
        decoder: ``npy``, ``cls``, ``txt``, ``json``, ``tensor``, ``image``, ``bytes``, ``torch`` (loaded with
            ``weights_only``), ``pickle`` (unsafe), or ``webdataset:NAME`` for one of webdataset's, such as
            ``webdataset:rgb8``; by default the one that the last part of the extension names.
        dtype: type of the numbers (``uint8``, ``float32``, ...). For ``tensor``, of the raw bytes, which are
            little-endian; elsewhere a value of another type is a bad one.
        shape: shape of one value; one of another shape is bad. For ``image``, (3, height, width) to resize to.
        augment: for ``image``, what is cut out before it is resized to ``shape``.
        backend: for ``image``, what decodes JPEGs: ``pillow`` or the faster ``simplejpeg``.
        pad: for arrays whose first dimension differs from value to value, the number that the loader fills
            the shorter ones of a batch up with.

    Raises:
        ConfigError: the decoder is unknown or lacks a library, ``dtype`` or ``shape``; or an attribute does
            not go with it.
    """

    ext: str
    decoder: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    augment: RandomResizedCrop | None = None
    backend: str = "pillow"
    pad: float | None = None

    def __post_init__(self) -> None:
        self._check_decoder()
        if self.kind == "tensor" and not (self.dtype and self.shape):
            raise ConfigError(
                f"field {self.ext!r} is a raw tensor without dtype or shape",
                mend="declare both, such as dtype: uint8, shape: [3, 32, 32]",
            )
        if self.dtype and self.dtype not in _DTYPES:
            raise ConfigError(f"field {self.ext!r} has dtype {self.dtype!r}", mend=nearest(self.dtype, _DTYPES))
        if self.kind == "image":
            if self.shape and (len(self.shape) != 3 or self.shape[0] != 3 or min(self.shape) < 1):
                raise ConfigError(f"field {self.ext!r} has shape {self.shape}", mend="declare (3, height, width)")
            if self.augment is not None and not self.shape:
                raise ConfigError(f"field {self.ext!r} has augment but no shape", mend="declare (3, height, width)")
            if self.backend not in BACKENDS:
                raise ConfigError(
                    f"field {self.ext!r} has backend {self.backend!r}", mend=nearest(self.backend, BACKENDS)
                )
            if self.backend != "pillow":
                check_backend(self.ext, self.backend)
        if min(self.shape, default=0) < 0:
            raise ConfigError(f"field {self.ext!r} has shape {self.shape}", mend="leave out what varies, and set pad")
        if self.pad is not None and self.shape:
            raise ConfigError(f"field {self.ext!r} has pad and shape", mend="declare shape where it is fixed, else pad")
        self._check_unused()

    def _check_decoder(self) -> None:
        if self.kind.startswith(foreign.PREFIX):
            foreign.check(self.ext, self.kind)
        elif self.kind in ("joblib", "dill"):
            raise ConfigError(
                f"field {self.ext!r} would have to be unpickled, which can run code",
                mend="store it as npy, json or a raw tensor",
            )
        elif self.kind not in _DECODERS:
            raise ConfigError(
                f"field {self.ext!r}: no decoder {self.kind!r}",
                mend=f"set its decoder; {nearest(self.kind, [*_DECODERS, foreign.PREFIX + 'NAME'])}",
            )

    def _check_unused(self) -> None:
        """A setting without effect is a mistake."""
        is_array = self.kind in ("npy", "torch") or self.kind.startswith(foreign.PREFIX)
        is_image = self.kind == "image"
        for name, is_set, has_effect in (
            ("dtype", self.dtype != "", is_array or self.kind == "tensor"),
            ("shape", self.shape != (), is_array or is_image or self.kind == "tensor"),
            ("augment", self.augment is not None, is_image),
            ("backend", self.backend != "pillow", is_image),
            ("pad", self.pad is not None, is_array),
        ):
            if is_set and not has_effect:
                raise ConfigError(
                    f"field {self.ext!r}: {name} does not go with the decoder {self.kind!r}",
                    mend=f"remove {name}, or set another decoder",
                )

    @property
    def kind(self) -> str:
        """The decoder in force."""
        if self.decoder:
            return self.decoder
        last = self.ext.split(";")[0].rpartition(".")[2].strip().lower()
        return "image" if last in IMAGES else _OTHER_NAMES.get(last, last)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The extensions that this field may have in a shard."""
        return tuple(ext.strip().lower() for ext in self.ext.split(";"))


def check_safe(fields: Mapping[str, Field], unsafe_decoders: Sequence[str] = ()) -> None:
    """Refuse fields whose decoders can run code from the data; warn once of those that the user allows.

    Args:
        fields: the fields by name.
        unsafe_decoders: the decoders that may, such as ``pickle`` or ``webdataset:pyd``.

    Raises:
        ConfigError: a field's decoder is none of them, or one of them is not unsafe.
    """
    for decoder in unsafe_decoders:
        if not foreign.unpickles(decoder):
            raise ConfigError(
                f"data.unsafe_decoders has {decoder!r}, which is not one", mend=nearest(decoder, foreign.PICKLES)
            )
    unsafe = {name: field for name, field in fields.items() if foreign.unpickles(field.kind)}
    for name, field in unsafe.items():
        if field.kind not in unsafe_decoders:
            raise _unsafe(f"data.fields.{name} ({field.ext})", field.kind)
    if unsafe:
        names = ", ".join(f"{name} ({field.kind})" for name, field in unsafe.items())
        warnings.warn(f"these fields are unpickled, which runs whatever code is in the data: {names}", stacklevel=2)


def _unsafe(where: str, kind: str) -> ConfigError:
    return ConfigError(
        f"{where} would have to be unpickled, which can run code",
        mend=f"store it as npy, json or a raw tensor; or put {kind!r} into data.unsafe_decoders, if you trust whoever"
        " wrote the data",
    )


def decode(
    field: Field, raw: RawValues, draws: Draws | None = None, *, unsafe: frozenset[str] = frozenset()
) -> Decoded:
    """Decode a batch of one field.

    Args:
        field: how.
        raw: the bytes.
        draws: random numbers of these samples, in training; None in evaluation.
        unsafe: the decoders that may run code from the data.

    Returns:
        A tensor, shape (samples, ...), where the values are numbers of one shape; else a list.

    Raises:
        BadValuesError: some values are not what the decoder expects.
        ConfigError: the decoder can run code and is not one of ``unsafe``; or a library is missing.
    """
    if foreign.unpickles(field.kind) and field.kind not in unsafe:
        raise _unsafe(f"field {field.ext!r}", field.kind)
    return _DECODERS.get(field.kind, _foreign)(field, raw, draws)


def _npy(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.npy(raw, _declared(field))


def _cls(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.cls(raw)


def _tensor(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return values.tensor(raw, field.dtype, field.shape)


def _txt(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return each(raw, lambda value: str(value, "utf-8"), "not UTF-8 text")


def _json(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return each(raw, lambda value: json.loads(bytes(value)), "not JSON", catch=(ValueError, RecursionError))


def _bytes(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    return [bytes(value) for value in raw.values]


def _image(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    check_backend(field.ext, field.backend)
    size = (field.shape[1], field.shape[2]) if field.shape else None
    drawn = None if field.augment is None else draws
    batch = torch.empty((len(raw.values), *field.shape), dtype=torch.uint8)
    images, faults = [], {}
    for place, value in enumerate(raw.values):
        generator = None if drawn is None else drawn.generator(place, "decode")
        try:
            pixels = decode_image(value, size=size, augment=field.augment, backend=field.backend, generator=generator)
        except ValueError as error:
            faults[place] = str(error)
            continue
        if size is None:
            images.append(torch.from_numpy(np.ascontiguousarray(pixels)))
        else:
            batch.numpy()[place] = pixels
    if faults:
        raise BadValuesError(faults)
    return values.stacked(images) if size is None else batch


def _foreign(field: Field, raw: RawValues, draws: Draws | None) -> Decoded:
    read, declared = foreign.reader(field.kind), _declared(field)

    def one(value: memoryview) -> Any:
        try:
            found = read(value)
        except Exception as error:  # whatever the library raises
            raise ValueError(f"not what {field.kind} reads: {type(error).__name__}: {error}") from None
        declared.check_value(found)
        return found

    return values.stacked(each(raw, one))


def _declared(field: Field) -> Declared:
    return Declared(field.dtype, tuple(field.shape), field.pad is not None)


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
