"""Loaders that are not disttrain's: ranks share their samples, or the run is refused on all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
import webdataset
from lightning.pytorch.utilities import CombinedLoader
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from disttrain import ParallelConfig, ShardedDataModule
from disttrain.errors import ConfigError, RankError
from tests.support import foreign
from tests.support.ranks import run_ranks

NUMBERS = foreign.Numbers(48)
SPLIT = "does not split its samples: each of the 2 ranks would read all of them"


class _Arrow(Dataset[Any]):
    """Map-style, but no ``torch.utils.data.Dataset`` by its parts, such as Hugging Face's."""

    def __len__(self) -> int:
        return len(NUMBERS)

    def __getitem__(self, number: int) -> Any:
        return NUMBERS[number]


class Batches:
    """Any iterable."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter([NUMBERS[0]] * self.length)


class Split(Batches):
    """One that says which part it gives."""

    def __init__(self, length: int, num_replicas: int, rank: int) -> None:
        super().__init__(length)
        self.num_replicas, self.rank = num_replicas, rank


class Halved(foreign.Stream):
    """An iterable dataset that splits itself, and says so."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        super().__init__()
        self.num_replicas, self.rank = num_replicas, rank

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.rank, None, self.num_replicas)


class InModule(foreign.Evaluated):
    def train_dataloader(self) -> Any:
        return DataLoader(NUMBERS, batch_size=4)


class Foreign(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(NUMBERS, batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def sampler(rank: int, ranks: int = 2, **settings: Any) -> DistributedSampler[Any]:
    return DistributedSampler(NUMBERS, num_replicas=ranks, rank=rank, **settings)


def refused(rank: int) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Which loop is given what, and the words of the refusal."""
    plain = DataLoader(NUMBERS, batch_size=4)
    split = DataLoader(NUMBERS, batch_size=4, sampler=sampler(rank))
    yield "fit", (plain,), f"the train loader, a DataLoader with a SequentialSampler, {SPLIT}"
    yield "fit", (DataLoader(NUMBERS, batch_size=4, shuffle=True),), SPLIT
    yield "fit", (DataLoader(_Arrow(), batch_size=4),), SPLIT
    yield "fit", (DataLoader(foreign.Stream(), batch_size=4),), f"DataLoader over the iterable Stream, {SPLIT}"
    yield "fit", (Batches(3),), f"the train loader, a Batches, {SPLIT}"
    yield "fit", (DataLoader(Halved(2, 0), batch_size=4),), "returns part 0 of 2 on rank 1"
    yield "fit", (webdataset.WebLoader(foreign.Stream(), batch_size=4),), SPLIT
    yield "fit", (CombinedLoader([split, plain]),), SPLIT
    yield "fit", ({"a": split, "b": plain},), SPLIT
    yield "fit", (split, plain), f"the val loader, a DataLoader with a SequentialSampler, {SPLIT}"
    yield "validate", (plain,), "the val loader"
    yield "test", ([split, plain],), "the test loader"
    yield "predict", (plain,), "the predict loader"
    for loop in ("fit", "validate", "test", "predict"):
        yield loop, (Foreign(),), SPLIT
    yield "fit", (DataLoader(NUMBERS, batch_size=4, sampler=sampler(rank, 4)),), "returns part 0 of 4 on rank 0"
    yield "fit", (DataLoader(NUMBERS, batch_size=4, sampler=sampler(0)),), "returns part 0 of 2 on rank 1"
    yield (
        "fit",
        (DataLoader(NUMBERS, batch_size=4, sampler=sampler(rank, seed=rank)),),
        "is not split the same way on all ranks",
    )
    yield "fit", (Split(3 + rank, 2, rank),), "has 3 batches on rank 0 and 4 on rank 1"


def refuse_in(folder: str) -> None:
    """One message on all ranks for each loader."""
    warnings.simplefilter("ignore")
    rank, every = foreign.trainer_of(Path(folder)).global_rank, []
    for loop, loaders, words in [*refused(rank), ("fit", (), SPLIT)]:
        trainer = foreign.trainer_of(Path(folder), max_epochs=1)
        module = foreign.Evaluated() if loaders else InModule()
        given = {"datamodule": loaders[0]} if loaders and isinstance(loaders[0], Foreign) else {}
        with pytest.raises(ConfigError if rank == 0 else (ConfigError, RankError)) as caught:  # type: ignore[arg-type]
            getattr(trainer, loop)(module, *(() if given else loaders), **given)
        every.append(str(caught.value))
        assert words in every[-1], f"{loop}, {loaders}: {every[-1]}"
        if words == SPLIT:
            assert "ShardedDataModule" in every[-1]
            iterable = "over the iterable" in every[-1]
            how = "its attributes num_replicas (2) and rank (0 to 1)" if iterable else "DistributedSampler(dataset, num"
            assert how in every[-1], every[-1]


def accept_in(folder: str) -> None:
    """What splits its samples is read once over all ranks; what it pads is told."""
    rank = foreign.trainer_of(Path(folder)).global_rank
    inner = BatchSampler(sampler(rank, shuffle=False), 4, drop_last=False)
    for number, batches in enumerate(
        (
            DataLoader(NUMBERS, batch_size=4, sampler=sampler(rank)),
            DataLoader(NUMBERS, batch_sampler=inner),
            DataLoader(Halved(2, rank), batch_size=4),
        )
    ):
        trainer = foreign.trainer_of(Path(folder) / str(number), max_epochs=1)
        module = foreign.Plain()
        trainer.fit(module, batches)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, module.seen)
        read = sorted(number for seen in told for batch in seen for number in batch)
        assert read == list(range(48)), read
    odd = DistributedSampler(range(47), num_replicas=2, rank=rank, shuffle=False)  # type: ignore[arg-type,var-annotated]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(foreign.Evaluated(), DataLoader(foreign.Numbers(47), batch_size=4, sampler=odd), verbose=False)
    texts = [str(warning.message) for warning in caught if "repeats 1 of them" in str(warning.message)]
    assert len(texts) == (1 if rank == 0 else 0), texts


class Planned(foreign.Plain):
    """With a plan for tensor parallelism."""

    def tensor_plan(self) -> Any:
        return {"backbone.0": ColwiseParallel(), "head": RowwiseParallel()}


def tensor_in(folder: str, packed: str) -> None:
    """Ranks of one part read the same: neither split nor shuffled by each for itself."""
    warnings.simplefilter("ignore")
    rank = foreign.trainer_of(Path(folder)).global_rank
    parallel = ParallelConfig(strategy="fsdp", tensor=2)
    data = ShardedDataModule(train=packed, global_batch_size=32, micro_batch_size=16)
    data.setup("fit")  # for two ranks, which are one part
    cases = (
        (DataLoader(NUMBERS, batch_size=4, shuffle=True), SPLIT),
        (
            DataLoader(NUMBERS, batch_size=4, sampler=sampler(rank)),
            "returns part 0 of 2 on rank 0, which needs part 0 of 1",
        ),
        (data.train_dataloader(), "returns part 0 of 2 on rank 0, which needs part 0 of 1"),
        (DataLoader(NUMBERS, batch_size=4), ""),
    )
    for batches, words in cases:
        trainer = foreign.trainer_of(Path(folder), parallel=parallel, max_epochs=1)
        module = Planned()
        if words:
            with pytest.raises((ConfigError, RankError), match=words):
                trainer.fit(module, batches)
        else:
            trainer.fit(module, batches)
            assert module.seen == [list(range(at, at + 4)) for at in range(0, 48, 4)], module.seen


def test_ranks_that_would_read_the_same_are_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_in, str(tmp_path / "run"), folder=tmp_path / "logs").ok()


def test_loaders_that_split_are_read_once(tmp_path: Path) -> None:
    run_ranks(2, accept_in, str(tmp_path / "run"), folder=tmp_path / "logs").ok()


@pytest.mark.slow
def test_ranks_of_a_tensor_group_read_the_same(tmp_path: Path, digits: Path) -> None:
    packed = str(digits / "train.json")
    run_ranks(2, tensor_in, str(tmp_path / "run"), packed, folder=tmp_path / "logs").ok()


def test_a_loader_knows_its_trainer(tmp_path: Path, digits: Path) -> None:
    """A data module's loader without the data module would give every epoch the first one's order."""
    data = ShardedDataModule(train=str(digits / "train.json"), global_batch_size=32, micro_batch_size=8)
    data.setup("fit")
    trainer = foreign.trainer_of(tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match="comes from a ShardedDataModule that is not attached to this trainer"):
        trainer.fit(foreign.Plain(), data.train_dataloader())
