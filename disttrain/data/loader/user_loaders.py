"""User-defined loaders: check that the ranks share the samples, and make the loaders resumable.

Lightning passes every loader of a fit, validation, test or prediction to :func:`accept`. On several ranks, a loader
that does not split its samples silently gives every rank all of them. It is rejected unless it declares a split:
accepted are disttrain's loaders, a ``DataLoader`` whose sampler has ``num_replicas`` and ``rank`` (PyTorch's
``DistributedSampler``), and any iterable or iterable dataset that has these two attributes itself. The declared splits
are compared between ranks.

A training ``DataLoader`` over a map-style dataset with one of PyTorch's samplers resumes at exactly the next batch; its
shuffle is keyed by the trainer's seed and the epoch. For any other loader, a resume within an epoch warns which batches
are read twice and which are never read. Cost: one small gather per loader at setup.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from disttrain.data.loader.loaders import EvaluationLoader, TrainLoader
from disttrain.distributed.synchronize_errors import gather, raise_together
from disttrain.errors import ConfigError
from disttrain.lightning.internals import train_loaders
from disttrain.lightning.position import micro_batches_into_epoch
from disttrain.parallel.randomness import mix
from disttrain.parallel.ranks import data_ranks

_SHUFFLES: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_MEND: Final = (
    "use disttrain.ShardedDataModule, or give the DataLoader a"
    " torch.utils.data.DistributedSampler(dataset, num_replicas={size}, rank=<0 to {last}, this rank's part>)"
)
_MEND_ITERABLE: Final = (
    "use disttrain.ShardedDataModule, or have the dataset give each rank its own part and declare it by the attributes"
    " num_replicas ({size}) and rank (0 to {last})"
)


class _Split(NamedTuple):
    """The split that a loader declares.

    Attributes:
        parts: number of parts; 0 if it does not split its samples.
        part: index of the part it returns.
        order: what must be the same on all ranks: the type of the split, its length, seed and epoch.
        batches: number of batches; None if unknown.
    """

    parts: int
    part: int
    order: tuple[Any, ...]
    batches: int | None


def accept(loader: Any, trainer: pl.Trainer, *, seed: int) -> Any:
    """Return the loader to use in place of one passed to the trainer. Collective.

    Args:
        loader: the loader for the trainer's current stage.
        trainer: the trainer whose ranks share the samples.
        seed: seed of the shuffle of a resumable loader.

    Raises:
        ConfigError: the ranks would not share the samples, or the loader is not attached to the trainer; on all ranks.
    """
    loader = _unwrapped(loader)  # Lightning may pass an accepted training loader again
    stage = trainer.state.stage
    assert stage is not None
    name = _NAMES.get(stage, stage.value)
    if trainer.world_size > 1:
        _check_split(loader, name, trainer)
    if isinstance(loader, TrainLoader):
        _check_own(loader, trainer)
    elif name == "train" and (why := _why_not_resumable(loader)):
        _warn_of_resume(trainer, _length(loader), why)
    elif name == "train":
        return ResumableLoader(loader, trainer, seed=seed)
    return loader


def give_back(trainer: pl.Trainer) -> None:
    """After a fit, restore the user's loaders in a ``CombinedLoader``, in which Lightning stores the accepted ones."""
    combined = train_loaders(trainer)
    if combined is not None:
        combined.flattened = [_unwrapped(loader) for loader in combined.flattened]


def _unwrapped(loader: Any) -> Any:
    return loader._loader if isinstance(loader, ResumableLoader) else loader


_NAMES: Final = {RunningStage.TRAINING: "train", RunningStage.VALIDATING: "val", RunningStage.SANITY_CHECKING: "val"}


def _check_own(loader: TrainLoader, trainer: pl.Trainer) -> None:
    """Reject a loader from a data module that is not attached to the trainer."""
    owner = getattr(loader.position, "__self__", None)
    hint = "pass the data module itself: trainer.fit(module, datamodule=data)"
    if isinstance(owner, pl.LightningDataModule) and owner.trainer is not trainer:
        raise ConfigError(
            f"the train loader comes from a {type(owner).__name__} that is not attached to this trainer: every epoch"
            " would repeat the order of the first, and a resume would start from its first batch",
            hint=hint,
        )
    if loader.plan.accumulation != trainer.accumulate_grad_batches:
        raise ConfigError(
            f"the train loader splits a global batch into {loader.plan.accumulation} micro batches per rank, but the"
            f" trainer accumulates {trainer.accumulate_grad_batches}",
            hint=hint,
        )


def _check_split(loader: Any, name: str, trainer: pl.Trainer) -> None:
    """Reject a loader whose samples the ranks would not share. Collective."""
    ranks = data_ranks(trainer)
    split = _split_of(loader)
    if (
        not split.parts and ranks.size == 1 and _is_sequential(loader)
    ):  # one tensor group: all its ranks must read the same
        split = _Split(1, 0, ("SequentialSampler", ("total_size", len(loader.dataset))), _length(loader))
    splits = gather((split, ranks.rank))
    with raise_together():
        if fault := _fault(splits, ranks.size, _MEND_ITERABLE if _is_iterable(loader) else _MEND):
            what, hint = fault
            raise ConfigError(f"the {name} loader, a {_described(loader)}, {what}", hint=hint)
    if name != "train" and trainer.is_global_zero:
        _warn_of_padding(loader, name)


def _fault(splits: list[tuple[_Split, int]], size: int, how: str) -> tuple[str, str] | None:
    """Return what is wrong with the ranks' splits and how to fix it; None if they are consistent."""
    first, hint = splits[0][0], how.format(size=size, last=size - 1)
    for rank, (split, part) in enumerate(splits):
        if not split.parts:
            return f"does not split its samples: each of the {len(splits)} ranks would read all of them", hint
        if (split.parts, split.part) != (size, part):
            return f"returns part {split.part} of {split.parts} on rank {rank}, which needs part {part} of {size}", hint
        if split.order != first.order:
            both = f"{_words(first.order)} on rank 0, {_words(split.order)} on rank {rank}"
            return (
                f"is not split the same way on all ranks: {both}",
                "give all samplers the same dataset, shuffle and seed",
            )
        if split.batches != first.batches:
            return (
                f"has {first.batches} batches on rank 0 and {split.batches} on rank {rank}, so the ranks would wait"
                " for each other",
                "make the number the same on all ranks, or use disttrain.ShardedDataModule",
            )
    return None


def _words(order: tuple[Any, ...]) -> str:
    return " ".join(str(item) if isinstance(item, str) else f"{item[0]}={item[1]}" for item in order)


def _split_of(loader: Any) -> _Split:
    """Return the split over ranks that a loader declares."""
    if isinstance(loader, TrainLoader):
        return _Split(loader.plan.num_ranks, loader.rank, (), None)
    if isinstance(loader, EvaluationLoader):
        return _Split(loader.num_ranks, loader.rank, (), len(loader))
    samplers = _samplers(loader)
    for candidate in (loader, loader.dataset) if _is_iterable(loader) else (loader, *samplers):
        parts, part = getattr(candidate, "num_replicas", None), getattr(candidate, "rank", None)
        if isinstance(parts, int) and isinstance(part, int):
            names = (
                ("total_size", "shuffle", "seed", "epoch", "drop_last")
                if any(candidate is one for one in samplers)
                else ()
            )
            order = tuple((name, getattr(candidate, name, None)) for name in names)
            return _Split(parts, part, (type(candidate).__name__, *order), _length(loader))
    return _Split(0, 0, (), None)


def _samplers(loader: Any) -> list[Any]:
    """Return a loader's samplers, including the one inside its batch sampler."""
    batches = getattr(loader, "batch_sampler", None)
    return [
        getattr(loader, "sampler", None),
        batches,
        getattr(batches, "sampler", None),
    ]


def _is_iterable(loader: Any) -> bool:
    """Return whether a loader's dataset is iterable; PyTorch does not accept a sampler for those."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def _is_sequential(loader: Any) -> bool:
    """Return whether a loader yields the same batches on every rank, independent of the random state."""
    return isinstance(loader, DataLoader) and _is_plain(loader) and type(_sampler_of(loader)) is SequentialSampler


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether PyTorch's own ``BatchSampler`` builds the batches of a map-style dataset."""
    return not _is_iterable(loader) and type(loader.batch_sampler) is BatchSampler


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler that is in use: with a custom batch sampler, ``loader.sampler`` is an unused default."""
    return loader.batch_sampler.sampler  # type: ignore[union-attr]


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _described(loader: Any) -> str:
    """Describe a loader for an error message."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if _is_iterable(loader):
        return f"{type(loader).__name__} over the iterable {type(loader.dataset).__name__}"
    return type(loader).__name__ + (f" with a {type(sampler).__name__}" if sampler is not None else "")


def _warn_of_padding(loader: Any, name: str) -> None:
    for sampler in _samplers(loader):
        if isinstance(sampler, DistributedSampler):
            samples, read = len(sampler.dataset), sampler.total_size  # type: ignore[arg-type]
            if samples != read:
                how = f"repeats {read - samples} of them" if read > samples else f"drops {samples - read} of them"
                warnings.warn(
                    f"the {name} loader has {samples} samples, not a multiple of {sampler.num_replicas} ranks: its"
                    f" {type(sampler).__name__} {how}, which also affects metrics and predictions (ShardedDataModule"
                    " does neither)",
                    stacklevel=2,
                )
            return


def _why_not_resumable(loader: Any) -> str:
    """Return why a loader cannot resume exactly, or an empty string if it can."""
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} has no sampler"
    if _is_iterable(loader):
        return f"{type(loader.dataset).__name__} is an iterable dataset"
    if not _is_plain(loader) or type(loader).__iter__ is not DataLoader.__iter__:
        return "it makes its own batches" if loader.batch_sampler is not None else "its batch_size is None"
    sampler = _sampler_of(loader)
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "its RandomSampler draws with replacement"
    plain = (SequentialSampler, *_SHUFFLES, DistributedSampler)
    if any(isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__ for kind in plain):
        return ""
    return f"a {type(sampler).__name__} may not repeat the same order"


def _warn_of_resume(trainer: pl.Trainer, total: int | None, why: str) -> None:
    """Warn which batches a resume within an epoch reads twice, and which never."""
    done = micro_batches_into_epoch(trainer)
    if not done or not trainer.is_global_zero or (total is not None and done >= total):
        return
    if total is None:
        text = f"its first {done} batches are read a second time"
    else:
        left, twice = total - done, min(done, total - done)
        text = (
            f"the remaining {left} batches of {total} will be its first {left},"
            f" so {twice} batches of the epoch are read twice and {twice} are never read"
        )
    warnings.warn(
        f"the run resumes after batch {done} of epoch {trainer.current_epoch}, but its train loader starts over"
        f" ({why}): {text}. ShardedDataModule resumes exactly, as do checkpoints at the end of an epoch",
        stacklevel=2,
    )


class ResumableLoader:
    """Wraps a map-style ``DataLoader`` so that it resumes at the next batch; otherwise behaves like the loader.

    The position is read when the first batch of an epoch is requested. By then the trainer's counters match the
    checkpoint, which is not yet the case when Lightning creates the iterator. Random numbers that the dataset draws in
    the main process are keyed by epoch and batch; those of worker processes differ after a resume.

    Args:
        loader: the loader to wrap.
        trainer: the trainer that provides the position.
        seed: seed of the shuffle and of the dataset's random numbers.
    """

    def __init__(self, loader: DataLoader[Any], trainer: pl.Trainer, *, seed: int) -> None:
        vars(self).update(_loader=loader, _trainer=trainer, _seed=seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator function: nothing below runs before the first batch is requested.
        trainer, loader, end = self._trainer, self._loader, object()
        if len(tree_leaves(trainer.train_dataloader)) > 1:  # shorter loaders restart within an epoch
            if tree_leaves(trainer.train_dataloader)[0] is self:
                total = trainer.num_training_batches
                total = None if total == float("inf") else int(total)
                _warn_of_resume(trainer, total, "when several loaders are combined, the shorter ones restart")
            yield from loader
            return
        epoch, done = trainer.current_epoch, micro_batches_into_epoch(trainer)
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        for owner in (loader, *_samplers(loader)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(mix(self._seed, epoch))
        self._key(epoch)  # for worker processes
        with self._continued(epoch, done):
            batches = iter(loader)
            batch = next(batches, end)
        while batch is not end:
            yield batch
            done += 1
            self._key(epoch, done)
            batch = next(batches, end)

    def cut(self) -> dict[str, Any]:
        """Return what determines which samples a number of batches covers; the same on all ranks."""
        batches: Any = self._loader.batch_sampler
        sampler, split = _sampler_of(self._loader), _split_of(self._loader)
        shuffles = type(sampler) is not SequentialSampler and getattr(sampler, "shuffle", True)
        size = batches.batch_size * max(1, split.parts) * self._trainer.accumulate_grad_batches
        order = f"{type(sampler).__name__} of seed {getattr(sampler, 'seed', self._seed)}" if shuffles else "in order"
        return {"samples": len(self._loader.dataset), "samples a step": size, "order": order}

    def _key(self, *place: int) -> None:
        """Seed the default generator for the sampler and the dataset; training reseeds it for every micro batch."""
        torch.default_generator.manual_seed(mix(self._seed, data_ranks(self._trainer).rank, *place))

    @contextmanager
    def _continued(self, epoch: int, done: int) -> Iterator[None]:
        """Make the batch sampler skip the finished batches, if its iterator starts inside this context."""
        batches: Any = self._loader.batch_sampler
        whole = batches.sampler
        batches.sampler = _Rest(self._numbers(whole, epoch, done, batches.batch_size))
        try:
            yield
        finally:
            batches.sampler = whole

    def _numbers(self, sampler: Any, epoch: int, done: int, batch_size: int) -> Iterator[Any]:
        """Yield the remaining sample indices of an epoch."""
        self._key(epoch)
        rest = islice(iter(sampler), done * batch_size, None)
        first = list(islice(rest, 1))  # makes the sampler draw its permutation
        self._key(epoch, done)  # the dataset draws next
        yield from first
        yield from rest


class _Rest:
    """A sampler that yields the rest of an epoch."""

    def __init__(self, numbers: Iterator[Any]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        return self._numbers
