"""torchdata's StatefulDataLoader over one array in one file, mapped: for samples of one size, the least there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from .cases import Case
from .contender import value_of
from .with_torchdata import Torchdata


class _Rows(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        labels = folder / "labels.npy"
        self._labels = np.load(labels).tolist() if labels.exists() else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return self._rows[number] if self._labels is None else (self._rows[number], self._labels[number])


class Memmap(Torchdata):
    name = "memmap"
    letters = "ad"
    backends: ClassVar[tuple[str, ...]] = ("pillow",)

    def samples(self) -> Dataset[Any]:
        return _Rows(self.folder)

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        np.save(folder / "rows.npy", np.stack([value_of(case, payload, "") for _, payload in case.samples()]))
        if case.has_label:
            np.save(folder / "labels.npy", np.arange(case.num_samples))


THE_CONTENDER = Memmap
