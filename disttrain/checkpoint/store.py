"""The folder of a run's checkpoints: what is committed, what is torn, and how one is written.

A checkpoint is a directory: tensors in torch.distributed.checkpoint's format (sharded, one file a rank), the
rest in ``meta.pt``, and the marker ``COMMITTED``, which lists every file with its size. All ranks write into
``NAME.tmp``; files are synced to disk; rank 0 renames the directory, then writes the marker, then replaces
``LATEST``. A checkpoint exists once its marker does and its files have the sizes it lists; anything else is
torn and is passed over with a reason. Nothing is unpickled: the tensors' index is read by a restricted
unpickler that admits the format's own classes only, the rest with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from disttrain.errors import CheckpointError, nearest
from disttrain.parallel.agree import is_distributed, raise_together

FORMAT: Final = 1
MARKER: Final = "COMMITTED"
LATEST: Final = "LATEST"
META: Final = "meta.pt"
_TEMPORARY: Final = ".tmp"

Tensors = dict[str, Any]
"""Nested dictionaries of tensors and DTensors; every leaf is a tensor."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint that exists.

    Attributes:
        path: its directory.
        global_step: optimizer steps done when it was taken.
    """

    path: Path
    global_step: int


def write(directory: Path, name: str, *, tensors: Tensors, meta: dict[str, Any], global_step: int) -> Path:
    """Write and commit a checkpoint. A collective: every rank calls it with its own part of the tensors.

    Args:
        directory: the run's folder of checkpoints.
        name: name of this one; a number is added where it is taken.
        tensors: what each rank holds.
        meta: everything else, the same on every rank: plain values and tensors.
        global_step: optimizer steps done.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: ``meta`` holds what could only be unpickled, or a file cannot be written. Earlier
            checkpoints are untouched. Ranks that did not fail raise a ``RankError``.
    """
    lead = not is_distributed() or dist.get_rank() == 0
    final = Path(_from_lead(str(free_path(directory, name))))
    temporary = directory / f"{final.name}{_TEMPORARY}"
    with raise_together(), _file_errors(temporary):
        if lead:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    with raise_together(), _file_errors(temporary):
        writer = FileSystemWriter(temporary, sync_files=True)
        # Each replicated tensor is written by one rank; the planner spreads them over the ranks.
        dcp_save(tensors, storage_writer=writer, planner=DefaultSavePlanner())
    with raise_together(), _file_errors(temporary):
        if lead:
            _write_meta(temporary / META, meta)
            _sync_directory(temporary)
            os.rename(temporary, final)
            _commit(final, global_step)
            _write_synced(directory / LATEST, f"{final.name}\n")
    return final


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        CheckpointError: it is not committed, torn, of a newer format, or would have to be unpickled.
    """
    check(path)
    try:
        meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
        if not isinstance(meta, dict):
            raise TypeError(f"it holds a {type(meta).__name__}")
    except Exception as error:  # damaged bytes may raise almost anything
        raise CheckpointError(
            f"{path / META} cannot be read without running code from it: {_cause(error)}",
            mend="resume from another checkpoint; this file was damaged or not written by disttrain",
        ) from None
    if meta.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {meta.get('format')}, this disttrain reads up to {FORMAT}",
            mend="install a newer disttrain",
        )
    return meta


def read_tensors(path: Path, into: Tensors) -> None:
    """Read tensors into given ones, in place, whatever their sharding. A collective.

    Raises:
        CheckpointError: a tensor is missing from the checkpoint or has another shape there.
    """
    with raise_together():
        reader = _SafeReader(path)
        _compare(path, reader.read_metadata(), into)
        with _damage_named(path):
            dcp_load(into, storage_reader=reader, planner=DefaultLoadPlanner())


def read_model(path: Path, *, group: str = "model") -> dict[str, torch.Tensor]:
    """All of a checkpoint's model tensors, whole, by parameter name. Needs no model and no process group.

    Args:
        path: the checkpoint.
        group: ``model``: the weights that are trained, and buffers; ``ema``: the averages, of trained parameters alone.

    Raises:
        CheckpointError: the checkpoint is not committed or torn, or has no such tensors.
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
        raise CheckpointError(f"checkpoint {path} has no tensors {group!r}", mend=nearest(group, there))
    with warnings.catch_warnings(), _damage_named(path):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp_load({group: tensors}, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    return tensors


def check(path: Path) -> Committed:
    """Make sure that a checkpoint is committed and whole by its marker and its files' sizes.

    Raises:
        CheckpointError: it is not; the message says why.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}", mend="name a directory under checkpoints/")
    try:
        marker = json.loads((path / MARKER).read_text())
        files: dict[str, int] = dict(marker["files"].items())
        step = int(marker["global_step"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} was never committed", mend="resume from an earlier one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"checkpoint {path} has a damaged {MARKER}", mend="resume from an earlier one") from None
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there} bytes"
            raise CheckpointError(
                f"checkpoint {path} is torn: {name} {state}, its marker says {size}", mend="resume from an earlier one"
            )
    return Committed(path, step)


def committed(directory: Path) -> tuple[list[Committed], list[str]]:
    """The checkpoints of a folder, oldest first, and why others there do not count."""
    found: list[Committed] = []
    passed_over: list[str] = []
    candidates = sorted(directory.iterdir()) if directory.is_dir() else []
    for path in candidates:
        if not path.is_dir():
            continue
        try:
            found.append(check(path))
        except CheckpointError as error:
            passed_over.append(error.what)
    return sorted(found, key=lambda c: (c.global_step, c.path.stat().st_mtime_ns)), passed_over


def remove(path: Path) -> None:
    """Delete a checkpoint: its marker first, so that an interrupted deletion leaves no half that counts."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Delete what writes that were killed have left under temporary names."""
    for path in directory.glob(f"*{_TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def free_path(directory: Path, name: str) -> Path:
    """A directory of that name that does not exist yet; a number is added where it does."""
    final, number = directory / name, 1
    while final.exists():
        number += 1
        final = directory / f"{name}.{number}"
    return final


def _from_lead(value: str) -> str:
    """Rank 0's value on all ranks: folders may look different from node to node for a while."""
    if not is_distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _commit(path: Path, global_step: int) -> None:
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    _write_synced(path / MARKER, json.dumps({"format": FORMAT, "global_step": global_step, "files": files}))
    _sync_directory(path.parent)


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save({"format": FORMAT, **meta}, file)
        file.flush()
        os.fsync(file.fileno())
    try:  # what could not be loaded again is found now, not when the run is to resume
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the state to save holds an object that could only be unpickled: {str(error).splitlines()[0]}",
            mend="keep plain values and tensors in state_dict() and on_save_checkpoint() of callbacks and modules",
        ) from None


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"cannot write checkpoint {path}: {_cause(error)}",
            mend="check free space, quota and permissions of the run folder",
        ) from error


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # derives from BaseException, so that `except Exception` would miss it
        raise CheckpointError(
            f"the tensors of checkpoint {path} cannot be read: {_cause(error)}",
            mend="resume from an earlier one",
        ) from error


def _cause(error: BaseException) -> str:
    """What went wrong in one line; of torch's exception for several ranks, the first rank's own error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()), (error,))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _compare(path: Path, metadata: Metadata, into: Tensors) -> None:
    wanted = dict(_leaves(into))
    there = metadata.state_dict_metadata
    for name, tensor in wanted.items():
        entry = there.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"checkpoint {path} has no tensor {name}",
                mend=f"use the model that it was made with; {nearest(name, there)}",
            )
        if entry.size != tensor.shape:
            raise CheckpointError(
                f"checkpoint {path}: {name} has shape {tuple(entry.size)}, the model's has {tuple(tensor.shape)}",
                mend="use the model that the checkpoint was made with",
            )


def _leaves(tree: Tensors, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _SafeReader(FileSystemReader):
    """DCP's reader, which unpickles its index; this one admits only the classes of that index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            try:
                metadata = _RestrictedUnpickler(stream).load()
            except Exception as error:  # damaged bytes may raise almost anything
                raise CheckpointError(
                    f"the index of checkpoint {self.path} cannot be read: {_cause(error)}",
                    mend="resume from an earlier one",
                ) from None
        if not (isinstance(metadata, Metadata) and hasattr(metadata, "state_dict_metadata")):
            raise CheckpointError(f"the index of checkpoint {self.path} is none", mend="resume from an earlier one")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_ADMITTED: Final = {
    "torch.distributed.checkpoint.metadata": None,  # its own classes: all of them are plain records
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
        # A dotted name would reach through a module into what it imports, whose constructors may do anything.
        if "." not in name and (admitted is None or name in admitted):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None or (admitted is None and not (isinstance(found, type) and found.__module__ == module)):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")
        return found
