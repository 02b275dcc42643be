"""grain over ArrayRecord files, batched in its MapDataset, as its documentation shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from .cases import Case
from .contender import Contender, parts_of, record_of, sample_of, value_of

AHEAD = 16


class _Parse:
    def __init__(self, case: Case, backend: str) -> None:
        self._case, self._backend = case, backend

    def __call__(self, record: bytes) -> Any:
        number, payload = parts_of(record) if self._case.has_label else (0, memoryview(record))
        value = value_of(self._case, payload, self._backend)
        return sample_of(self._case, number, value.numpy() if self._case.kind == "image" else value)


def _lists(samples: Any) -> Any:
    """JPEGs differ in size: they do not stack."""
    values, numbers = zip(*samples, strict=True)
    return list(values), np.array(numbers)


class Grain(Contender):
    name = "grain"
    packages = ("grain", "array_record")
    backends = ("pillow", "simplejpeg")
    ahead = 2 * AHEAD

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        source = grain.sources.ArrayRecordDataSource([str(path) for path in sorted(folder.glob("*.arrayrecord"))])
        batches = (
            grain.MapDataset.source(source)
            .shuffle(seed=0)
            .map(_Parse(case, backend))
            .batch(case.batch, batch_fn=_lists if case.kind == "jpeg" else None)
        )
        self._per_epoch = len(batches)
        # 16 threads are its default; its 500 batches ahead would be gigabytes of images.
        reading = batches.repeat().to_iter_dataset(grain.ReadOptions(num_threads=16, prefetch_buffer_size=AHEAD))
        if self.workers:
            reading = reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        self._running: Any = iter(reading)
        self._place = 0  # in the epoch
        if state is not None:
            self._place = state[0]
            self._running.set_state(state[1])

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        writer = None
        for number, payload in case.samples():
            if number % case.shard_samples == 0:
                if writer is not None:
                    writer.close()
                path = folder / f"train-{number // case.shard_samples:06d}.arrayrecord"
                # As it is recommended for reading at random: one record a group; and as all others, not compressed.
                writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            assert writer is not None
            writer.write(record_of(number, payload) if case.has_label else payload)
        if writer is not None:
            writer.close()

    def __iter__(self) -> Iterator[Any]:
        while self._place < self._per_epoch:
            self._place += 1
            yield next(self._running)
        self._place = 0

    def state(self) -> Any:
        return self._place, self._running.get_state()

    def close(self) -> None:
        self._running = None


THE_CONTENDER = Grain
