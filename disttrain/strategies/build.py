"""DDP and FSDP as Lightning strategies with the same checkpoint format and the same behavior.

Both take their ranks from the launcher and run on CUDA with NCCL and on the CPU with gloo. The module is wrapped from
outside and needs no changes. All ranks start with rank 0's weights, whatever their seeds. Gradients are reduced once
per step, at its last micro batch: in the library's order, or in a fixed tree over the micro batches
(:mod:`disttrain.parallel.reduction.summation`). DDP's bucket layout is fixed before the first step, so a resumed run
reduces in the same order as an uninterrupted one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from disttrain.distributed.synchronize_errors import PYTORCHS_TIMEOUT, new_group, set_timeout, timeout_of
from disttrain.lightning.internals import begins_step, move_optimizers
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.model.fsdp import move_all_but_shards, shard_module, without_tensor
from disttrain.parallel.model.fsdp_internals import (
    fsdp_modules,
    parameter_name,
    reshard,
    sharded_parameters,
    take_unreduced,
    trained_parameters,
    unreduced_parameter,
)
from disttrain.parallel.model.meta_init import initialize, starts_on_meta
from disttrain.parallel.model.module_tensors import (
    broadcast_tensors,
    check_types,
    check_units,
    leave_out_of_ddp,
    odd_names,
    send_with_forward,
    settle_layout,
)
from disttrain.parallel.model.precision import shard_policy
from disttrain.parallel.model.tensor_parallel import apply_tensor_plan
from disttrain.parallel.ranks import DataRanks, data_ranks, divide_ranks
from disttrain.parallel.reduction.ddp_hook import BucketHook, settle_buckets
from disttrain.parallel.reduction.exchange import Exchange, TreeReduceScatter
from disttrain.parallel.reduction.low_precision_reduce import (
    NarrowReduceScatter,
    install_narrow_hook,
    install_wide_hook,
)
from disttrain.strategies.base import BaseStrategy
from disttrain.strategies.checkpointing import CheckpointMixin

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class DDP(BaseStrategy):
    """Replicates the model on every rank; gradients are averaged in buckets during the backward pass.

    Args:
        config: bucket size, search for unused parameters, order of summation.
        seed: seed of the initial weights of a model built on the meta device.
        timeout: PyTorch's timeout for collectives.
    """

    def __init__(
        self, config: ParallelConfig | None = None, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT
    ) -> None:
        self.config, self.seed = config or ParallelConfig(strategy="ddp"), seed
        self._hook: BucketHook | None = None
        self._filled = self._graph_learned = False
        self._known: list[tuple[str, nn.Parameter]] = []  # the parameters when DDP was constructed
        self._flags: list[bool] = []  # whether each was trainable then
        super().__init__(
            bucket_cap_mb=self.config.bucket_mib,
            find_unused_parameters=self.config.find_unused_parameters,
            gradient_as_bucket_view=self.config.gradient_as_bucket_view,
            static_graph=self.config.static_graph,
            timeout=timeout,
        )

    def model_to_device(self) -> None:
        """Move the module to the device, or allocate and initialize it there."""
        module = self._module()
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        if starts_on_meta(module, wanted=self.config.meta_init, fitting=fitting and not self._filled):
            initialize(module, self.root_device, seed=self.seed)
            self._filled = True
        if fitting:
            check_types(module, sharded=False)
        settle_layout(module, sharded=False)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Wrap the module; on a single rank, leave it unwrapped."""
        module = self._module()
        self._change_for_training(module)
        self._outside = False
        self._wrap()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        self._rebuild_if_changed()
        return super().training_step(*args, **kwargs)

    def _rebuild_if_changed(self) -> None:
        """Rebuild DDP if layers were frozen or unfrozen: its reducer waits for a fixed set of gradients. Collective."""
        trainer = self._trainer()
        # Within a step, gradients are already accumulated; check_reduced rejects a change there.
        if not self._changed() or not begins_step(trainer):
            return
        if self._hook is not None:
            self._hook.close()
        self.model = self._module()
        gc.collect()  # free the old reducer, whose autograd hooks would still fire
        self._wrap()

    def _changed(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that were frozen or unfrozen since DDP was constructed."""
        # With find_unused_parameters, DDP does not wait for frozen parameters.
        minds = not self.config.find_unused_parameters
        known = zip(self._known, self._flags, strict=True)
        return [one for one, trained in known if one[1].requires_grad != trained and (minds or not trained)]

    def _wrap(self) -> None:
        """Wrap the module in DDP, which then reduces all parameters trainable now. Collective."""
        module = self._module()
        self._graph_learned = False
        sums = self._start_tree(module.trainer) if self.config.reduction == "tree" else None
        self._known = list(module.named_parameters())
        self._flags = [parameter.requires_grad for _, parameter in self._known]
        if self.world_size == 1:
            return
        odd = odd_names(module)
        if odd:
            leave_out_of_ddp(module, odd)
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        if odd:
            send_with_forward(self.model, odd)
        if sums is not None:
            # The hook runs collectives in its own thread. Their order relative to the main thread's is not
            # deterministic, so they need a separate process group.
            exchange = Exchange(new_group(), self.global_rank)
            trained = [parameter for _, parameter in self._trained()]
            self._hook = BucketHook(sums, trained, exchange)
            self._hook.install(self.model)
            return
        if not self.config.find_unused_parameters and not self.config.static_graph:
            settle_buckets(self.model)
        if not module.automatic_optimization:
            self._watch_gradients(parameter for _, parameter in self._trained())
        if self.config.reduce_dtype == "bf16":
            install_narrow_hook(self.model)
        elif module.trainer.precision == "bf16-true":
            install_wide_hook(self.model)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Skip the reduction in all micro batches of a step except the last.

        DDP learns a static graph from one backward pass with reduction: the run's first. Its gradients are reduced
        again with the last micro batch's, which only changes the rounding.
        """
        self._rebuild_if_changed()  # before DDP's no_sync() is entered, so that it applies to the new DDP
        if self.config.static_graph and not self._graph_learned:
            yield
        else:
            with super().block_backward_sync():
                yield

    def post_backward(self, closure_loss: Tensor) -> None:
        """Record that a backward pass has run."""
        super().post_backward(closure_loss)
        self._graph_learned = True

    def teardown(self) -> None:
        """Stop the reduction thread and free the device."""
        if self._hook is not None:
            self._hook.close()
        super().teardown()

    def _reducible(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._known)

    def _unreduced(self) -> str:
        # While a parameter that DDP waits for is frozen, DDP reduces nothing at all.
        return next((name for name, p in self._changed() if not p.requires_grad or p.grad is not None), "")

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._module().named_parameters() if p.requires_grad]

    def _take(self, parameter: nn.Parameter) -> Tensor | None:
        gradient, parameter.grad = parameter.grad, None
        return gradient

    def _reduced(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        if self._hook is not None:
            self._hook.release()
        else:
            self._finish_alone([(name, parameter.grad) for name, parameter in parameters])


class FSDP(BaseStrategy):
    """Shards parameters, gradients and optimizer state over the ranks (PyTorch's FSDP2).

    Args:
        config: mesh degrees, resharding, order of summation.
        seed: seed of the initial weights of a model built on the meta device.
        timeout: PyTorch's timeout for collectives.
    """

    def __init__(
        self, config: ParallelConfig | None = None, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT
    ) -> None:
        self.config, self.seed = config or ParallelConfig(strategy="fsdp"), seed
        self._mesh: DeviceMesh | None = None
        self.data_ranks: DataRanks | None = None
        """This rank's position among the data-parallel ranks; set once the process group exists."""
        self._scatters: list[TreeReduceScatter] = []
        self._looks = 0
        super().__init__(timeout=timeout)

    def backend_name(self) -> str:
        """NCCL on CUDA, gloo on the CPU, or both if CUDA shards are offloaded to CPU memory."""
        if self.config.offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of offloaded gradients are summed on the CPU
        return super().backend_name()

    def setup_environment(self) -> None:
        """Join the other ranks, and determine this rank's position on the mesh."""
        super().setup_environment()
        if self.data_ranks is None:
            self.data_ranks = divide_ranks(self.config.degrees(self.world_size), self.global_rank)

    def setup(self, trainer: pl.Trainer) -> None:
        """Move, synchronize and shard the module, then set up its optimizers."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.synchronize_layers()
        self.model = self.precision_plugin.convert_module(self.model)
        module = self.lightning_module
        assert module is not None
        sharded = isinstance(self.model, FSDPModule)
        empty = starts_on_meta(module, wanted=self.config.meta_init, fitting=fitting and not sharded)
        if not empty:
            self.model_to_device()
        if not sharded:
            check_types(module, sharded=True)
            settle_layout(module, sharded=True)
            if not empty:
                broadcast_tensors((*module.parameters(), *module.buffers()))
            mesh = self._mesh_of_ranks()
            if mesh.mesh_dim_names and "tensor" in mesh.mesh_dim_names:
                apply_tensor_plan(module, mesh["tensor"])
            if fitting:
                self._change_for_training(module)
            shard_module(
                module,
                without_tensor(mesh),
                reshard_after_forward=self.config.reshard_after_forward,
                forward_methods=[name for name in _STEPS if is_overridden(name, module)],
                offload=self._offload(),
                precision=shard_policy(str(trainer.precision), self.config.reduce_dtype),
            )
            check_units(module)
            if empty:
                initialize(module, self.root_device, seed=self.seed, offload=self.config.offload)
                self.model_to_device()
                self.sync_buffers()
            if self.config.reduce_dtype == "bf16":
                for unit in fsdp_modules(module):
                    unit.set_custom_reduce_scatter(NarrowReduceScatter())
        if fitting and self.config.reduction == "tree":
            self._reduce_in_tree(trainer)
        if fitting:
            self.setup_optimizers(trainer)
            self._manual = None if module.automatic_optimization else self._drive_backward()
        self.setup_precision_plugin()
        if fitting and not self.config.offload:
            move_optimizers(self.optimizers, self.root_device)

    def model_to_device(self) -> None:
        """Move the module to the device, except for shards offloaded to the CPU."""
        if self.config.offload and isinstance(self.model, FSDPModule):
            move_all_but_shards(self.model, self.root_device)
        else:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Skip the reduction in all micro batches of a step except the last."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def on_validation_end(self) -> None:
        """Restore sharded parameters, which callbacks may unfreeze or add to an optimizer."""
        if not self.config.reshard_after_forward:
            reshard(self._module())

    def _reducible(self) -> Iterator[tuple[str, nn.Parameter]]:
        return sharded_parameters(self._module())

    def _unreduced(self) -> str:
        # With automatic optimization all steps behave alike, so checking the first two is enough.
        self._looks += 1
        return unreduced_parameter(self._module()) if self._looks <= 2 or self._manual is not None else ""

    def _offload(self) -> OffloadPolicy:
        pinned = self.root_device.type == "cuda"
        return CPUOffloadPolicy(pin_memory=pinned) if self.config.offload else OffloadPolicy()

    def _mesh_of_ranks(self) -> DeviceMesh:
        """Return the mesh of all ranks: the shard axis, plus replicate and tensor axes if their degree exceeds 1."""
        if self._mesh is None:
            degrees = self.config.degrees(self.world_size)._asdict()
            axes = {name: degree for name, degree in degrees.items() if name == "shard" or degree > 1}
            self._mesh = init_device_mesh(self.root_device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
            for group in self._mesh.get_all_groups():
                set_timeout(group, timeout_of())
        return self._mesh

    def _reduce_in_tree(self, trainer: pl.Trainer) -> None:
        """Install a reduce-scatter on every sharded unit that sums in tree order, without dividing."""
        sums, (replicas, shards, _) = self._start_tree(trainer), self.config.degrees(self.world_size)
        ranks = data_ranks(trainer)
        exchange, rank = Exchange(ranks.group or _world(), ranks.rank), ranks.rank
        self._scatters.clear()
        assert self.model is not None
        for unit in fsdp_modules(self.model):
            scatter = TreeReduceScatter(sums, exchange, replicas=replicas, shards=shards, rank=rank)
            unit.set_custom_reduce_scatter(scatter)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            self._scatters.append(scatter)

    def _trained(self) -> list[tuple[str, Any]]:
        assert self.model is not None
        found: list[tuple[str, Any]] = []
        for unit, scatter in zip(fsdp_modules(self.model), self._scatters, strict=True):
            records = trained_parameters(unit)
            scatter.numbers = range(len(found), len(found) + len(records))
            found += [(parameter_name(record), record) for record in records]
        return found

    def _take(self, parameter: Any) -> Tensor | None:
        return take_unreduced(parameter)

    def _reduced(self, parameters: list[tuple[str, Any]]) -> None:
        for scatter in self._scatters:
            scatter.release()
        if data_ranks(self._trainer()).size == 1:  # FSDP2 skips its reduce-scatter then
            grads = [(name, record.sharded_param.grad) for name, record in parameters]
            self._finish_alone([(name, None if grad is None else grad.to_local()) for name, grad in grads])


def build_strategy(config: ParallelConfig, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT) -> DDP | FSDP:
    """Build the configured strategy; ``seed`` determines the initial weights with ``meta_init``."""
    return (FSDP if config.strategy == "fsdp" else DDP)(config, seed=seed, timeout=timeout)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


Strategy = DDP | FSDP


def strategy_of(trainer: pl.Trainer) -> Any:
    """Return the trainer's strategy, which must be one of disttrain's, typed as Any for its checkpoint methods."""
    strategy = trainer.strategy
    if not isinstance(strategy, CheckpointMixin):
        raise TypeError(f"{type(strategy).__name__} does not write disttrain checkpoints; use disttrain.DDP or FSDP")
    return strategy
