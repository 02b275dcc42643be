"""DDP and FSDP as Lightning strategies that share one checkpoint format and one set of habits.

Both take their ranks from the launcher and run on CUDA with NCCL and on the CPU with gloo. The module is
wrapped from outside; nothing is asked of it. Weights are rank 0's at the start whatever the seeds. Under
both, gradients of a step are reduced once, at its last micro batch: in the library's order, or in one tree over the
micro batches (:mod:`disttrain.parallel.reduction.summation`). DDP's bucket layout is settled before the first step, so
that a resumed run reduces in the same order as one that was never interrupted.
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
    """Every rank holds the whole model; gradients are averaged in buckets while the backward pass runs.

    Args:
        config: bucket size, the search for unused parameters, the order of sums.
        seed: keys initial weights of a model that was built on the meta device.
        timeout: how long a collective may take until PyTorch gives it up.
    """

    def __init__(
        self, config: ParallelConfig | None = None, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT
    ) -> None:
        self.config, self.seed = config or ParallelConfig(strategy="ddp"), seed
        self._hook: BucketHook | None = None
        self._filled = self._graph_learned = False
        self._known: list[tuple[str, nn.Parameter]] = []  # the parameters when DDP was built
        self._flags: list[bool] = []  # which of them were trained
        super().__init__(
            bucket_cap_mb=self.config.bucket_mib,
            find_unused_parameters=self.config.find_unused_parameters,
            gradient_as_bucket_view=self.config.gradient_as_bucket_view,
            static_graph=self.config.static_graph,
            timeout=timeout,
        )

    def model_to_device(self) -> None:
        """Move the module, or give it memory and initial values."""
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
        """Wrap the module; one rank alone has nothing to reduce and stays unwrapped."""
        module = self._module()
        self._change_for_training(module)
        self._outside = False
        self._wrap()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        self._rebuild_if_changed()
        return super().training_step(*args, **kwargs)

    def _rebuild_if_changed(self) -> None:
        """Build DDP again if layers were frozen or thawed since: it waits for what was trained then. A collective."""
        trainer = self._trainer()
        # Within a step gradients are on their way; check_reduced refuses a change there.
        if not self._changed() or not begins_step(trainer):
            return
        if self._hook is not None:
            self._hook.close()
        self.model = self._module()
        gc.collect()  # the old reducer, whose hooks would see the gradients, too
        self._wrap()

    def _changed(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that DDP takes for trained and are frozen now, or the other way round."""
        # With find_unused_parameters DDP does not wait for frozen ones.
        minds = not self.config.find_unused_parameters
        known = zip(self._known, self._flags, strict=True)
        return [one for one, trained in known if one[1].requires_grad != trained and (minds or not trained)]

    def _wrap(self) -> None:
        """Let DDP reduce the gradients of all that is trained now. A collective."""
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
            # The hook's collectives come from a thread of their own, so they have a group of their own.
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
        """Keep gradients unreduced in all micro batches of a step but the last.

        A static graph is learned from one backward pass that reduces: a run's first, whose gradients are reduced once
        more with the step's last ones, which changes them by rounding alone.
        """
        self._rebuild_if_changed()  # whose gradients are to stay unreduced
        if self.config.static_graph and not self._graph_learned:
            yield
        else:
            with super().block_backward_sync():
                yield

    def post_backward(self, closure_loss: Tensor) -> None:
        """Note that a backward pass was made."""
        super().post_backward(closure_loss)
        self._graph_learned = True

    def teardown(self) -> None:
        """End what reduces gradients."""
        if self._hook is not None:
            self._hook.close()
        super().teardown()

    def _reducible(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._known)

    def _unreduced(self) -> str:
        # DDP reduces nothing at all while one that it waits for is frozen.
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
    """Parameters, gradients and optimizer state are sharded over the ranks (PyTorch's FSDP2).

    Args:
        config: over which ranks to shard, what to reshard, the order of sums.
        seed: keys initial weights of a model that was built on the meta device.
        timeout: how long a collective may take until PyTorch gives it up.
    """

    def __init__(
        self, config: ParallelConfig | None = None, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT
    ) -> None:
        self.config, self.seed = config or ParallelConfig(strategy="fsdp"), seed
        self._mesh: DeviceMesh | None = None
        self.data_ranks: DataRanks | None = None
        """This rank's place among those that divide the data; known once the ranks have met."""
        self._scatters: list[TreeReduceScatter] = []
        self._looks = 0
        super().__init__(timeout=timeout)

    def backend_name(self) -> str:
        """NCCL with CUDA and gloo without; both, if shards are in the CPU's memory."""
        if self.config.offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of gradients in the CPU's memory are summed there
        return super().backend_name()

    def setup_environment(self) -> None:
        """Join the other ranks, and find this rank's place on the mesh."""
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
        """Move the module; shards that live on the CPU stay there."""
        if self.config.offload and isinstance(self.model, FSDPModule):
            move_all_but_shards(self.model, self.root_device)
        else:
            super().model_to_device()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients unreduced in all micro batches of a step but the last."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def on_validation_end(self) -> None:
        """Hold sharded parameters again, which callbacks may thaw or give to an optimizer."""
        if not self.config.reshard_after_forward:
            reshard(self._module())

    def _reducible(self) -> Iterator[tuple[str, nn.Parameter]]:
        return sharded_parameters(self._module())

    def _unreduced(self) -> str:
        # What a module does in one step of automatic optimization it does in all: the first ones tell.
        self._looks += 1
        return unreduced_parameter(self._module()) if self._looks <= 2 or self._manual is not None else ""

    def _offload(self) -> OffloadPolicy:
        pinned = self.root_device.type == "cuda"
        return CPUOffloadPolicy(pin_memory=pinned) if self.config.offload else OffloadPolicy()

    def _mesh_of_ranks(self) -> DeviceMesh:
        """All ranks, on an axis to shard over and those of copies and of tensor groups that are longer than one."""
        if self._mesh is None:
            degrees = self.config.degrees(self.world_size)._asdict()
            axes = {name: degree for name, degree in degrees.items() if name == "shard" or degree > 1}
            self._mesh = init_device_mesh(self.root_device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
            for group in self._mesh.get_all_groups():
                set_timeout(group, timeout_of())
        return self._mesh

    def _reduce_in_tree(self, trainer: pl.Trainer) -> None:
        """Give every sharded unit a reduce-scatter that sums in the order of the tree and does not divide."""
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
        if data_ranks(self._trainer()).size == 1:  # FSDP2 calls no reduce-scatter then
            grads = [(name, record.sharded_param.grad) for name, record in parameters]
            self._finish_alone([(name, None if grad is None else grad.to_local()) for name, grad in grads])


def build_strategy(config: ParallelConfig, *, seed: int = 0, timeout: timedelta = PYTORCHS_TIMEOUT) -> DDP | FSDP:
    """The strategy that a configuration names; the seed keys initial weights with ``meta_init``."""
    return (FSDP if config.strategy == "fsdp" else DDP)(config, seed=seed, timeout=timeout)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


Strategy = DDP | FSDP


def strategy_of(trainer: pl.Trainer) -> Any:
    """The trainer's strategy, which must be one of disttrain's; typed for its checkpoint methods."""
    strategy = trainer.strategy
    if not isinstance(strategy, CheckpointMixin):
        raise TypeError(f"{type(strategy).__name__} does not write disttrain checkpoints; use disttrain.DDP or FSDP")
    return strategy
