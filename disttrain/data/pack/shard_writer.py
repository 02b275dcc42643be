"""Write one WebDataset tar with webdataset's ``TarWriter``.

Times, owners and modes are fixed, so the same samples give the same bytes anywhere. The tar gets its final name only
once it is complete and on disk; its sidecar follows. Cost: one pass over the samples, which also hashes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from disttrain.data.index.shard_index import Shard
from disttrain.data.index.sidecar import build_table, split_name, write_sidecar_file
from disttrain.data.pack.samples import Ids, Sample, Samples
from disttrain.errors import DataError
from disttrain.system.files import publish

Tick = Callable[[int], None]
"""Called with the number of samples just completed."""


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.md5.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)


def write_shard(samples: Samples, ids: Ids, path: Path, tick: Tick) -> Shard:
    """Write some samples as one shard, and its sidecar.

    Raises:
        DataError: a sample would not be read back from the tar unchanged.
        OSError: the file cannot be written.
    """
    # Imported here because it may import torch: that takes seconds, which a complete packing need not spend.
    webdataset: Any = importlib.import_module("webdataset")
    temporary = path.with_name(f".{path.name}.part")
    keys: set[str] = set()
    try:
        with open(temporary, "wb") as file:
            stream = _Hashing(file)
            with webdataset.TarWriter(
                stream, user="disttrain", group="disttrain", mode=0o644, mtime=0, encoder=False, compress=False
            ) as writer:
                for number in ids.tolist():
                    sample = samples.read(number)
                    _check(sample, keys)
                    writer.write({"__key__": sample.key, **sample.fields})
                    tick(1)
            file.flush()
            os.fsync(file.fileno())
        table = build_table(str(temporary))
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    write_sidecar_file(str(path), table)
    return Shard(str(path), len(ids), stream.size_bytes, stream.md5.hexdigest())


def _check(sample: Sample, keys: set[str]) -> None:
    """Check that a sample can be read back unchanged."""
    if sample.key in keys:
        raise DataError(f"two samples have the key {sample.key!r}", hint="give every sample of a source a unique key")
    keys.add(sample.key)
    if not sample.fields:
        raise DataError(f"sample {sample.key!r} has no fields", hint="add at least one, or skip the sample")
    for extension in sample.fields:
        if extension.startswith("_") or split_name(f"{sample.key}.{extension}") != (sample.key, extension):
            raise DataError(
                f"sample {sample.key!r} with field {extension!r} cannot be stored in a shard",
                hint="use no dot after the last slash of a key, and lower-case fields that do not start with '_'",
            )
