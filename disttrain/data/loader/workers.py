"""Worker processes that make micro batches, for transforms and decoders that hold the GIL.

Each reading thread of the trainer uses one process: it sends ids and copies the resulting arrays out of shared memory;
everything else is pickled through a pipe. The batches are bit-identical to those made by threads, in the same order. A
process exits when its trainer does, however the trainer dies, because it then reads EOF from its pipe. Cost: one
interpreter start per node, one fork per process, one copy of each batch.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.allowed_values import Allowed
from disttrain.data.decode.field import Field
from disttrain.data.decode.rng import Draws
from disttrain.data.index.shard_index import Shard, ShardIndex
from disttrain.data.loader.batches import Batch, BatchMaker
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError, DataError, DisttrainError

_ALIGN: Final = 64
_FIRST_BYTES: Final = 2**20
_JOIN_SECONDS: Final = 5.0
_SECOND_RUN: Final = 93
"""Exit code of a worker process in which the user's script started a second training run."""


@dataclass(frozen=True)
class MakerSpec:
    """What another process needs to make the same batches.

    Attributes:
        shards: the shards of the index.
        name: name of the data in error messages.
        fields: the fields of a batch.
        hooks: transform and collate.
        cache: cache for remote shards.
        unsafe_decoders: unsafe decoders that are allowed.
        allowed: the numbers that fields may hold.
        skip_bad: mask bad samples.
    """

    shards: tuple[Shard, ...]
    name: str
    fields: Mapping[str, Field]
    hooks: HooksConfig
    cache: CacheConfig
    unsafe_decoders: tuple[str, ...]
    allowed: Mapping[str, Allowed]
    skip_bad: bool

    @classmethod
    def of(cls, maker: BatchMaker) -> MakerSpec:
        """Return the spec of a maker."""
        reader = maker.reader
        return cls(
            reader.index.shards,
            reader.index.name,
            reader.fields,
            maker.hooks,
            reader.store.config,
            tuple(sorted(reader.unsafe_decoders)),
            maker.allowed,
            maker.skip_bad,
        )

    def build(self) -> BatchMaker:
        """Build a maker of the same batches."""
        index = ShardIndex(self.shards, name=self.name, retry=self.cache.retry)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer has warned already
            reader = Reader(index, self.fields, cache=self.cache, unsafe_decoders=self.unsafe_decoders)
        return BatchMaker(reader, self.hooks, allowed=self.allowed, skip_bad=self.skip_bad)


class WorkerPool:
    """Processes, each lent to one thread at a time. They start when first needed and serve any maker.

    Args:
        num_workers: how many.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        self._workers: list[_Worker] = []
        for _ in range(num_workers):
            self._idle.put(None)  # a slot for a process not yet started
        weakref.finalize(self, _close_all, self._workers)

    def make(
        self, maker: BatchMaker, ids: NDArray[np.int64], counts: NDArray[np.int64] | None, draws: Draws | None
    ) -> list[Batch]:
        """Run :meth:`BatchMaker.make` in one of the processes.

        Raises:
            DisttrainError: raised by the maker.
            ConfigError: a hook cannot be pickled.
            DataError: the process died.
        """
        refuse_second_run()
        with self._lent() as worker:
            return worker.make(maker, ids, counts, draws)

    def close(self) -> None:
        """Stop the processes; a later :meth:`make` starts new ones."""
        _close_all(self._workers)

    @contextmanager
    def _lent(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            if worker is None or worker.is_closed:
                worker = _Worker()
                self._workers.append(worker)
            yield worker
        finally:
            self._idle.put(worker)


def refuse_second_run() -> None:
    """Exit a worker process that starts training while it imports the user's script to find the hooks.

    The owner reports the reason. At this point no rank has joined and no run folder is claimed.
    """
    # multiprocessing sets _inheriting while a child imports the parent's main module.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_SECOND_RUN)


def _script() -> str:
    return str(getattr(sys.modules.get("__main__"), "__file__", None) or "the script")


def _close_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().close()


class _Worker:
    """One process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._fd = os.memfd_create("disttrain-worker")
        os.ftruncate(self._fd, _FIRST_BYTES)
        self._arena = mmap.mmap(self._fd, 0)
        self._sent: set[int] = set()
        self.is_closed = False
        self._process = context.Process(target=_serve, args=(theirs, _Handle(self._fd)), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some Python versions warn about starting a process while threads run
            self._process.start()
        theirs.close()

    def make(
        self, maker: BatchMaker, ids: NDArray[np.int64], counts: NDArray[np.int64] | None, draws: Draws | None
    ) -> list[Batch]:
        number = maker.number
        spec = None if number in self._sent else MakerSpec.of(maker)
        try:
            self._connection.send_bytes(_pickled_task((number, spec, ids, counts, draws)))
            self._sent.add(number)
            pickled, spans, size, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_JOIN_SECONDS)
            code = self._process.exitcode
            self.close()
            if code == _SECOND_RUN:
                raise ConfigError(
                    f"{_script()} starts training when imported: a worker process, which imports it, would start a"
                    " second training run",
                    hint='put its main code under `if __name__ == "__main__":`, or use loader.workers 0',
                ) from None
            raise DataError(
                f"a worker process ended with exit code {code} while making a batch of {maker.reader.index.name}",
                hint="code -9 usually means out of memory: lower data.loader.workers or data.loader.prefetch_mib; code"
                " -7 means that a shard was cut off or its disk failed; otherwise check data.hooks",
            ) from None
        if error is not None:
            raise error
        if size > len(self._arena):  # the process has grown the file, but a mapping keeps its length
            self._arena.close()
            self._arena = mmap.mmap(self._fd, 0)
        # Copy, because the process reuses this memory for its next batches.
        view = memoryview(self._arena)
        buffers = [np.frombuffer(view[at : at + length], np.uint8).copy() for at, length in spans]
        batches: list[Batch] = pickle.loads(pickled, buffers=buffers)
        return batches

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self._connection.close()
        self._process.join(_JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        with suppress(BufferError):
            self._arena.close()
        os.close(self._fd)


class _Handle:
    """A file descriptor that can be passed to a starting process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.fd),)


def _received(handle: Any) -> _Handle:
    return _Handle(handle.detach())


def _pickled_task(task: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"data.hooks cannot be sent to worker processes: {error}",
            hint="use functions and classes defined at a module's top level, or data.loader.workers 0",
        ) from None


def _serve(connection: Connection, handle: _Handle) -> None:
    """Main loop of a worker process: serve requests until the pipe closes."""
    # Leave signals to the trainer: Ctrl-C, those a launcher sends to the trainer's process group, and those SLURM
    # sends to every process of a step. The trainer needs batches to finish its step, and then closes the pipe.
    os.setpgid(0, 0)
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(request, signal.SIG_IGN)
    torch.set_num_threads(1)
    arena = mmap.mmap(handle.fd, 0)
    makers: dict[int, BatchMaker] = {}
    while True:
        try:
            number, spec, ids, counts, draws = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if spec is not None:
                makers[number] = spec.build()
            pickled, buffers = _pickled_batches(makers[number].make(ids, counts, draws))
            spans, size = _layout(buffers)
            if size > len(arena):
                arena.close()
                os.ftruncate(handle.fd, 2 * size)
                arena = mmap.mmap(handle.fd, 0)
            for (at, length), buffer in zip(spans, buffers, strict=True):
                arena[at : at + length] = buffer
            answer: tuple[Any, ...] = (pickled, spans, size, None)
        except Exception as error:  # any error is reported to the trainer
            answer = (b"", (), 0, _portable(error))
        with suppress(BrokenPipeError):
            connection.send_bytes(pickle.dumps(answer))


def _portable(error: Exception) -> Exception:
    """Return an error that survives pickling, with its traceback as a note."""
    if isinstance(error, DisttrainError):
        return error
    import traceback

    text = "".join(traceback.format_exception(error))
    try:
        rebuilt = pickle.loads(pickle.dumps(error))
    except Exception:  # pickling a custom exception class may raise anything
        rebuilt = RuntimeError(f"{type(error).__name__}: {error}")
    rebuilt.add_note(f"in a worker process:\n{text}")
    assert isinstance(rebuilt, Exception)
    return rebuilt


class _BatchPickler(pickle.Pickler):
    """Pickles tensors as arrays whose bytes are passed out of band."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            dtype = obj.dtype
            # NumPy has no bfloat16, so send its bits as int16.
            plain = obj.view(torch.int16) if dtype == torch.bfloat16 else obj
            array = np.asarray(plain.detach().numpy(), order="C")  # unlike ascontiguousarray, keeps shape ()
            return _tensor, (array, dtype == torch.bfloat16)
        return NotImplemented


def _tensor(array: NDArray[Any], is_bfloat16: bool) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def _pickled_batches(batches: list[Batch]) -> tuple[bytes, list[memoryview]]:
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        buffers.append(buffer.raw())
        return False

    stream = io.BytesIO()
    _BatchPickler(stream, protocol=5, buffer_callback=keep).dump(batches)
    return stream.getvalue(), buffers


def _layout(buffers: Sequence[memoryview]) -> tuple[list[tuple[int, int]], int]:
    """Return where each buffer goes in shared memory, and the total size."""
    spans, end = [], 0
    for buffer in buffers:
        spans.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // _ALIGN) * _ALIGN
    return spans, end
