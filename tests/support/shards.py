"""Small shards, written by webdataset and read back by Python's tarfile as the ground truth."""

from __future__ import annotations

import importlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Sample = Mapping[str, Any]
"""Bytes by extension, and the key under ``__key__``."""


def write_shard(path: Path, samples: Sequence[Sample]) -> str:
    """Write samples as webdataset's own writer writes them."""
    webdataset: Any = importlib.import_module("webdataset")
    with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return str(path)


def tar_samples(paths: Sequence[str]) -> list[tuple[str, dict[str, bytes]]]:
    """Key and bytes by extension of every sample of some shards, in order, by Python's tarfile alone."""
    found: list[tuple[str, dict[str, bytes]]] = []
    for path in paths:
        here: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None, f"{member.name} in {path} is no file"
                here.setdefault(key, {})[extension] = content.read()
        found.extend(here.items())
    return found


def npy(array: Any) -> bytes:
    """An array in NumPy's format."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=False)
    return stream.getvalue()


def write_numbered(folder: Path, sizes: Sequence[int], name: str = "train") -> list[str]:
    """Shards whose samples hold their own number in the data set, as ``x.npy`` (float32, three times), and
    a class, as ``cls``."""
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            value = np.full(3, number, dtype=np.float32)
            samples.append({"__key__": f"{name}-{number:05d}", "x.npy": npy(value), "cls": str(number % 4).encode()})
            number += 1
        paths.append(write_shard(folder / f"{name}-{shard:03d}.tar", samples))
    return paths
