"""What is read: four data sets, each the same content for every contender.

A sample is a payload and its number, which comes back as its label (of a token block: as its first token), so
that what a contender delivers can be counted. The images are smooth noise with a fine texture, as large as
photographs of their size are; a comment in the file tells equal ones apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from PIL import Image

SIDE: Final = 224
IMAGE_SIZE: Final = (400, 350)
RECORD_BYTES: Final = 800
BLOCK_TOKENS: Final = 1024  # of four bytes
_DISTINCT_IMAGES: Final = 512


@dataclass(frozen=True)
class Case:
    """A data set and how it is read.

    Attributes:
        letter: short name.
        title: what it is.
        kind: ``record``, ``jpeg``, ``image`` (a JPEG that is decoded) or ``tokens``.
        num_samples: samples in the data set.
        batch: samples of a batch.
        shard_samples: samples of a shard, where a format has shards.
        timed_batches: batches that are timed at least.
        payload: gives the payload of a sample.
    """

    letter: str
    title: str
    kind: str
    num_samples: int
    batch: int
    shard_samples: int
    timed_batches: int
    payload: Callable[[int], bytes]

    @property
    def extension(self) -> str:
        return {"record": "bin", "tokens": "bin"}.get(self.kind, "jpg")

    @property
    def has_label(self) -> bool:
        return self.kind != "tokens"

    @property
    def batches(self) -> int:
        """Whole batches of an epoch."""
        return self.num_samples // self.batch

    def samples(self) -> Iterator[tuple[int, bytes]]:
        return ((number, self.payload(number)) for number in range(self.num_samples))


def record(number: int) -> bytes:
    return np.random.default_rng(number).bytes(RECORD_BYTES)


def tokens(number: int) -> bytes:
    block = np.random.default_rng(number).integers(0, 50_000, BLOCK_TOKENS, dtype=np.int32)
    block[0] = number
    return block.tobytes()


def jpeg(number: int) -> bytes:
    encoded = _picture(number % _DISTINCT_IMAGES)
    comment = f"{number:08d}".encode()
    return encoded[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + encoded[2:]


@cache
def _picture(number: int) -> bytes:
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (7, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(IMAGE_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    texture = draw.normal(0, 21, (*smooth.shape[:2], 1)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(smooth + texture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


def cases(*, quick: bool) -> dict[str, Case]:
    """The four data sets by letter; ``quick`` ones for a first look."""
    part = 8 if quick else 1
    return {
        "a": Case("a", "records of 800 bytes, batches of 256", "record", 60_000 // part, 256, 1000, 60, record),
        "b": Case("b", "JPEGs of 100 KB, raw, batches of 64", "jpeg", 8_000 // part, 64, 250, 30, jpeg),
        "c": Case(
            "c",
            "JPEGs, decoded, resized to 224, batches of 32",
            "image",
            192 if quick else 768,
            32,
            64,
            6 if quick else 24,
            jpeg,
        ),
        "d": Case("d", "token blocks of 4 KB, batches of 8", "tokens", 20_000 // part, 8, 1000, 500 // part, tokens),
    }
