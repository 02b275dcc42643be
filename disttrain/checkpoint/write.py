"""How a checkpoint is written and committed, by all ranks together.

All ranks write into a temporary directory, whose name holds the attempt's id, and sync their files; checksums are
made on the way. Rank 0 adds ``meta.pt``, renames the directory, writes the marker, replaces ``LATEST``. A kill at
any moment leaves the earlier checkpoints as they were. A failure on any rank is an error on all, and what was
written of it is removed, so that a full disk does not stay full. Collectives are those of the group given: a
background thread has its own.
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

from disttrain.checkpoint.checksum import Sum, Sums, sum_of
from disttrain.checkpoint.fence import Attempt, guard
from disttrain.checkpoint.marker import FORMAT, LATEST, META, TEMPORARY, About, free_path, write_marker
from disttrain.checkpoint.store import Tensors, cause, leaves
from disttrain.errors import CheckpointError
from disttrain.files import check_held, make_folder, open_directory, sync_directory, sync_records, write_synced
from disttrain.parallel.agree import is_distributed, raise_together

_TENSOR_OVERHEAD_BYTES = 1500
"""What the format adds to a tensor: a zip archive of its own, and an entry of the index."""


class SpoiltError(CheckpointError):
    """Weights that are not finite, of which no checkpoint is made. The same on all ranks."""


@dataclass(frozen=True)
class Job:
    """A checkpoint to write: what one rank gives to it.

    Attributes:
        final: its directory once it is committed; the same on every rank, and free.
        tensors: what this rank writes. Replicated tensors may be on one rank alone.
        meta: everything else, serialized; None but on rank 0.
        about: what the marker says.
        attempt: who may publish it; None where nobody else could.
        finite: dotted names of tensors that must hold finite numbers alone.
        records: the run's folder, whose records are on disk before the marker is.
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
        """Where it is written to."""
        label = f".{self.attempt.label}" if self.attempt else ""
        return self.final.with_name(f"{self.final.name}{label}{TEMPORARY}")

    def run(self, group: dist.ProcessGroup | None = None) -> None:
        """Write and commit. A collective of the group, by default of all ranks.

        Raises:
            FencedError: a newer attempt has begun. Other ranks raise a ``RankError``.
            SpoiltError: a tensor is not finite that has to be; on all ranks, and nothing is written.
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
                    # A directory that a newer attempt has moved away looks like an error of the disk's.
                    guard(self.final.parent, self.attempt)
            raise

    def _write(self, group: dist.ProcessGroup | None, lead: bool) -> None:
        directory, sums = self.final.parent, Sums()
        told = _gather((_own_bytes(self.tensors), _first_spoilt(self.tensors, self.finite)), group)
        num_bytes = sum(own for own, _ in told) + len(self.meta or b"")
        if spoilt := next((name for _, name in told if name), ""):
            raise SpoiltError(
                f"its weights are not finite ({spoilt.removeprefix('model.')})",
                mend="use a lower learning rate or gradient clipping; guard.enabled: false saves such weights too",
            )
        with raise_together(group), file_errors(self.temporary, sums):
            if lead:
                guard(directory, self.attempt)
                make_folder(directory)
                _check_space(directory, num_bytes)
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()
        with raise_together(group), file_errors(self.temporary, sums):
            # Nothing copied ahead: PyTorch would do that on a CUDA stream wherever there is a device, and so start CUDA
            # beside a training on the CPU. Of a save in the background the tensors are on the CPU already.
            writer = FileSystemWriter(self.temporary, sync_files=True, per_thread_copy_ahead=0)
            writer.fs = _SummingFileSystem(sums)
            # Each replicated tensor is written by one rank; the planner spreads those that several ranks bring.
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
        # Whatever the library wrote by another way than through the summed files is read once.
        entries = {name: files.get(name) or sum_of(path) for name, path in there.items()}
        with open_directory(self.temporary) as opened:
            os.fsync(opened)
            guard(directory, self.attempt)
            os.rename(self.temporary, self.final)
            try:
                sync_directory(directory)
                guard(directory, self.attempt)
                # Into the directory that was written, not into one of a newer attempt that may have its name by now.
                write_marker(opened, self.about, entries)
            except BaseException:
                self._take_back(opened)
                raise
        # A newer attempt says that it is there, then clears: after this look the temporary file would be gone.
        label = self.attempt.label if self.attempt else ""
        write_synced(
            directory / LATEST, f"{self.final.name}\n", label=label, check=partial(guard, directory, self.attempt)
        )
        sync_directory(directory)

    def _take_back(self, opened: int) -> None:
        """Undo the rename of what gets no marker, so that it is removed; on a full disk it would fill it for good."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(opened), os.stat(self.final)):  # not what a newer attempt has put there
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
    """Write and commit a checkpoint now. A collective: every rank calls it with its own part of the tensors.

    Args:
        directory: the run's folder of checkpoints.
        name: name of this one; a number is added where it is taken.
        tensors: what each rank holds.
        meta: everything else, the same on every rank: plain values and tensors.
        global_step: optimizer steps done.
        about: what the marker says besides the step.
        attempt: who may publish it.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: ``meta`` holds what could only be unpickled, or a file cannot be written. Earlier
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
    """What a checkpoint holds besides tensors, as a file that can be read without unpickling.

    Raises:
        CheckpointError: it holds what could only be unpickled.
    """
    stream = io.BytesIO()
    torch.save({"format": FORMAT, **meta}, stream)
    stream.seek(0)
    try:  # what could not be loaded again is found now, not when the run is to resume
        torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the state to save holds an object that could only be unpickled: {cause(error)}",
            mend="keep plain values and tensors in state_dict() and on_save_checkpoint() of callbacks and modules",
        ) from None
    return stream.getvalue()


def from_lead(value: Any) -> Any:
    """Rank 0's value on all ranks: folders may look different from node to node for a while. A collective."""
    if not is_distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@contextmanager
def file_errors(path: Path, sums: Sums | None = None) -> Iterator[None]:
    """Report a file's error as a checkpoint's, by what the system said first."""
    try:
        yield
    except (OSError, CheckpointException, RuntimeError) as error:
        first = (sums and sums.error) or error
        if isinstance(first, RuntimeError):
            raise  # a bug, or a peer that is gone
        raise CheckpointError(
            f"cannot write checkpoint {path}: {cause(first)}",
            mend="check free space, quota and permissions of the run folder",
        ) from error


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: it takes about {num_bytes:,} bytes, {free:,} are free",
            mend="free space, keep fewer checkpoints (checkpoint.keep_last, keep_best), or move trainer.run_dir",
        )


def _own_bytes(tensors: Tensors) -> int:
    return round(sum(_bytes_of(tensor) + _TENSOR_OVERHEAD_BYTES for _, tensor in leaves(tensors)))


def _first_spoilt(tensors: Tensors, names: frozenset[str]) -> str:
    """The first of these tensors, of those that are here, that holds a number that is not finite; or an empty text."""
    for name, tensor in leaves(tensors):
        if name in names:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                continue
            # Both ends are not a number where any element is not; and no copy of the tensor is made.
            if local.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(local.detach())):
                return name
    return ""


def _bytes_of(tensor: torch.Tensor) -> float:
    """What a rank will write of a tensor; where several hold the same, each its share."""
    if not isinstance(tensor, DTensor):
        return tensor.nbytes
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        copies *= tensor.device_mesh.size(axis) if isinstance(placement, Replicate) else 1
    return tensor.to_local().nbytes / copies


def _gather(own: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, by rank. A collective of the group."""
    if not is_distributed():
        return [own]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own, group=group)
    return told


class _SummingFileSystem(FileSystem):
    """DCP's file system, whose files are summed while they are written."""

    def __init__(self, sums: Sums) -> None:
        super().__init__()
        self._sums = sums

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """The temporary directory is there: DCP's own way would make a run's folder anew that was removed meanwhile."""
        check_held(Path(path))
        with suppress(FileExistsError):  # asked of the server, where this node's cache may not show it yet
            os.mkdir(path)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; the index is written under a temporary name."""
        path = Path(path)
        if mode != "wb":
            with super().create_stream(path, mode) as other:
                yield other
            return
        with self._sums.summed(path, name=path.name.removesuffix(TEMPORARY)) as stream:
            yield stream
