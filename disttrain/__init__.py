"""disttrain: distributed PyTorch training whose runs do not depend on how many GPUs they have.

The names below are the public ones; each is imported when it is first used, so that ``import disttrain``
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.callbacks import EMA, Checkpointing, EarlyStopping, SampleLedger, UpdateGuard
    from disttrain.checkpoint.mirror import MirrorConfig
    from disttrain.data.bad_samples import BadSampleError, FilteredSampleError
    from disttrain.data.cache import CacheConfig
    from disttrain.data.field import Field
    from disttrain.data.hooks import HooksConfig
    from disttrain.data.images import RandomResizedCrop
    from disttrain.data.index import ShardIndex
    from disttrain.data.loader import LoaderConfig
    from disttrain.data.module import ShardedDataModule, ShuffleConfig
    from disttrain.data.order import Order, OrderConfig
    from disttrain.data.splits import SourceConfig
    from disttrain.errors import DisttrainError, Preempted
    from disttrain.lightning.callback import Callback
    from disttrain.optim import OptimizerConfig, ScheduleConfig
    from disttrain.parallel.config import BatchPlan, ParallelConfig
    from disttrain.parallel.strategies import DDP, FSDP
    from disttrain.parallel.tensor import ShardedDropout
    from disttrain.tasks import ClassificationTask, RegressionTask, Task
    from disttrain.trainer import Trainer
    from disttrain.version import __version__

importlib.import_module("disttrain.launcher")  # looks now, as early as can be, which process has started this one

_HOMES = {
    "BadSampleError": "disttrain.data.bad_samples",
    "HooksConfig": "disttrain.data.hooks",
    "RandomResizedCrop": "disttrain.data.images",
    "BatchPlan": "disttrain.parallel.config",
    "CacheConfig": "disttrain.data.cache",
    "Callback": "disttrain.lightning.callback",
    "Checkpointing": "disttrain.callbacks",
    "ClassificationTask": "disttrain.tasks",
    "DDP": "disttrain.parallel.strategies",
    "DisttrainError": "disttrain.errors",
    "EMA": "disttrain.callbacks",
    "EarlyStopping": "disttrain.callbacks",
    "FSDP": "disttrain.parallel.strategies",
    "Field": "disttrain.data.field",
    "FilteredSampleError": "disttrain.data.bad_samples",
    "LoaderConfig": "disttrain.data.loader",
    "MirrorConfig": "disttrain.checkpoint.mirror",
    "OptimizerConfig": "disttrain.optim",
    "Order": "disttrain.data.order",
    "OrderConfig": "disttrain.data.order",
    "ParallelConfig": "disttrain.parallel.config",
    "Preempted": "disttrain.errors",
    "RegressionTask": "disttrain.tasks",
    "SampleLedger": "disttrain.callbacks",
    "ScheduleConfig": "disttrain.optim",
    "ShardIndex": "disttrain.data.index",
    "ShardedDataModule": "disttrain.data.module",
    "ShardedDropout": "disttrain.parallel.tensor",
    "ShuffleConfig": "disttrain.data.module",
    "SourceConfig": "disttrain.data.splits",
    "Task": "disttrain.tasks",
    "Trainer": "disttrain.trainer",
    "UpdateGuard": "disttrain.callbacks",
    "__version__": "disttrain.version",
}

__all__ = [
    "DDP",
    "EMA",
    "FSDP",
    "BadSampleError",
    "BatchPlan",
    "CacheConfig",
    "Callback",
    "Checkpointing",
    "ClassificationTask",
    "DisttrainError",
    "EarlyStopping",
    "Field",
    "FilteredSampleError",
    "HooksConfig",
    "LoaderConfig",
    "MirrorConfig",
    "OptimizerConfig",
    "Order",
    "OrderConfig",
    "ParallelConfig",
    "Preempted",
    "RandomResizedCrop",
    "RegressionTask",
    "SampleLedger",
    "ScheduleConfig",
    "ShardIndex",
    "ShardedDataModule",
    "ShardedDropout",
    "ShuffleConfig",
    "SourceConfig",
    "Task",
    "Trainer",
    "UpdateGuard",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
