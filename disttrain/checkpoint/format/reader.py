"""Read checkpoints: metadata, tensors into existing ones, or the whole model.

A checkpoint is a directory with tensors in torch.distributed.checkpoint's (DCP's) format (sharded, one file per rank),
everything else in ``meta.pt``, and the marker (:mod:`disttrain.checkpoint.format.marker`).
:mod:`disttrain.checkpoint.format.writer` writes it. Nothing is unpickled freely: a restricted unpickler reads the
tensor index and admits only the format's own classes; the rest is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from disttrain.checkpoint.format.marker import (
    FORMAT,
    LATEST,
    MARKER,
    META,
    Committed,
    check,
    committed,
    free_path,
    newer_format,
    remove,
)
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import CheckpointError, first_line, nearest

__all__ = [
    "FORMAT",
    "LATEST",
    "MARKER",
    "META",
    "Committed",
    "Index",
    "Tensors",
    "cause",
    "check",
    "committed",
    "free_path",
    "groups",
    "leaves",
    "no_group",
    "read_group",
    "read_index",
    "read_meta",
    "read_model",
    "read_tensors",
    "remove",
]

Tensors = dict[str, Any]
"""Nested dictionaries whose leaves are all tensors or DTensors."""
Index = dict[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of a checkpoint's tensors, by dotted name."""


def read_meta(path: Path) -> dict[str, Any]:
    """Read everything in a checkpoint besides tensors.

    Raises:
        CheckpointError: it is not committed, is torn, has a newer format, or would have to be unpickled.
    """
    check(path)
    try:
        meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
        if not isinstance(meta, dict):
            raise TypeError(f"it holds a {type(meta).__name__}")
    except Exception as error:  # damaged bytes may raise almost anything
        raise CheckpointError(
            f"{path / META} cannot be read without running code from it: {cause(error)}",
            hint="resume from another checkpoint; this file was damaged or not written by disttrain",
        ) from None
    number = meta.get("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise newer_format(path, number)
    return meta


def read_index(path: Path) -> Index:
    """Read shape and dtype of all tensors, by dotted name. Collective.

    Raises:
        CheckpointError: the index is damaged.
    """
    with raise_together():
        entries = _SafeReader(path).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(path: Path, into: Tensors) -> None:
    """Read tensors in place into existing ones, however they are sharded. Collective.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or has it in a different shape.
    """
    with raise_together():
        reader = _SafeReader(path)
        _compare(path, reader.read_metadata(), into)
        with _damage_named(path):
            dcp_load(into, storage_reader=reader, planner=DefaultLoadPlanner())


def read_model(path: Path, *, group: str = "model") -> dict[str, torch.Tensor]:
    """Read all of a checkpoint's model tensors, unsharded, by parameter name. Needs no model and no process group.

    Args:
        path: the checkpoint.
        group: ``model`` for the trained weights and buffers; ``ema`` for the averages (trained parameters only).

    Raises:
        CheckpointError: the checkpoint is not committed or is torn, or has no such tensors.
    """
    return read_group(path, group)


def groups(path: Path) -> list[str]:
    """List the groups of tensors that a checkpoint holds, such as ``model`` and ``optimizer0``.

    Raises:
        CheckpointError: the checkpoint is not committed or is torn.
    """
    check(path)
    return sorted({name.partition(".")[0] for name in _SafeReader(path).read_metadata().state_dict_metadata})


def read_group(path: Path, group: str) -> dict[str, torch.Tensor]:
    """Read all tensors of one group, unsharded, by name. Needs no model and no process group.

    Raises:
        CheckpointError: the checkpoint is not committed or is torn, or has no such group.
    """
    check(path)
    reader = _SafeReader(path)
    entries = reader.read_metadata().state_dict_metadata
    prefix = f"{group}."
    tensors = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        there = {name.partition(".")[0] for name in entries}
        raise no_group(path, group, there)
    with warnings.catch_warnings(), _damage_named(path):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp_load({group: tensors}, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    return tensors


def no_group(path: Path, group: str, there: Iterable[str]) -> CheckpointError:
    """Return the error for a group of tensors that a checkpoint does not hold."""
    return CheckpointError(
        f"checkpoint {path} has no {group!r} tensors",
        hint="its run kept no moving average; use the trained weights" if group == "ema" else nearest(group, there),
    )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # derives from BaseException, so `except Exception` would miss it
        raise CheckpointError(
            f"the tensors of checkpoint {path} cannot be read: {cause(error)}",
            hint="resume from an earlier one",
        ) from error


def cause(error: BaseException) -> str:
    """Describe an error in one line; for torch's multi-rank exception, describe the first failing rank's error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()), (error,))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError) and "eights only" in str(error):  # torch suggests trusting the file
        found = re.search(r"(?:GLOBAL|global:?|class|function) <?(?:built-in function )?([\w.]{3,})", str(error))
        return f"it would need {found[1]}" if found else "it is damaged or not a PyTorch file"
    return first_line(error)


def _compare(path: Path, metadata: Metadata, into: Tensors) -> None:
    wanted = dict(leaves(into))
    there = metadata.state_dict_metadata
    for name, tensor in wanted.items():
        entry = there.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"checkpoint {path} has no tensor {name}",
                hint=f"use the model that it was made with; {nearest(name, there)}",
            )
        if entry.size != tensor.shape:
            raise CheckpointError(
                f"checkpoint {path}: {name} has shape {tuple(entry.size)}, but the model's has {tuple(tensor.shape)}",
                hint="use the model that the checkpoint was made with",
            )


def leaves(tree: Tensors, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors with their dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _SafeReader(FileSystemReader):
    """DCP's reader with a restricted unpickler, which only admits the classes of the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            try:
                metadata = _RestrictedUnpickler(stream).load()
            except Exception as error:  # damaged bytes may raise almost anything
                raise CheckpointError(
                    f"the index of checkpoint {self.path} cannot be read: {cause(error)}",
                    hint="resume from an earlier one",
                ) from None
        if not (isinstance(metadata, Metadata) and hasattr(metadata, "state_dict_metadata")):
            raise CheckpointError(
                f"the index of checkpoint {self.path} is not an index", hint="resume from an earlier one"
            )
        if why := _misfit(metadata, Path(self.path)):
            raise CheckpointError(
                f"the index of checkpoint {self.path} is damaged: {why}", hint="resume from an earlier one"
            )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _misfit(metadata: Metadata, path: Path) -> str:
    """Return why an index cannot belong to the files next to it, or an empty string. Call before allocating memory.

    torch allocates whatever the index says, and opens the files that it names.
    """
    there = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    parts: dict[str, set[tuple[int, ...]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        name, offset, length = info.relative_path, info.offset, info.length
        if name not in there:
            return f"it names a file {name!r:.100}, which is not in the checkpoint"
        if not (_are_counts([offset, length]) and offset + length <= there[name]):
            return f"it places {index.fqn!r:.100} beyond the end of {name}"
        parts.setdefault(index.fqn, set()).add(tuple(index.offset or ()))
    most = sum(there.values())
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        size, kind = list(entry.size), entry.properties.dtype
        if not (isinstance(kind, torch.dtype) and _are_counts(size) and math.prod(size) * kind.itemsize <= most):
            return f"it gives {name!r:.100} the shape {size!r:.60} of {kind}, more than all files hold"
        for chunk in entry.chunks:
            places = [list(chunk.offsets), list(chunk.sizes)]
            fits = all(len(one) == len(size) and _are_counts(one) for one in places)
            if not fits or any(at + length > all_ for at, length, all_ in zip(*places, size, strict=True)):
                return f"it places a part of {name!r:.100} outside its shape {size!r:.60}"
            if 0 not in chunk.sizes and tuple(chunk.offsets) not in parts.get(name, ()):
                return f"it names no file for a part of {name!r:.100}"
    return ""


def _are_counts(values: Sequence[object]) -> bool:
    return all(isinstance(value, int) and 0 <= value < 2**63 for value in values)


_ADMITTED: Final = {
    "torch.distributed.checkpoint.metadata": None,  # all of its own classes: they are plain records
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get(module, set())
        found = None
        # A dotted name would reach through a module into its imports, whose constructors may do anything.
        if "." not in name and (admitted is None or name in admitted):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None or (admitted is None and not (isinstance(found, type) and found.__module__ == module)):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")
        return found
