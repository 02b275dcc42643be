"""The index of a checkpoint's tensors: what it says is held against the files before memory is asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.checkpoint.format.reader import groups, read_group
from disttrain.errors import CheckpointError

SOUND = Path(__file__).parents[1] / "formats" / "2" / "step-00000005"


def tensors(index: Any) -> list[Any]:
    """The entries of tensors."""
    return [entry for entry in index.state_dict_metadata.values() if hasattr(entry, "chunks")]


def resize(*size: int) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        tensors(index)[0].size = torch.Size(size) if min(size) >= 0 else size

    return change


def locate(**other: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        name = next(iter(index.storage_data))
        index.storage_data[name] = replace(index.storage_data[name], **other)

    return change


def move(index: Any) -> None:
    chunk = tensors(index)[0].chunks[0]
    chunk.offsets = torch.Size([10**6] * len(chunk.offsets))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "too large": (resize(2**45), "more than all files hold"),
    "negative": (resize(-5), "more than all files hold"),
    "elsewhere": (locate(relative_path="../../../etc/passwd"), "not in the checkpoint"),
    "absolute": (locate(relative_path="/etc/passwd"), "not in the checkpoint"),
    "beyond the end": (locate(offset=2**40), "beyond the end"),
    "before the beginning": (locate(offset=-1), "beyond the end"),
    "a long part": (locate(length=2**62), "beyond the end"),
    "a number as text": (locate(length="1"), "beyond the end"),
    "a part outside": (move, "outside its shape"),
    "no places": (lambda index: index.storage_data.clear(), "names no file for a part of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "step-00000005"
    shutil.copytree(SOUND, path)
    assert groups(path)
    index = pickle.loads((path / ".metadata").read_bytes())
    CHANGES[change][0](index)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "COMMITTED"}
    (path / "COMMITTED").write_text(json.dumps({"format": 1, "global_step": 5, "files": sizes}))
    with pytest.raises(CheckpointError, match=CHANGES[change][1]):
        read_group(path, "model")
