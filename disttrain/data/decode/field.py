"""Declare a field of the samples: its extension, its decoder, and the values it may have.

A :class:`Field` validates itself when it is created, so a mistake stops a run before it starts. The decoders are in
:mod:`disttrain.data.decode.fields`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from disttrain.data.decode import external
from disttrain.data.decode.images import BACKENDS, MAX_PIXELS, MODES, RandomResizedCrop, check_backend
from disttrain.data.pack.samples import IMAGES
from disttrain.errors import ConfigError, nearest

DECODERS: Final = ("npy", "cls", "txt", "json", "bytes", "tensor", "image", "torch", "pickle")
"""The decoders of :mod:`disttrain.data.decode.fields`; WebDataset's come on top."""
_GZIP: Final = ".gz"

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
        ext: extension in the shard, such as ``cls`` or ``image.npy``; alternatives as ``jpg;png``. A value whose
            extension ends in ``.gz`` is decompressed (1 GiB at most) and decoded by the rest of the extension, except
            with ``bytes``.
        decoder: ``npy``, ``cls``, ``txt``, ``json``, ``tensor``, ``image``, ``bytes``, ``torch`` (loaded with
            ``weights_only``), ``pickle`` (unsafe), or ``webdataset:NAME`` for a webdataset decoder, such as
            ``webdataset:rgb8``. By default, set by the last part of the extension.
        dtype: type of the numbers (``uint8``, ``float32``, ...). For ``tensor``, the type of the raw bytes, which are
            little-endian. For other decoders, a value of another type is bad.
        shape: shape of one value; a value of another shape is bad. For ``image``, the size to resize to:
            (3, height, width), or (1, height, width) if ``mode`` is not ``rgb``.
        augment: for ``image``, the crop to take before resizing to ``shape``.
        backend: for ``image``, the JPEG decoder: ``pillow`` or the faster ``simplejpeg``.
        pad: for arrays of varying first dimension, the fill value that pads them to the longest of a micro batch.
        mode: for ``image``: ``rgb``; ``gray``, one channel; or ``mask``, one channel with the stored values (palette
            indices included), resized to the nearest pixel.
        orient: for ``image``, whether to apply the EXIF orientation.
        max_pixels: for ``image``, the largest width x height; a larger image is bad.
        classes: number of classes, if a value holds class labels; a label outside 0 to ``classes - 1`` is bad.
        default: the value for samples that lack the field; without a default, such samples are bad. A number for
            ``cls``, ``npy`` (needs ``dtype``, and ``shape`` unless it is a single number), ``tensor`` and ``image``
            (needs ``shape``) fills an array; text for ``txt``; anything for ``json``.

    Raises:
        ConfigError: the decoder is unknown or lacks a library, ``dtype`` or ``shape``; or an attribute does
            not apply to it.
    """

    ext: str
    decoder: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    augment: RandomResizedCrop | None = None
    backend: str = "pillow"
    pad: float | None = None
    mode: str = "rgb"
    orient: bool = False
    max_pixels: int = MAX_PIXELS
    classes: int = 0
    default: Any = None

    def __post_init__(self) -> None:
        self._check_decoder()
        if self.kind == "tensor" and not (self.dtype and self.shape):
            raise ConfigError(
                f"field {self.ext!r} is a raw tensor without dtype or shape",
                hint="declare both, such as dtype: uint8, shape: [3, 32, 32]",
            )
        if self.dtype and self.dtype not in _DTYPES:
            raise ConfigError(f"field {self.ext!r} has dtype {self.dtype!r}", hint=nearest(self.dtype, _DTYPES))
        if self.kind == "image":
            self._check_image()
        if min(self.shape, default=0) < 0:
            raise ConfigError(f"field {self.ext!r} has shape {self.shape}", hint="if dims vary, omit shape and set pad")
        if self.pad is not None and self.shape:
            raise ConfigError(
                f"field {self.ext!r} has both pad and shape", hint="declare shape if it is fixed, else pad"
            )
        if self.classes < 0:
            raise ConfigError(f"field {self.ext!r} has classes {self.classes}", hint="give the number of classes")
        self._check_unused()
        if self.default is not None:
            self._check_default()

    def _check_image(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"field {self.ext!r} has mode {self.mode!r}", hint=nearest(self.mode, MODES))
        channels = 3 if self.mode == "rgb" else 1
        wanted = f"declare ({channels}, height, width)"
        if self.shape and (len(self.shape) != 3 or self.shape[0] != channels or min(self.shape) < 1):
            raise ConfigError(f"field {self.ext!r} has shape {self.shape} and mode {self.mode}", hint=wanted)
        if self.augment is not None and not self.shape:
            raise ConfigError(f"field {self.ext!r} has augment but no shape", hint=wanted)
        if self.max_pixels < 1:
            raise ConfigError(f"field {self.ext!r} has max_pixels {self.max_pixels}", hint="use at least 1")
        if self.backend not in BACKENDS:
            raise ConfigError(f"field {self.ext!r} has backend {self.backend!r}", hint=nearest(self.backend, BACKENDS))
        if self.backend != "pillow":
            if self.mode != "rgb":
                raise ConfigError(
                    f"field {self.ext!r} has backend {self.backend} and mode {self.mode}", hint="omit backend"
                )
            check_backend(self.ext, self.backend)

    def _check_default(self) -> None:
        kinds: dict[str, type | tuple[type, ...]] = {
            "cls": int, "txt": str, "json": object, "npy": (int, float), "tensor": (int, float), "image": int
        }  # fmt: skip
        needs = {"npy": "dtype", "image": "shape"}.get(self.kind, "")
        if self.kind not in kinds or self.pad is not None:
            what = "pad" if self.pad is not None else f"the decoder {self.kind!r}"
            raise ConfigError(f"field {self.ext!r}: default cannot be combined with {what}", hint="remove one of them")
        if not isinstance(self.default, kinds[self.kind]) or (
            isinstance(self.default, bool) and self.kind != "json" and self.dtype != "bool"
        ):
            raise ConfigError(
                f"field {self.ext!r}: default is {self.default!r}, which {self.kind!r} never returns",
                hint="use text for txt, a whole number for cls and image, a number for npy and tensor",
            )
        if needs and not getattr(self, needs):
            raise ConfigError(f"field {self.ext!r} has a default but no {needs}", hint=f"declare {needs} too")
        self.filler()

    def filler(self) -> Any:
        """Return the default as a decoded value.

        Raises:
            ConfigError: the default does not fit the dtype.
        """
        if self.kind in ("txt", "json"):
            return copy.deepcopy(self.default)
        dtype = {"cls": "int64", "image": "uint8"}.get(self.kind, self.dtype)
        try:
            with np.errstate(all="raise"):
                found = np.full(self.shape, self.default, dtype=dtype)
        except (OverflowError, ValueError, FloatingPointError):
            raise ConfigError(
                f"field {self.ext!r}: default {self.default!r} does not fit {dtype}", hint="use one that fits the dtype"
            ) from None
        if found.size and found.flat[0] != self.default and np.isfinite(self.default) and found.dtype.kind in "biu":
            raise ConfigError(
                f"field {self.ext!r}: default {self.default!r} does not fit {dtype}", hint="use one that fits the dtype"
            )
        return torch.from_numpy(found)

    def _check_decoder(self) -> None:
        if self.decoder != "bytes" and len({ext.endswith(_GZIP) for ext in self.alternatives}) > 1:
            raise ConfigError(
                f"field {self.ext!r} mixes extensions with and without {_GZIP}",
                hint="use only one kind, or pack all samples the same way",
            )
        if self.kind.startswith(external.PREFIX):
            external.check(self.ext, self.kind)
        elif self.kind in ("joblib", "dill"):
            raise ConfigError(
                f"field {self.ext!r} has to be unpickled, which can run arbitrary code",
                hint="store it as npy, json or a raw tensor",
            )
        elif self.kind not in DECODERS:
            raise ConfigError(
                f"field {self.ext!r}: no decoder named {self.kind!r}",
                hint=f"set its decoder; {nearest(self.kind, [*DECODERS, external.PREFIX + 'NAME'])}",
            )

    def _check_unused(self) -> None:
        """Reject settings that have no effect with this decoder."""
        is_array = self.kind in ("npy", "torch") or self.kind.startswith(external.PREFIX)
        is_image = self.kind == "image"
        for name, is_set, has_effect in (
            ("dtype", self.dtype != "", is_array or self.kind == "tensor"),
            ("shape", self.shape != (), is_array or is_image or self.kind == "tensor"),
            ("augment", self.augment is not None, is_image),
            ("backend", self.backend != "pillow", is_image),
            ("pad", self.pad is not None, is_array),
            ("mode", self.mode != "rgb", is_image),
            ("orient", self.orient, is_image),
            ("max_pixels", self.max_pixels != MAX_PIXELS, is_image),
            ("classes", self.classes != 0, is_array or self.kind in ("cls", "tensor", "json") or self.mode == "mask"),
        ):
            if is_set and not has_effect:
                raise ConfigError(
                    f"field {self.ext!r}: {name} does not apply to the decoder {self.kind!r}",
                    hint=f"remove {name}, or use another decoder",
                )

    @property
    def kind(self) -> str:
        """The effective decoder."""
        if self.decoder:
            return self.decoder
        first = self.alternatives[0]
        last = (first.removesuffix(_GZIP) if self.is_compressed else first).rpartition(".")[2]
        return "image" if last in IMAGES else _OTHER_NAMES.get(last, last)

    @property
    def is_compressed(self) -> bool:
        """Whether values are gzip-compressed."""
        return self.decoder != "bytes" and self.alternatives[0].endswith(_GZIP)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The extensions that this field may have in a shard."""
        return tuple(ext.strip().lower() for ext in self.ext.split(";"))
