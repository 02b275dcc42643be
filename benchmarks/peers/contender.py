"""What every contender offers, and the work that they share: records as bytes, and decoding an image."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from .cases import BLOCK_TOKENS, RECORD_BYTES, SIDE, Case

MODULES: Final = {
    "disttrain": "with_disttrain",
    "webdataset": "with_webdataset",
    "streaming": "with_streaming",
    "litdata": "with_litdata",
    "torchdata": "with_torchdata",
    "memmap": "with_memmap",
    "grain": "with_grain",
    "limits": "limits",
}
"""The module of each contender."""

FORMATS: Final = ("disttrain", "streaming", "litdata", "torchdata", "memmap", "grain")
"""The contenders that write their own data; webdataset and the limits read disttrain's tars."""

LABEL_BYTES: Final = 8


class Contender:
    """A loader over one data set, which is built when the first batch is asked for.

    Args:
        case: the data set.
        folder: where it lies, in this contender's format.
        mode: ``0`` to load in the main process, ``2`` for two workers or threads, ``2p`` for two processes where
            ``2`` are threads.
        backend: what decodes images: ``pillow`` or ``simplejpeg``.
        state: a position to resume from, as :meth:`state` gave it.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # those whose versions matter
    modes: ClassVar[tuple[str, ...]] = ("0", "2")
    backends: ClassVar[tuple[str, ...]] = ("pillow",)
    letters: ClassVar[str] = "abcd"  # the data sets that it reads
    data: ClassVar[str] = ""  # whose files it reads; its own by default
    ahead: ClassVar[int] = 1  # batches that may be read before the first is given, and do not count
    skips: ClassVar[bool] = False  # it has no position, so that it resumes by reading on to it

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        self.case, self.folder, self.mode, self.backend, self.restored = case, folder, mode, backend, state
        self.workers = int(mode[0])

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        """Write a data set in this contender's format."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch."""
        raise NotImplementedError

    def state(self) -> Any:
        """Where the running epoch is, to be resumed from; None for a contender that cannot say."""
        return None

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """The payloads of a batch and the numbers of its samples."""
        if self.case.kind == "tokens":
            return batch, batch[:, 0]
        payload, numbers = batch
        return payload, numbers

    @staticmethod
    def clean() -> None:
        """Remove what a loader that was killed has left in the way of the next."""

    def close(self) -> None:
        """Let go of what would be in the way of the next loader."""


def open_contender(name: str) -> type[Contender]:
    """A contender by its name.

    Raises:
        ImportError: its library is not installed.
    """
    found: type[Contender] = import_module(f".{MODULES[name]}", __package__).THE_CONTENDER
    return found


def record_of(number: int, payload: bytes) -> bytes:
    """A sample as one record, for formats whose samples are bytes."""
    return number.to_bytes(LABEL_BYTES, "little") + payload


def parts_of(record: bytes) -> tuple[int, memoryview]:
    """The number and the payload of such a record."""
    return int.from_bytes(record[:LABEL_BYTES], "little"), memoryview(record)[LABEL_BYTES:]


def value_of(case: Case, payload: bytes | memoryview, backend: str) -> Any:
    """What a sample's payload becomes: an array of bytes or tokens, the bytes of a JPEG, or a decoded image."""
    if case.kind in ("record", "tokens"):
        return np.frombuffer(payload, np.uint8 if case.kind == "record" else np.int32)
    return decode(payload, backend) if case.kind == "image" else bytes(payload)


def sample_of(case: Case, number: int, value: Any) -> Any:
    """What a set gives for a sample: the value and its number, or a token block alone."""
    return (value, number) if case.has_label else value


def decode(payload: bytes | memoryview, backend: str) -> torch.Tensor:
    """An image as uint8, RGB, resized as a whole: by Pillow, or by simplejpeg and torch as disttrain does it.

    Returns:
        shape (3, side, side)
    """
    if backend == "pillow":
        return to_tensor(Image.open(io.BytesIO(payload)).convert("RGB"))
    from simplejpeg import decode_jpeg

    pixels = torch.from_numpy(decode_jpeg(payload, "RGB"))[None].permute(0, 3, 1, 2)  # channels last, which is faster
    return functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    resized = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def check(case: Case, payloads: Any, numbers: Any) -> None:
    """See to it that a batch holds what it should.

    Raises:
        ValueError: it does not.
    """
    sizes = {"record": (RECORD_BYTES,), "tokens": (BLOCK_TOKENS,), "image": (3, SIDE, SIDE)}
    if len(payloads) != len(numbers):
        raise ValueError(f"{len(payloads)} payloads and {len(numbers)} numbers")
    if case.kind != "jpeg" and tuple(payloads.shape[1:]) != sizes[case.kind]:
        raise ValueError(f"payloads of shape {tuple(payloads.shape)}")
    for payload, number in list(zip(payloads, numbers, strict=True))[:4]:
        wanted = case.payload(int(number))
        if case.kind == "image":
            right = decode(wanted, "pillow").float()
            difference = float((torch.as_tensor(payload).float() - right).abs().mean())
            if difference > 4:
                raise ValueError(f"image {int(number)} differs by {difference:.1f} levels a pixel")
        elif (bytes(payload) if case.kind == "jpeg" else np.asarray(payload).tobytes()) != wanted:
            raise ValueError(f"sample {int(number)} is not what was written")
