"""Write and commit a checkpoint, on all ranks together.

All ranks write to a temporary directory named after the attempt, computing checksums on the way, and sync their files.
Rank 0 adds ``meta.pt``, renames the directory, writes the marker and replaces ``LATEST``. A kill at any moment leaves
earlier checkpoints intact. A failure on any rank raises on all ranks, and the partial checkpoint is deleted, so that a
full disk does not stay full. Collectives use the given group; a background thread has its own.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, Replicate

from disttrain.checkpoint.format.checksum import Sum, Sums, sum_of
from disttrain.checkpoint.format.fence import Attempt, guard
from disttrain.checkpoint.format.marker import FORMAT, LATEST, META, TEMPORARY, About, free_path, write_marker
from disttrain.checkpoint.format.reader import Tensors, cause, leaves
from disttrain.distributed.synchronize_errors import is_distributed, raise_together
from disttrain.errors import CheckpointError
from disttrain.system.files import check_held, make_folder, open_directory, sync_directory, sync_records, write_synced

_TENSOR_OVERHEAD_BYTES = 1500
"""What the format adds per tensor: a zip archive and an index entry."""


class SpoiltError(CheckpointError):
    """Weights are not finite, so no checkpoint is written. Raised on all ranks."""


@dataclass(frozen=True)
class Job:
    """One rank's part of a checkpoint to write.

    Attributes:
        final: its directory once committed; the same on every rank, and not yet existing.
        tensors: what this rank writes. Replicated tensors may be on a single rank.
        meta: everything else, serialized; None except on rank 0.
        about: what the marker records.
        attempt: the attempt of this process; None if no other process can interfere.
        finite: dotted names of tensors that may only hold finite numbers.
        records: the run folder, whose records are flushed to disk before the marker is written.
    """

    final: Path
    tensors: Tensors
    meta: bytes | None
    about: About
    attempt: Attempt | None = None
    finite: frozenset[str] = frozenset()
    records: Path | None = None

    @property
    def temporary(self) -> Path:
        """The directory it is written to before the commit."""
        label = f".{self.attempt.label}" if self.attempt else ""
        return self.final.with_name(f"{self.final.name}{label}{TEMPORARY}")

    def run(self, group: dist.ProcessGroup | None = None) -> None:
        """Write and commit. Collective over the group (default: all ranks).

        Raises:
            FencedError: a newer attempt has begun. Other ranks raise a ``RankError``.
            SpoiltError: a tensor in ``finite`` is not finite; raised on all ranks, and nothing is written.
            CheckpointError: a file cannot be written. Earlier checkpoints are untouched. Ranks that did not fail
                raise a ``RankError``.
        """
        lead = not is_distributed() or dist.get_rank() == 0
        try:
            self._write(group, lead)
        except BaseException:
            if lead:
                shutil.rmtree(self.temporary, ignore_errors=True)
                with suppress(OSError):
                    # If a newer attempt moved the directory away, the failure looks like a disk error.
                    guard(self.final.parent, self.attempt)
            raise

    def _write(self, group: dist.ProcessGroup | None, lead: bool) -> None:
        directory, sums = self.final.parent, Sums()
        told = _gather((_own_bytes(self.tensors), _first_spoilt(self.tensors, self.finite)), group)
        num_bytes = sum(own for own, _ in told) + len(self.meta or b"")
        if spoilt := next((name for _, name in told if name), ""):
            raise SpoiltError(
                f"its weights are not finite ({spoilt.removeprefix('model.')})",
                hint="use a lower learning rate or gradient clipping; guard.enabled: false saves such weights too",
            )
        with raise_together(group), file_errors(self.temporary, sums):
            if lead:
                guard(directory, self.attempt)
                make_folder(directory)
                _check_space(directory, num_bytes)
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()
        with raise_together(group), file_errors(self.temporary, sums):
            # No copy-ahead: PyTorch would use a CUDA stream for it on any machine with a GPU, and so initialize CUDA
            # even for CPU training. In a background save the tensors are already on the CPU.
            writer = FileSystemWriter(self.temporary, sync_files=True, per_thread_copy_ahead=0)
            writer.fs = _SummingFileSystem(sums)
            # Each replicated tensor is written by one rank; the planner balances those that several ranks hold.
            dcp_save(self.tensors, storage_writer=writer, planner=DefaultSavePlanner(), process_group=group)
            if self.records is not None:
                sync_records(self.records, dist.get_rank() if is_distributed() else 0)
        files = {name: entry for rank in _gather(sums.files, group) for name, entry in rank.items()}
        with raise_together(group), file_errors(self.temporary, sums):
            if lead:
                assert self.meta is not None
                with sums.summed(self.temporary / META) as file:
                    file.write(self.meta)
                    file.sync()
                self._publish({**files, **sums.files})

    def _publish(self, files: dict[str, Sum]) -> None:
        directory = self.final.parent
        there = {path.name: path for path in self.temporary.iterdir()}
        # Read back, once, any file the library wrote without going through the summed streams.
        entries = {name: files.get(name) or sum_of(path) for name, path in there.items()}
        with open_directory(self.temporary) as opened:
            os.fsync(opened)
            guard(directory, self.attempt)
            os.rename(self.temporary, self.final)
            try:
                sync_directory(directory)
                guard(directory, self.attempt)
                # By descriptor: a newer attempt may by now have a directory of its own at this path.
                write_marker(opened, self.about, entries)
            except BaseException:
                self._take_back(opened)
                raise
        # A newer attempt writes ATTEMPT, then clears: a temporary file made after our check is then gone.
        label = self.attempt.label if self.attempt else ""
        write_synced(
            directory / LATEST, f"{self.final.name}\n", label=label, check=partial(guard, directory, self.attempt)
        )
        sync_directory(directory)

    def _take_back(self, opened: int) -> None:
        """Undo the rename of a directory that gets no marker, so that it is deleted and frees its disk space."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(opened), os.stat(self.final)):  # not a newer attempt's directory
                os.rename(self.final, self.temporary)


def write(
    directory: Path,
    name: str,
    *,
    tensors: Tensors,
    meta: dict[str, Any],
    global_step: int,
    about: About | None = None,
    attempt: Attempt | None = None,
) -> Path:
    """Write and commit a checkpoint now. Collective: every rank passes its own part of the tensors.

    Args:
        directory: the run's checkpoint folder.
        name: name of the checkpoint; a number is appended if it is taken.
        tensors: what each rank holds.
        meta: everything else, the same on every rank: plain values and tensors.
        global_step: optimizer steps done.
        about: what the marker records besides the step.
        attempt: the attempt of this process.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: ``meta`` holds something that could only be unpickled, or a file cannot be written. Earlier
            checkpoints are untouched. Ranks that did not fail raise a ``RankError``.
    """
    lead = not is_distributed() or dist.get_rank() == 0
    final = Path(from_lead(str(free_path(directory, name))))
    packed = None
    with raise_together():
        packed = pack_meta(meta) if lead else None
    about = replace(about or About(global_step), global_step=global_step)
    Job(final, tensors, packed, about, attempt).run()
    return final


def pack_meta(meta: dict[str, Any]) -> bytes:
    """Serialize everything besides tensors to a file that loads without unpickling.

    Raises:
        CheckpointError: it holds something that could only be unpickled.
    """
    stream = io.BytesIO()
    torch.save({"format": FORMAT, **meta}, stream)
    stream.seek(0)
    try:  # load it back now, so that unloadable state fails the save and not the resume
        torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the state to save holds an object that would need unpickling: {cause(error)}",
            hint="return only plain values and tensors from state_dict() and on_save_checkpoint()",
        ) from None
    return stream.getvalue()


def from_lead(value: Any) -> Any:
    """Broadcast rank 0's value: on shared storage, nodes may see different directory contents. Collective."""
    if not is_distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@contextmanager
def file_errors(path: Path, sums: Sums | None = None) -> Iterator[None]:
    """Reraise file errors as a ``CheckpointError`` with the OS's first message."""
    try:
        yield
    except (OSError, CheckpointException, RuntimeError) as error:
        first = (sums and sums.error) or error
        if isinstance(first, RuntimeError):
            raise  # a bug, or a lost peer
        raise CheckpointError(
            f"cannot write checkpoint {path}: {cause(first)}",
            hint="check free space, quota and permissions of the run folder",
        ) from error


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: it needs about {num_bytes:,} bytes, but only {free:,} are free",
            hint="free space, keep fewer checkpoints (checkpoint.keep_last, keep_best), or move trainer.run_dir",
        )


def _own_bytes(tensors: Tensors) -> int:
    return round(sum(_bytes_of(tensor) + _TENSOR_OVERHEAD_BYTES for _, tensor in leaves(tensors)))


def _first_spoilt(tensors: Tensors, names: frozenset[str]) -> str:
    """Return the name of the first local tensor among ``names`` with a non-finite element, or an empty string."""
    for name, tensor in leaves(tensors):
        if name in names:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                continue
            # aminmax() returns NaN at both ends if any element is NaN, and does not copy the tensor.
            if local.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(local.detach())):
                return name
    return ""


def _bytes_of(tensor: torch.Tensor) -> float:
    """Return the bytes a rank writes of a tensor; replicas count an equal share each."""
    if not isinstance(tensor, DTensor):
        return tensor.nbytes
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        copies *= tensor.device_mesh.size(axis) if isinstance(placement, Replicate) else 1
    return tensor.to_local().nbytes / copies


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Gather every rank's value, in rank order. Collective over the group."""
    if not is_distributed():
        return [own]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own, group=group)
    return told


class _SummingFileSystem(FileSystem):
    """DCP's file system, with checksums computed while writing."""

    def __init__(self, sums: Sums) -> None:
        super().__init__()
        self._sums = sums

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Accept the existing directory: DCP's version would recreate a run folder that was removed meanwhile."""
        check_held(Path(path))
        with suppress(FileExistsError):  # asks the file server; this node's NFS cache may not show the directory yet
            os.mkdir(path)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; DCP writes the index under a temporary name, which is stripped for its checksum."""
        path = Path(path)
        if mode != "wb":
            with super().create_stream(path, mode) as other:
                yield other
            return
        with self._sums.summed(path, name=path.name.removesuffix(TEMPORARY)) as stream:
            yield stream
