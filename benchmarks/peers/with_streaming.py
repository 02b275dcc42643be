"""MosaicML Streaming over its MDS shards, through its StreamingDataLoader."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from .cases import BLOCK_TOKENS, RECORD_BYTES, Case
from .contender import Contender, decode, sample_of, value_of


class _Samples(StreamingDataset):  # type: ignore[misc]
    """As its documentation says: a transform goes into ``__getitem__``."""

    def __init__(self, case: Case, folder: Path, backend: str) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=case.batch)
        self._case, self._backend = case, backend

    def __getitem__(self, at: int) -> Any:
        sample = super().__getitem__(at)
        payload = sample["payload"]
        value = decode(payload, self._backend) if self._case.kind == "image" else payload
        return sample_of(self._case, sample.get("number"), value)


class Streaming(Contender):
    name = "streaming"
    packages = ("mosaicml-streaming",)

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        self._loader = StreamingDataLoader(
            _Samples(case, folder, backend),
            batch_size=case.batch,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        encodings = {"record": f"ndarray:uint8:{RECORD_BYTES}", "tokens": f"ndarray:int32:{BLOCK_TOKENS}"}
        columns = {"payload": encodings.get(case.kind, "bytes"), **({"number": "int"} if case.has_label else {})}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for number, payload in case.samples():
                value = payload if case.extension == "jpg" else value_of(case, payload, "")
                writer.write({"payload": value, **({"number": number} if case.has_label else {})})

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()

    @staticmethod
    def clean() -> None:
        clean_stale_shared_memory()

    def close(self) -> None:
        del self._loader
        gc.collect()
        self.clean()  # else it refuses the folder to a second data set of the process


THE_CONTENDER = Streaming
