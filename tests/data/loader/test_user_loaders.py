"""Where a resume continues in a loader that is not disttrain's: exactly there, or with what is lost in numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from disttrain import Checkpointing
from disttrain.errors import CheckpointError
from tests.support import foreign

SAMPLES, BATCH, EPOCHS, STOP = 22, 4, 3, 8  # 6 batches an epoch; the stop is in the middle of the second


class Noisy(foreign.Numbers):
    """Draws random numbers for each sample."""

    def __getitem__(self, number: int) -> Any:
        inputs, label, number = super().__getitem__(number)
        return inputs + 0.1 * torch.randn(inputs.shape), label, number


NUMBERS, NOISY = foreign.Numbers(SAMPLES), Noisy(SAMPLES)


def weighted() -> Any:
    return WeightedRandomSampler([1.0 + number % 3 for number in range(SAMPLES)], SAMPLES)


def dealt() -> Any:
    return DistributedSampler(NUMBERS, num_replicas=1, rank=0, shuffle=True, seed=3)


def of_its_own(sampler: Callable[..., Any]) -> DataLoader[Any]:
    return DataLoader(NUMBERS, BATCH, sampler=sampler(generator=torch.Generator().manual_seed(7)))


EXACT: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(NUMBERS, batch_size=BATCH),
    "shuffled": lambda: DataLoader(NOISY, batch_size=BATCH, shuffle=True, drop_last=True),
    "own generator": lambda: DataLoader(NUMBERS, BATCH, shuffle=True, generator=torch.Generator().manual_seed(7)),
    "sampler's generator": lambda: of_its_own(partial(RandomSampler, NUMBERS)),
    "subset's generator": lambda: of_its_own(partial(SubsetRandomSampler, range(SAMPLES))),
    "weights' generator": lambda: of_its_own(partial(WeightedRandomSampler, [1.0] * SAMPLES, SAMPLES)),
    "weighted": lambda: DataLoader(NUMBERS, batch_size=BATCH, sampler=weighted()),
    "dealt": lambda: DataLoader(NUMBERS, batch_size=BATCH, sampler=dealt()),
    "dealt by workers": lambda: DataLoader(
        NUMBERS, BATCH, sampler=dealt(), num_workers=1, multiprocessing_context="fork", persistent_workers=True
    ),
}


class First(foreign.Plain):
    """Takes the first of several loaders' batches."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch[0] if isinstance(batch[0], list) else batch)


def train(folder: Path, make: Callable[[], Any], *limits: int) -> list[list[int]]:
    """The samples of each batch of a run of one attempt for each limit; the loader is a new one each time."""
    seen: list[list[int]] = []
    modules: list[foreign.Plain] = []
    for number, steps in enumerate(limits):
        torch.manual_seed(number)  # must not matter
        trainer = foreign.trainer_of(folder, Checkpointing(every_steps=4), max_steps=steps)
        modules.append(First())
        trainer.fit(modules[-1], make(), ckpt_path=foreign.newest(trainer))
        seen += modules[-1].seen
    torch.save(foreign.whole(modules[-1]), folder / "weights.pt")
    return seen


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", EXACT)
def test_a_resume_continues_where_it_stood(tmp_path: Path, name: str) -> None:
    loader = EXACT[name]()
    steps = EPOCHS * len(loader)
    whole = train(tmp_path / "whole", EXACT[name], steps)
    assert len(whole) == steps
    first, second = ([n for batch in whole[at : at + len(loader)] for n in batch] for at in (0, len(loader)))
    if "weight" not in name:
        assert len({*first}) == len(first), "an epoch gives a sample twice"
    if name != "in order":
        assert first != second, "two epochs have one order"
    assert train(tmp_path / "resumed", EXACT[name], STOP, steps) == whole
    weights = [torch.load(tmp_path / run / "weights.pt") for run in ("whole", "resumed")]
    assert torch.equal(*weights)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_loader_may_be_used_in_several_fits(tmp_path: Path) -> None:
    loaders = CombinedLoader([EXACT["shuffled"]()], "max_size")
    seen = [train(tmp_path / str(run), lambda: loaders, 7) for run in range(2)]
    assert len(seen[0]) == 7
    assert seen[0] == seen[1]
    assert len(list(loaders)) == 5, "after a fit the loader is not its user's again"


@pytest.mark.parametrize("wrapped", [lambda loader: loader, lambda loader: [loader]], ids=["alone", "in a list"])
def test_an_epoch_that_is_cut_otherwise_is_refused(tmp_path: Path, wrapped: Callable[[Any], Any]) -> None:
    train(tmp_path, lambda: wrapped(EXACT["in order"]()), STOP)
    for make, words in (
        (lambda: DataLoader(NUMBERS, batch_size=8), "samples a step was 4, is 8"),
        (lambda: DataLoader(foreign.Numbers(24), BATCH), "samples was 22, is 24"),
        (EXACT["shuffled"], "order was in order, is RandomSampler of seed 0"),
    ):
        trainer = foreign.trainer_of(tmp_path, max_steps=STOP + 2)
        start = foreign.newest(trainer)
        with pytest.raises(CheckpointError, match=f"in the middle of an epoch of a loader that has changed: .*{words}"):
            trainer.fit(First(), wrapped(make()), ckpt_path=start)


class Odd(Sampler[int]):
    """A sampler of its author's."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Any:
        return iter(range(SAMPLES))


class Mine(DataLoader[Any]):
    """A loader that goes through its batches in a way of its own."""

    def __iter__(self) -> Any:
        return iter([self.collate_fn([NUMBERS[number]]) for number in range(6)])


class Listed:
    """Any iterable."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        return iter(DataLoader(NUMBERS, batch_size=BATCH))


TOLD: dict[str, tuple[Callable[[], Any], str]] = {
    "stream": (
        lambda: DataLoader(foreign.Stream(SAMPLES), batch_size=BATCH),
        r"after batch 2 of epoch 1, but its train loader starts over \(Stream is an iterable dataset\): its first 2"
        " batches are read a second time",
    ),
    "iterable": (
        Listed,
        r"\(a Listed has no sampler\): the remaining 4 batches of 6 will be its first 4, so 2 batches of the epoch are"
        " read twice and 2 are never read",
    ),
    "sampler": (lambda: DataLoader(NUMBERS, BATCH, sampler=Odd()), "a Odd may not repeat the same order"),
    "batches": (lambda: DataLoader(NUMBERS, batch_sampler=[[1, 2]] * 6), r"\(it makes its own batches\)"),
    "subclass": (lambda: Mine(NUMBERS, batch_size=BATCH), r"\(it makes its own batches\)"),
    "replaced": (
        lambda: DataLoader(NUMBERS, BATCH, sampler=RandomSampler(NUMBERS, replacement=True)),
        "draws with replacement",
    ),
    "several": (lambda: [DataLoader(NUMBERS, BATCH), DataLoader(NUMBERS, BATCH)], "several loaders are combined"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_is_lost_is_told(tmp_path: Path, name: str) -> None:
    make, words = TOLD[name]
    texts: list[list[str]] = []
    for steps in (STOP, STOP + 2):
        trainer = foreign.trainer_of(tmp_path, Checkpointing(every_steps=4), max_steps=steps)
        start = foreign.newest(trainer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(First(), make(), ckpt_path=start)
        texts.append([str(warning.message) for warning in caught if "resum" in str(warning.message)])
    assert not texts[0], f"a run from the start: {texts[0]}"
    assert len(texts[1]) == 1, texts[1]
    assert re.search(words, texts[1][0]), texts[1][0]
