"""DDP and FSDP as Lightning strategies that share one checkpoint format and one set of habits.

Both take their ranks from the launcher and run on CUDA with NCCL and on the CPU with gloo. The module is
wrapped from outside; nothing is asked of it. Weights are rank 0's at the start whatever the seeds. Under
both, gradients of a step are reduced once, at its last micro batch. DDP's bucket layout is settled before
the first step, so that a resumed run reduces in the same order as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from disttrain.checkpoint.state import CheckpointMixin
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.shard import shard_module

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class DDP(CheckpointMixin, DDPStrategy):
    """Every rank holds the whole model; gradients are averaged in buckets while the backward pass runs.

    Args:
        config: bucket size and the search for unused parameters.
    """

    def __init__(self, config: ParallelConfig | None = None) -> None:
        config = config or ParallelConfig(strategy="ddp")
        super().__init__(
            bucket_cap_mb=config.bucket_mib,
            find_unused_parameters=config.find_unused_parameters,
            gradient_as_bucket_view=True,
        )

    def configure_ddp(self) -> None:
        """Wrap the module; one rank alone has nothing to reduce and stays unwrapped."""
        if self.world_size == 1:
            return
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        if not self._ddp_kwargs["find_unused_parameters"]:
            _settle_buckets(self.model)


class FSDP(CheckpointMixin, DDPStrategy):
    """Parameters, gradients and optimizer state are sharded over the ranks (PyTorch's FSDP2).

    Args:
        config: what to reshard.
    """

    def __init__(self, config: ParallelConfig | None = None) -> None:
        self._config = config or ParallelConfig(strategy="fsdp")
        self._mesh: DeviceMesh | None = None
        super().__init__()

    def setup(self, trainer: pl.Trainer) -> None:
        """Move, synchronize and shard the module, then set up its optimizers."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        assert self.model is not None
        if not isinstance(self.model, FSDPModule):
            _sync_module_states(self.model)
            module = self.lightning_module
            assert module is not None
            shard_module(
                module,
                self._data_parallel_mesh(),
                reshard_after_forward=self._config.reshard_after_forward,
                forward_methods=[name for name in _STEPS if is_overridden(name, module)],
            )
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients unreduced in all micro batches of a step but the last."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _data_parallel_mesh(self) -> DeviceMesh:
        if self._mesh is None:
            self._mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("shard",))
        return self._mesh


def build_strategy(config: ParallelConfig) -> DDP | FSDP:
    """The strategy that a configuration names."""
    return FSDP(config) if config.strategy == "fsdp" else DDP(config)


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Let DDP rebuild its buckets now instead of after the first step.

    DDP lays its buckets out anew, once, by the order in which the first backward pass brings the gradients.
    A sum over three ranks or more depends in its last bits on that layout, so the first step of a resumed
    run would differ from the same step of an uninterrupted one. A backward pass through the parameters
    alone, with zero gradients, makes the layout the same from the first step on.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    model.reducer.prepare_for_backward([])
    total = sum((p.sum() * 0.0 for p in parameters), start=torch.zeros((), device=parameters[0].device))
    total.backward()
    model.reducer._rebuild_buckets()
    for parameter in parameters:
        parameter.grad = None


Strategy = DDP | FSDP


def strategy_of(trainer: pl.Trainer) -> Any:
    """The trainer's strategy, which must be one of disttrain's; typed for its checkpoint methods."""
    strategy = trainer.strategy
    if not isinstance(strategy, CheckpointMixin):
        raise TypeError(f"{type(strategy).__name__} does not write disttrain checkpoints; use disttrain.DDP or FSDP")
    return strategy
