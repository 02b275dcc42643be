"""webdataset over the same tars: the pipeline that its documentation recommends, and its WebLoader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from .cases import Case
from .contender import Contender, to_tensor

SHUFFLE = 1000


class Webdataset(Contender):
    name = "webdataset"
    packages = ("webdataset",)
    data = "disttrain"
    skips = True

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(SHUFFLE)
        if case.kind == "tokens":
            samples = samples.to_tuple("bin").map_tuple(partial(np.frombuffer, dtype=np.int32))
        elif case.kind == "record":
            samples = samples.to_tuple("bin", "cls").map_tuple(partial(np.frombuffer, dtype=np.uint8), int)
        elif case.kind == "image":
            samples = samples.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(to_tensor, int)
        else:
            samples = samples.to_tuple("jpg", "cls").map_tuple(bytes, int)
        self._loader = wds.WebLoader(
            samples.batched(case.batch), batch_size=None, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        return super().unpack(batch[0] if self.case.kind == "tokens" else batch)


THE_CONTENDER = Webdataset
