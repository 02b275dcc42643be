"""torchdata's StatefulDataLoader over a map-style set of loose files, one a sample, with a table of labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from .cases import Case
from .contender import Contender, sample_of, value_of

FOLDER_FILES = 1000


def _path(folder: Path, number: int) -> str:
    return f"{folder}/{number // FOLDER_FILES:04d}/{number:08d}"


class _Files(Dataset[Any]):
    def __init__(self, case: Case, folder: Path, backend: str) -> None:
        self._case, self._folder, self._backend = case, folder, backend
        self._labels = np.load(folder / "labels.npy").tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: int) -> Any:
        with open(_path(self._folder, number), "rb", buffering=0) as file:
            value = value_of(self._case, file.read(), self._backend)
        return sample_of(self._case, self._labels[number], value)


class Torchdata(Contender):
    name = "torchdata"
    packages = ("torchdata",)
    backends: ClassVar[tuple[str, ...]] = ("pillow", "simplejpeg")

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        self._loader: StatefulDataLoader[Any] = StatefulDataLoader(
            self.samples(),
            batch_size=case.batch,
            shuffle=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def samples(self) -> Dataset[Any]:
        return _Files(self.case, self.folder, self.backend)

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        for number, payload in case.samples():
            path = Path(_path(folder, number))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(payload)
        np.save(folder / "labels.npy", np.arange(case.num_samples))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()


THE_CONTENDER = Torchdata
