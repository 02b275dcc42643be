"""Tars of any members, written by Python's tarfile and read by webdataset, to compare with."""

from __future__ import annotations

import gc
import importlib
import io
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from disttrain.data.index.tar import LocalFile, Member, scan_source

Contents = list[tuple[str, dict[str, bytes]]]
"""Key, and bytes by field, of each sample."""


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> str:
    """Write members by name and content."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def scan_members(path: str) -> Iterator[Member]:
    """The regular files and hard links of a local tar, in order."""
    with LocalFile(path) as file:
        yield from scan_source(file)


def write_plain(path: Path, num_samples: int, first: int = 0) -> str:
    """Write samples with two fields whose sizes and contents differ."""
    numbers = range(first, first + num_samples)
    return write_tar(
        path, [(f"{i:04}.{ext}", f"{ext}{i}".encode() * (i + 1)) for i in numbers for ext in ("cls", "bin")]
    )


def webdataset_contents(path: str | Path) -> Contents:
    """What webdataset finds in a tar."""
    webdataset: Any = importlib.import_module("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its file open
        samples: list[dict[str, Any]] = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        gc.collect()
    return [(s["__key__"], {field: value for field, value in s.items() if field[0] != "_"}) for s in samples]


def set_time(path: str | Path, seconds: float) -> None:
    """Set a file's time, relative to some moment in the past."""
    os.utime(path, ns=(int((1_700_000_000 + seconds) * 1e9),) * 2)
