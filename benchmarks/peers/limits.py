"""What no loader over these tars can do without reading less: cat, one pread a payload, a copy, a decoder."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from disttrain.data.index.sidecar import load_table

from .cases import Case
from .contender import decode

_DECODED = 128


def measure(case: Case, folder: Path, seconds: float) -> dict[str, float]:
    """Samples a second by what is done with them."""
    shards = sorted(folder.glob("*.tar"))
    files = [os.open(path, os.O_RDONLY) for path in shards]
    spans = []
    for file, path in zip(files, shards, strict=True):
        table = load_table(str(path))
        column = table.fields.index(case.extension)
        offsets, sizes = table.offsets[:, column].tolist(), table.sizes[:, column].tolist()
        spans += [(file, size, offset) for offset, size in zip(offsets, sizes, strict=True)]
    spans = [spans[place] for place in np.random.default_rng(0).permutation(len(spans))]
    payloads = [os.pread(*span) for span in spans]
    target = memoryview(bytearray(max(map(len, payloads))))

    def cat() -> None:
        subprocess.run(["cat", *map(str, shards)], stdout=subprocess.DEVNULL, check=True)

    def pread() -> None:
        for span in spans:
            os.pread(*span)

    def copy() -> None:
        for payload in payloads:
            target[: len(payload)] = payload

    found = {
        "cat of the tars": _rate(cat, len(spans), seconds),
        "pread, one a payload": _rate(pread, len(spans), seconds),
        "copy in memory (memcpy)": _rate(copy, len(spans), seconds),
    }
    if case.kind == "image":
        some = payloads[:_DECODED]
        for backend in ("pillow", "simplejpeg"):
            run = partial(_decode_all, some, backend)
            found[f"{backend} alone"] = _rate(run, len(some), seconds)
    for file in files:
        os.close(file)
    return found


def _decode_all(payloads: list[bytes], backend: str) -> None:
    for payload in payloads:
        decode(payload, backend)


def _rate(run: Callable[[], object], num_samples: int, seconds: float) -> float:
    """Samples a second, of runs that take so long together; the first does not count."""
    run()
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        run()
        rounds += 1
    return rounds * num_samples / (time.perf_counter() - started)
