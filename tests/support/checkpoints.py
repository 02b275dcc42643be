"""Checkpoint folders built by hand, as far as a marker and the sizes of files go."""

from __future__ import annotations

import json
from pathlib import Path


def make_checkpoint(directory: Path, name: str, step: int, *, marker: bool = True) -> Path:
    """A folder that looks like a checkpoint; its files hold nothing of use."""
    path = directory / name
    path.mkdir(parents=True)
    (path / "meta.pt").write_bytes(b"meta")
    (path / "__0_0.distcp").write_bytes(b"tensors")
    if marker:
        commit(path, step)
    return path


def commit(path: Path, step: int) -> None:
    """Write the marker anew, with the sizes that files have now."""
    files = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "COMMITTED"}
    (path / "COMMITTED").write_text(json.dumps({"format": 1, "global_step": step, "files": files}))
