"""One field of the samples: its extension, how it is decoded, and what its values have to be.

A :class:`Field` checks itself when it is made, so that a mistake ends a run at its configuration. What decodes is in
:mod:`disttrain.data.decode`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from disttrain.data import foreign
from disttrain.data.images import BACKENDS, MAX_PIXELS, MODES, RandomResizedCrop, check_backend
from disttrain.data.samples import IMAGES
from disttrain.errors import ConfigError, nearest

DECODERS: Final = ("npy", "cls", "txt", "json", "bytes", "tensor", "image", "torch", "pickle")
"""Those of :mod:`disttrain.data.decode`, beside WebDataset's."""
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
        ext: extension in the shard, such as ``cls`` or ``image.npy``; alternatives as ``jpg;png``. One that ends in
            ``.gz`` is decompressed (1 GiB at most) and then decoded as the part before says, except by ``bytes``.
        decoder: ``npy``, ``cls``, ``txt``, ``json``, ``tensor``, ``image``, ``bytes``, ``torch`` (loaded with
            ``weights_only``), ``pickle`` (unsafe), or ``webdataset:NAME`` for one of webdataset's, such as
            ``webdataset:rgb8``; by default the one that the last part of the extension names.
        dtype: type of the numbers (``uint8``, ``float32``, ...). For ``tensor``, of the raw bytes, which are
            little-endian; elsewhere a value of another type is a bad one.
        shape: shape of one value; one of another shape is bad. For ``image``, (3, height, width) to resize to, or
            (1, height, width) where ``mode`` is not ``rgb``.
        augment: for ``image``, what is cut out before it is resized to ``shape``.
        backend: for ``image``, what decodes JPEGs: ``pillow`` or the faster ``simplejpeg``.
        pad: for arrays whose first dimension differs from value to value, the number that the loader fills
            the shorter ones of a batch up with.
        mode: for ``image``: ``rgb``; ``gray``, one channel; or ``mask``, one channel with the file's own numbers,
            those of a palette too, resized to the nearest pixel.
        orient: for ``image``, whether it is turned as its EXIF data says.
        max_pixels: for ``image``, the largest width x height; a larger one is bad.
        classes: number of classes, where a value holds class labels; one outside 0 to ``classes - 1`` is bad.
        default: the value of a sample that lacks the field; without one, such a sample is bad. A number for ``cls``,
            ``npy`` (which needs ``dtype``, and ``shape`` unless it is a single number), ``tensor`` and ``image`` (which
            needs ``shape``) fills an array; text for ``txt``; anything for ``json``.

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
                mend="declare both, such as dtype: uint8, shape: [3, 32, 32]",
            )
        if self.dtype and self.dtype not in _DTYPES:
            raise ConfigError(f"field {self.ext!r} has dtype {self.dtype!r}", mend=nearest(self.dtype, _DTYPES))
        if self.kind == "image":
            self._check_image()
        if min(self.shape, default=0) < 0:
            raise ConfigError(f"field {self.ext!r} has shape {self.shape}", mend="leave out what varies, and set pad")
        if self.pad is not None and self.shape:
            raise ConfigError(f"field {self.ext!r} has pad and shape", mend="declare shape where it is fixed, else pad")
        if self.classes < 0:
            raise ConfigError(f"field {self.ext!r} has classes {self.classes}", mend="give the number of classes")
        self._check_unused()
        if self.default is not None:
            self._check_default()

    def _check_image(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"field {self.ext!r} has mode {self.mode!r}", mend=nearest(self.mode, MODES))
        channels = 3 if self.mode == "rgb" else 1
        wanted = f"declare ({channels}, height, width)"
        if self.shape and (len(self.shape) != 3 or self.shape[0] != channels or min(self.shape) < 1):
            raise ConfigError(f"field {self.ext!r} has shape {self.shape} and mode {self.mode}", mend=wanted)
        if self.augment is not None and not self.shape:
            raise ConfigError(f"field {self.ext!r} has augment but no shape", mend=wanted)
        if self.max_pixels < 1:
            raise ConfigError(f"field {self.ext!r} has max_pixels {self.max_pixels}", mend="use at least 1")
        if self.backend not in BACKENDS:
            raise ConfigError(f"field {self.ext!r} has backend {self.backend!r}", mend=nearest(self.backend, BACKENDS))
        if self.backend != "pillow":
            if self.mode != "rgb":
                raise ConfigError(
                    f"field {self.ext!r} has backend {self.backend} and mode {self.mode}", mend="leave backend out"
                )
            check_backend(self.ext, self.backend)

    def _check_default(self) -> None:
        kinds: dict[str, type | tuple[type, ...]] = {
            "cls": int, "txt": str, "json": object, "npy": (int, float), "tensor": (int, float), "image": int
        }  # fmt: skip
        needs = {"npy": "dtype", "image": "shape"}.get(self.kind, "")
        if self.kind not in kinds or self.pad is not None:
            what = "pad" if self.pad is not None else f"the decoder {self.kind!r}"
            raise ConfigError(f"field {self.ext!r}: default does not go with {what}", mend="leave one of them out")
        if not isinstance(self.default, kinds[self.kind]) or (
            isinstance(self.default, bool) and self.kind != "json" and self.dtype != "bool"
        ):
            raise ConfigError(
                f"field {self.ext!r}: default is {self.default!r}, not a value that {self.kind!r} gives",
                mend="give text for txt, a whole number for cls and image, a number for npy and tensor",
            )
        if needs and not getattr(self, needs):
            raise ConfigError(f"field {self.ext!r} has a default but no {needs}", mend=f"declare {needs} too")
        self.filler()

    def filler(self) -> Any:
        """The value of a sample that lacks the field.

        Raises:
            ConfigError: the default does not fit the type of the numbers.
        """
        if self.kind in ("txt", "json"):
            return copy.deepcopy(self.default)
        dtype = {"cls": "int64", "image": "uint8"}.get(self.kind, self.dtype)
        try:
            with np.errstate(all="raise"):
                found = np.full(self.shape, self.default, dtype=dtype)
        except (OverflowError, ValueError, FloatingPointError):
            raise ConfigError(
                f"field {self.ext!r}: default {self.default!r} is not a number of {dtype}", mend="give one that is"
            ) from None
        if found.size and found.flat[0] != self.default and np.isfinite(self.default) and found.dtype.kind in "biu":
            raise ConfigError(
                f"field {self.ext!r}: default {self.default!r} is not a number of {dtype}", mend="give one that is"
            )
        return torch.from_numpy(found)

    def _check_decoder(self) -> None:
        if self.decoder != "bytes" and len({ext.endswith(_GZIP) for ext in self.alternatives}) > 1:
            raise ConfigError(
                f"field {self.ext!r} names extensions with and without {_GZIP}",
                mend="name extensions of one kind, or pack the samples alike",
            )
        if self.kind.startswith(foreign.PREFIX):
            foreign.check(self.ext, self.kind)
        elif self.kind in ("joblib", "dill"):
            raise ConfigError(
                f"field {self.ext!r} would have to be unpickled, which can run code",
                mend="store it as npy, json or a raw tensor",
            )
        elif self.kind not in DECODERS:
            raise ConfigError(
                f"field {self.ext!r}: no decoder {self.kind!r}",
                mend=f"set its decoder; {nearest(self.kind, [*DECODERS, foreign.PREFIX + 'NAME'])}",
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
            ("mode", self.mode != "rgb", is_image),
            ("orient", self.orient, is_image),
            ("max_pixels", self.max_pixels != MAX_PIXELS, is_image),
            ("classes", self.classes != 0, is_array or self.kind in ("cls", "tensor", "json") or self.mode == "mask"),
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
        first = self.alternatives[0]
        last = (first.removesuffix(_GZIP) if self.is_compressed else first).rpartition(".")[2]
        return "image" if last in IMAGES else _OTHER_NAMES.get(last, last)

    @property
    def is_compressed(self) -> bool:
        """Whether its values are compressed by gzip."""
        return self.decoder != "bytes" and self.alternatives[0].endswith(_GZIP)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The extensions that this field may have in a shard."""
        return tuple(ext.strip().lower() for ext in self.ext.split(";"))
