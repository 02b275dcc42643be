"""Small shards of feature vectors and classes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter


def npy(array: NDArray[Any]) -> bytes:
    """An array as an npy file."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_features(folder: Path, name: str, num_samples: int, *, features: int = 6, classes: int = 3) -> str:
    """One shard of random features and classes, if it is not there yet; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tar"
    if path.exists():  # a run that is resumed would warn of a shard that is newer than its checkpoint
        return str(path)
    draw = np.random.default_rng(num_samples)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number in range(num_samples):
            label = int(draw.integers(classes))
            values = draw.normal(size=features).astype(np.float32) + np.float32(label)
            writer.write({"__key__": f"{name}-{number:04d}", "features.npy": npy(values), "cls": str(label).encode()})
    return str(path)
