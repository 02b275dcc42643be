"""disttrain over its plain tars, with its sidecars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.loaders import LoaderConfig, TrainLoader
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.pack.samples import Sample, Samples
from disttrain.data.pack.shard_writer import write_shard
from disttrain.data.reader.sample_reader import Reader
from disttrain.parallel.config import BatchPlan

from .cases import BLOCK_TOKENS, RECORD_BYTES, SIDE, Case
from .contender import Contender


def field_of(case: Case, backend: str) -> Field:
    """The payload's field."""
    if case.kind == "record":
        return Field("bin", decoder="tensor", dtype="uint8", shape=(RECORD_BYTES,))
    if case.kind == "tokens":
        return Field("bin", decoder="tensor", dtype="int32", shape=(BLOCK_TOKENS,))
    if case.kind == "jpeg":
        return Field("jpg", decoder="bytes")
    return Field("jpg", shape=(3, SIDE, SIDE), backend=backend)


class Disttrain(Contender):
    name = "disttrain"
    packages = ("disttrain", "torch", "numpy", "pillow", "simplejpeg")
    modes = ("0", "2", "2p") if "workers" in {field.name for field in fields(LoaderConfig)} else ("0", "2")
    backends = ("pillow", "simplejpeg")

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        index = ShardIndex.open([str(path) for path in sorted(folder.glob("*.tar"))])
        labels = {"label": Field("cls")} if case.has_label else {}
        reader = Reader(index, {"payload": field_of(case, backend), **labels})
        order = Order(index.sizes, OrderConfig(global_batch_size=case.batch))
        config = LoaderConfig(threads=0, workers=self.workers) if mode == "2p" else LoaderConfig(threads=self.workers)
        self._position, self._step = state or (0, 0), 0
        self._loader = TrainLoader(
            reader, order, BatchPlan(case.batch, case.batch), config=config, position=lambda: self._position
        )

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        def sample(number: int) -> Sample:
            label = {"cls": str(number).encode()} if case.has_label else {}
            return Sample(f"{number:08d}", {case.extension: case.payload(number), **label})

        cuts = range(case.shard_samples, case.num_samples, case.shard_samples)
        for shard, ids in enumerate(np.split(np.arange(case.num_samples), cuts)):
            write_shard(Samples(case.num_samples, sample), ids, folder / f"train-{shard:06d}.tar", lambda _: None)

    def __iter__(self) -> Iterator[Any]:
        self._step = self._position[1]
        for batch in self._loader:
            self._step += 1
            yield batch
        self._position = (self._position[0] + 1, 0)

    def state(self) -> Any:
        return self._position[0], self._step

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        payload = batch["payload"]
        return payload, batch["label"] if self.case.has_label else payload[:, 0]


THE_CONTENDER = Disttrain
