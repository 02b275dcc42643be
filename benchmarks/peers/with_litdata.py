"""litdata over its own chunks, through its StreamingDataLoader; tokens through its TokensLoader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming.item_loader import TokensLoader

from .cases import BLOCK_TOKENS, Case, cases
from .contender import Contender, decode, sample_of, value_of


def _sample(number: int, *, letter: str) -> Any:
    case = cases(quick=False)[letter]
    payload = case.payload(number)
    if case.kind == "tokens":
        return torch.from_numpy(value_of(case, payload, "").copy())
    return sample_of(case, number, payload if case.extension == "jpg" else value_of(case, payload, ""))


def _decoded(sample: Any, *, backend: str) -> Any:
    return decode(sample[0], backend), sample[1]


def _copied(sample: Any) -> Any:
    """As bytes, since its memoryviews do not go into a batch."""
    return bytes(sample[0]), sample[1]


class Litdata(Contender):
    name = "litdata"
    packages = ("litdata",)

    def __init__(self, case: Case, folder: Path, mode: str, backend: str, state: Any = None) -> None:
        super().__init__(case, folder, mode, backend, state)
        is_tokens = case.kind == "tokens"
        transforms = {"image": partial(_decoded, backend=backend), "jpeg": _copied}
        samples = litdata.StreamingDataset(
            str(folder),
            item_loader=TokensLoader(block_size=BLOCK_TOKENS) if is_tokens else None,
            shuffle=True,
            drop_last=False,
            transform=transforms.get(case.kind),
            batch_decode="all" if case.kind == "record" else "auto",  # which is several times as fast as "auto" here
        )
        self._loader = litdata.StreamingDataLoader(
            samples,
            batch_size=case.batch,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    @staticmethod
    def write(case: Case, folder: Path) -> None:
        is_tokens = case.kind == "tokens"
        litdata.optimize(
            fn=partial(_sample, letter=case.letter),
            inputs=list(range(case.num_samples)),
            output_dir=str(folder),
            num_workers=1,
            **({"chunk_size": 8192 * BLOCK_TOKENS} if is_tokens else {"chunk_bytes": "64MB"}),
            item_loader=TokensLoader() if is_tokens else None,
            verbose=False,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()


THE_CONTENDER = Litdata
