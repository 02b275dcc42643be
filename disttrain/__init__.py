"""disttrain: distributed PyTorch training whose runs do not depend on how many GPUs they have.

The names below are the public ones; each is imported when it is first used, so that ``import disttrain``
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Looks now, as early as can be, which process has started this one.
importlib.import_module("disttrain.distributed.parent_process")

if TYPE_CHECKING:  # the same names as below, for type checkers and editors
    from disttrain.callbacks import (
        EMA as EMA,
        Checkpointing as Checkpointing,
        EarlyStopping as EarlyStopping,
        SampleLedger as SampleLedger,
        UpdateGuard as UpdateGuard,
    )
    from disttrain.checkpoint.remote.copies import MirrorConfig as MirrorConfig
    from disttrain.data.cache.shard_cache import CacheConfig as CacheConfig
    from disttrain.data.decode.field import Field as Field
    from disttrain.data.decode.images import RandomResizedCrop as RandomResizedCrop
    from disttrain.data.index.shard_index import ShardIndex as ShardIndex
    from disttrain.data.loader.loaders import LoaderConfig as LoaderConfig
    from disttrain.data.loader.transforms import HooksConfig as HooksConfig
    from disttrain.data.module import ShardedDataModule as ShardedDataModule, ShuffleConfig as ShuffleConfig
    from disttrain.data.order.sample_order import Order as Order, OrderConfig as OrderConfig
    from disttrain.data.reader.bad_sample_policy import (
        BadSampleError as BadSampleError,
        FilteredSampleError as FilteredSampleError,
    )
    from disttrain.data.splits import SourceConfig as SourceConfig
    from disttrain.errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        DisttrainError as DisttrainError,
        Preempted as Preempted,
        RankError as RankError,
    )
    from disttrain.lightning.callback import Callback as Callback
    from disttrain.optim import OptimizerConfig as OptimizerConfig, ScheduleConfig as ScheduleConfig
    from disttrain.parallel.config import BatchPlan as BatchPlan, ParallelConfig as ParallelConfig
    from disttrain.parallel.model.tensor_parallel import ShardedDropout as ShardedDropout
    from disttrain.strategies.build import DDP as DDP, FSDP as FSDP
    from disttrain.tasks import ClassificationTask as ClassificationTask, RegressionTask as RegressionTask, Task as Task
    from disttrain.trainer import Trainer as Trainer
    from disttrain.version import __version__ as __version__

_PUBLIC = {
    "disttrain.callbacks": ("Checkpointing", "EMA", "EarlyStopping", "SampleLedger", "UpdateGuard"),
    "disttrain.checkpoint.remote.copies": ("MirrorConfig",),
    "disttrain.data.cache.shard_cache": ("CacheConfig",),
    "disttrain.data.decode.field": ("Field",),
    "disttrain.data.decode.images": ("RandomResizedCrop",),
    "disttrain.data.index.shard_index": ("ShardIndex",),
    "disttrain.data.loader.loaders": ("LoaderConfig",),
    "disttrain.data.loader.transforms": ("HooksConfig",),
    "disttrain.data.module": ("ShardedDataModule", "ShuffleConfig"),
    "disttrain.data.order.sample_order": ("Order", "OrderConfig"),
    "disttrain.data.reader.bad_sample_policy": ("BadSampleError", "FilteredSampleError"),
    "disttrain.data.splits": ("SourceConfig",),
    "disttrain.errors": ("CheckpointError", "ConfigError", "DataError", "DisttrainError", "Preempted", "RankError"),
    "disttrain.lightning.callback": ("Callback",),
    "disttrain.optim": ("OptimizerConfig", "ScheduleConfig"),
    "disttrain.parallel.config": ("BatchPlan", "ParallelConfig"),
    "disttrain.parallel.model.tensor_parallel": ("ShardedDropout",),
    "disttrain.strategies.build": ("DDP", "FSDP"),
    "disttrain.tasks": ("ClassificationTask", "RegressionTask", "Task"),
    "disttrain.trainer": ("Trainer",),
    "disttrain.version": ("__version__",),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
