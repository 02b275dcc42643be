"""A LightningDataModule for a run's training, validation, test and prediction shards.

It connects index, order, reader and loaders, derives the accumulation from the batch sizes and the ranks, and saves
the order's fingerprint in checkpoints. It does not store the position in the data: that is read from the trainer's
counters when the first batch of an epoch is requested, so the position has a single owner. Rank 0 of each node reads
the shards' headers once and writes sidecars, which the other ranks read.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, Literal

import lightning.pytorch as pl
import torch

from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.allowed_values import Allowed, check_names
from disttrain.data.decode.field import Field
from disttrain.data.index.evidence import check_appended, check_evidence, evidence
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import BatchMaker
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig, TrainLoader
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.loader.workers import WorkerPool
from disttrain.data.order.mixture import Mixture
from disttrain.data.order.sample_order import DEFAULT_WINDOW, Order, OrderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.splits import Shards, SourceConfig, open_sources, order_of
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.distributed.world import detect_world
from disttrain.errors import CheckpointError, ConfigError, DataError, DisttrainError
from disttrain.lightning.position import steps_into_epoch
from disttrain.parallel.config import BatchPlan, divisors, usual_micro_batch_size
from disttrain.parallel.ranks import data_ranks
from disttrain.system.device import DeviceCopier

MICRO_BATCHES_OF: Final = "micro_batches_of"
"""Key in a checkpoint for a micro batch size that was configured, not found automatically."""
EVALUATED_AT_ONCE: Final = 32
"""Largest micro batch size in evaluation with ``micro_batch_size: auto``."""


@dataclass(frozen=True)
class ShuffleConfig:
    """How training samples are shuffled.

    Attributes:
        lanes: number of places in the dataset that a global batch draws from; 0 uses the largest divisor of the
            global batch size up to 64.
        window: number of consecutive samples of a lane that are shuffled together.
    """

    lanes: int = 0
    window: int = DEFAULT_WINDOW


class ShardedDataModule(pl.LightningDataModule):
    """Streams plain WebDataset tars in an order that does not depend on the number of ranks.

    Args:
        train: training shards: a brace pattern, a glob, a manifest, or a list of these; or a list of sources
            to mix.
        val: validation shards; same forms as ``train``.
        test: test shards; same forms as ``train``.
        predict: shards to predict on; by default the test shards.
        fields: fields of a batch, by name: an extension (``cls``, ``image.npy``) or a :class:`Field`. By
            default every extension of the first shard, under its own name.
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per rank and forward pass, in training and evaluation; by default the largest divisor
            of ``global_batch_size`` up to 32; ``auto`` starts with a rank's whole part of the global batch, and uses
            at most half the size in the next attempt if any rank runs out of memory.
        seed: seed of the training order.
        shuffle: how training samples are shuffled.
        loader: how batches are read ahead.
        cache: where shards from URLs are stored while they are read.
        hooks: custom sample transform and collate function.
        on_bad_sample: ``error`` stops at a sample that lacks a field or cannot be decoded; ``skip`` masks it,
            records it in the run folder's ``quarantine`` and continues.
        max_bad_samples: number of samples that may be skipped in one pass over a split before the run stops.
        unsafe_decoders: decoders to allow although they can run code from the data, such as ``pickle``.
    """

    def __init__(
        self,
        *,
        train: str | list[str] | list[SourceConfig] | None = None,
        val: Shards | None = None,
        test: Shards | None = None,
        predict: Shards | None = None,
        fields: dict[str, str | Field] | None = None,
        global_batch_size: int = 64,
        micro_batch_size: int | Literal["auto"] | None = None,
        seed: int = 0,
        shuffle: ShuffleConfig | None = None,
        loader: LoaderConfig | None = None,
        cache: CacheConfig | None = None,
        hooks: HooksConfig | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
        max_bad_samples: int = 100,
        unsafe_decoders: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.specs: dict[str, Shards | list[SourceConfig] | None] = {
            "train": train,
            "val": val,
            "test": test,
            "predict": predict or test,
        }
        if fields is not None and not fields:
            raise ConfigError("data.fields is empty", hint="name the fields of a batch, or omit data.fields to get all")
        check_names(fields or (), where="data.fields")
        self.fields = fields
        if max_bad_samples < 0:
            raise ConfigError(f"data.max_bad_samples is {max_bad_samples}", hint="use 0 or more")
        self.hooks = hooks or HooksConfig()
        self.skip_bad, self.max_bad_samples = on_bad_sample == "skip", max_bad_samples
        self.unsafe_decoders = tuple(unsafe_decoders or ())
        self.finds_micro_batch_size = micro_batch_size == "auto"
        """Whether the micro batch size is found automatically."""
        usual = usual_micro_batch_size(global_batch_size)
        self.micro_batch_size = (
            0 if micro_batch_size == "auto" else usual if micro_batch_size is None else micro_batch_size
        )
        """Samples per rank and forward pass; 0 with ``auto`` until training is set up."""
        self._largest_micro_batch: int | None = None
        self._accumulation = 1  # as last set on the trainer
        shuffle = shuffle or ShuffleConfig()
        self.order_config = OrderConfig(global_batch_size, seed=seed, lanes=shuffle.lanes, window=shuffle.window)
        self.loader_config = loader or LoaderConfig()
        self.cache_config = cache or CacheConfig()
        self.plan: BatchPlan | None = None
        self.order: Order | Mixture | None = None
        self._evidence: dict[str, Any] = {}
        self._readers: dict[str, Reader] = {}
        self._pool: WorkerPool | None = None
        self._copier: DeviceCopier | None = None

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.order_config.global_batch_size

    @property
    def seed(self) -> int:
        """Seed of the training order."""
        return self.order_config.seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; available after :meth:`setup` for ``fit``."""
        return self._train_order().steps_per_epoch

    def prepare_data(self) -> None:
        """Index the shards that lack an up-to-date sidecar, once per node."""
        stage = self.trainer.state.fn.value if self.trainer is not None and self.trainer.state.fn else "fit"
        try:
            self._open(stage, write_sidecars=True)
        except DisttrainError:
            # Lightning calls this on one rank per node while the others wait at a barrier, so raising here would
            # leave them hanging. All ranks hit the same error in setup().
            self._readers.clear()

    def setup(self, stage: str) -> None:
        """Open the data of a stage (``fit``, ``validate``, ``test`` or ``predict``).

        Raises:
            ConfigError: the batch sizes cannot be divided over the ranks.
            DataError: shards are missing, empty, or lack a declared field.
        """
        with raise_together():
            self._open(stage, write_sidecars=False)
        if stage == "fit" and self.trainer is not None and self.plan is not None:
            self._set_accumulation(self.trainer, self.plan.accumulation)
            if "val" not in self._readers:
                self.trainer.limit_val_batches = 0

    @property
    def evaluation_batch_size(self) -> int:
        """Samples per rank and forward pass in evaluation."""
        if not self.finds_micro_batch_size:
            return self.micro_batch_size
        # A size that training has not tried may be too large.
        return min(self.micro_batch_size or EVALUATED_AT_ONCE, EVALUATED_AT_ONCE)

    def limit_micro_batch_size(self, limit: int) -> None:
        """Use the largest micro batch size up to a limit that divides a rank's samples.

        Call before :meth:`setup`, which passes it to the trainer. Does nothing unless the size is ``auto``.

        Args:
            limit: the largest size, in samples.
        """
        if not self.finds_micro_batch_size:
            return
        self._largest_micro_batch = self.micro_batch_size = limit
        if self.plan is not None:
            self.plan = self._plan()

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of this rank's training micro batches, starting at the trainer's position."""
        order, plan = self._train_order(), self.plan
        assert plan is not None
        return TrainLoader(
            self._maker("train"),
            order,
            plan,
            rank=self._rank(),
            config=self.loader_config,
            position=self._position,
            pool=self._workers(),
        )

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Return the loader of this rank's validation micro batches; an empty list without validation shards."""
        return self._evaluation("val") if "val" in self._readers else []

    def test_dataloader(self) -> EvaluationLoader:
        """Return the loader of this rank's test micro batches."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Return the loader of this rank's micro batches to predict on."""
        return self._evaluation("predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device; on CUDA, while the previous step is still running."""
        if self._copier is None or self._copier.device != device:
            self._copier = DeviceCopier(device)
        return self._copier(batch)

    def teardown(self, stage: str) -> None:
        """Stop prefetching, let the cache evict the shards, and end worker processes."""
        for reader in self._readers.values():
            reader.store.finish()
        if self._pool is not None:
            self._pool.close()

    def reader(self, split: str) -> Reader:
        """Return the reader of ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            DataError: the split is not set up or has no shards.
        """
        if split not in self._readers:
            raise DataError(f"data.{split} names no shards", hint=f"set data.{split} to a pattern of shards")
        return self._readers[split]

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: fingerprints of the order and the shards, and the micro batch size."""
        if self.order is None:
            return {}
        found = {"micro_batch_size" if self.finds_micro_batch_size else MICRO_BATCHES_OF: self.micro_batch_size}
        order = {**self.order.fingerprint(), "names": self._readers["train"].index.names_hash()}
        return {"order": order, "shards": self._evidence, **found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that order and shards match the checkpoint. Collective.

        Raises:
            CheckpointError: they do not match; the message says what differs.
        """
        if self.order is None or "order" not in state_dict:
            return
        with raise_together():  # nodes may have separate copies of the data
            self._check_order(state_dict["order"], state_dict.get("shards", {}))
            warning = check_evidence(state_dict.get("shards", {}), self._readers["train"].index)
        if warning and self._rank() == 0:
            warnings.warn(warning, stacklevel=2)

    def _check_order(self, saved: dict[str, Any], shards: dict[str, Any]) -> None:
        now, index = self.state_dict()["order"], self._readers["train"].index
        if saved.get("version") != now["version"]:
            raise CheckpointError(
                f"the checkpoint's order of samples has format {saved.get('version')}; this disttrain has format"
                f" {now['version']}, which orders samples differently",
                hint="finish the run with the version of disttrain that started it, or start over with --resume never",
            )
        check_appended(shards, saved.get("names", ""), index)
        different = [
            f"{name} was {saved.get(name)!r}, is now {now[name]!r}" for name in now if saved.get(name) != now[name]
        ]
        if different:
            raise CheckpointError(
                f"the checkpoint was written with a different order of samples: {'; '.join(different)}",
                hint="restore those settings and shards, or start over with --resume never",
            )

    def _open(self, stage: str, *, write_sidecars: bool) -> None:
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        for split in splits:
            spec = self.specs[split]
            if split in self._readers:
                continue
            if spec is None or spec in ("", []):
                if split == "val" and stage == "fit":
                    continue
                raise DataError(f"data.{split} names no shards", hint=f"set data.{split} to a pattern of shards")
            retry = self.cache_config.retry
            indexes = open_sources(spec, f"data.{split}", write_sidecars=write_sidecars, retry=retry)
            index = ShardIndex(
                [shard for _, part in indexes for shard in part.shards],
                name=f"data.{split}",
                write_sidecars=write_sidecars,
                retry=retry,
            )
            self._readers[split] = Reader(
                index, self._declared(index), cache=self.cache_config, unsafe_decoders=self.unsafe_decoders
            )
            if split == "train":
                self._evidence = evidence(index, reads_contents=detect_world().rank == 0)
                self.plan = self._plan()
                self.order = order_of(indexes, self.order_config)

    def _plan(self) -> BatchPlan:
        if self.finds_micro_batch_size:
            most = BatchPlan(self.global_batch_size, 1, self._num_ranks()).rank_batch_size
            limit = min(self._largest_micro_batch or most, most)
            self.micro_batch_size = max(size for size in divisors(most) if size <= limit)
        return BatchPlan(self.global_batch_size, self.micro_batch_size, self._num_ranks())

    def _declared(self, index: ShardIndex) -> dict[str, Field]:
        if self.fields is None:
            return {extension: Field(extension) for extension in index.fields()}
        return {name: Field(f) if isinstance(f, str) else f for name, f in self.fields.items()}

    def _evaluation(self, split: str) -> EvaluationLoader:
        return EvaluationLoader(
            self._maker(split),
            micro_batch_size=self.evaluation_batch_size,
            num_ranks=self._num_ranks(),
            rank=self._rank(),
            config=self.loader_config,
            pool=self._workers(),
        )

    def _maker(self, split: str) -> BatchMaker:
        module = None if self.trainer is None or split == "predict" else self.trainer.lightning_module
        allowed: dict[str, Allowed] = getattr(
            module, "allowed_values", dict
        )()  # tasks only; prediction needs no labels
        return BatchMaker(self.reader(split), self.hooks, allowed=allowed, skip_bad=self.skip_bad)

    def _workers(self) -> WorkerPool | None:
        """Return the worker processes shared by all splits; they start when the first batch is requested."""
        if self._pool is None and self.loader_config.workers:
            self._pool = WorkerPool(self.loader_config.workers)
        return self._pool

    def _train_order(self) -> Order | Mixture:
        if self.order is None:
            raise DataError("the training data is not set up", hint="call setup('fit') first, or trainer.fit(...)")
        return self.order

    def _position(self) -> tuple[int, int]:
        """Return epoch and step from the trainer's counters; (0, 0) without a trainer."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, steps_into_epoch(self.trainer)

    def _num_ranks(self) -> int:
        return data_ranks(self.trainer).size if self.trainer is not None else detect_world().size

    def _rank(self) -> int:
        return data_ranks(self.trainer).rank if self.trainer is not None else detect_world().rank

    def _set_accumulation(self, trainer: pl.Trainer, accumulation: int) -> None:
        if trainer.accumulate_grad_batches not in (1, accumulation, self._accumulation):
            raise ConfigError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, but global_batch_size and"
                f" micro_batch_size on {data_ranks(trainer).size} ranks imply {accumulation}",
                hint="remove accumulate_grad_batches; it is derived",
            )
        trainer.accumulate_grad_batches = self._accumulation = accumulation


def sharded_data(trainer: pl.Trainer) -> ShardedDataModule | None:
    """Return a trainer's data module if it is a :class:`ShardedDataModule`, else None."""
    found = getattr(trainer, "datamodule", None)
    return found if isinstance(found, ShardedDataModule) else None
