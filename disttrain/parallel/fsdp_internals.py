"""The parts of FSDP2 that have no public name, in one place.

FSDP2 keeps the gradient of a micro batch that is not reduced in the parameter groups of its modules; nothing public
hands it out. Nor can its hooks be run without the modules (:class:`UnitDriver`). Written for PyTorch 2.11 to 2.13:
groups moved from one a module to a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from disttrain.parallel.out_of_memory import no_way_back


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The modules inside a module, itself included, whose parameters are sharded as a unit."""
    return [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Let a module hold its sharded parameters again, where an evaluation has left gathered ones.

    What is written to the shards while gathered copies are kept would not reach the next forward pass.
    """
    for unit in fsdp_modules(module):
        unit.reshard()


def trained_parameters(module: FSDPModule) -> list[Any]:
    """FSDP2's records of a unit's parameters that get gradients, in the order of its reduce-scatter."""
    return [record for group in _groups(module) for record in group.fsdp_params if record.sharded_param.requires_grad]


def parameter_name(record: Any) -> str:
    """What the module calls a parameter."""
    return str(record._param_fqn or record._module_info.param_name)


def take_unreduced(record: Any) -> Tensor | None:
    """Take a parameter's gradient of the micro batches since the last reduction, so that the next starts anew."""
    gradient: Tensor | None = record.unsharded_accumulated_grad
    if gradient is not None:
        record.unsharded_accumulated_grad = None
    elif (parameter := getattr(record, "_unsharded_param", None)) is not None:
        gradient, parameter.grad = parameter.grad, None
    # Of a tensor group's parameter, this rank's part, summed over the group where that is still to be done.
    inner: Tensor | None = None if gradient is None else record._get_grad_inner_tensor(gradient)
    return inner


class _Noting(ReduceScatter):
    """A reduce-scatter that notes whether it was done."""

    def __init__(self, inner: ReduceScatter) -> None:
        self.inner, self.done = inner, False

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        self.done = True
        return result


class UnitDriver:
    """Runs what FSDP2 does around sharded units without the units themselves.

    A unit stands for its parameter groups. Every collective of FSDP2 is called here as its hooks would call it.

    Args:
        units: all units of a module, itself included.
    """

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        self.reduced: set[FSDPModule] = set()
        """Units whose backward pass in this micro batch is over, gradients and all."""
        self._first = 0
        self._unit_of = {id(group): unit for unit in units for group in _groups(unit)}
        self._watched = [group for unit in units for group in _groups(unit)]
        for unit in units:
            for group in _groups(unit):
                self._watch(unit, group)

    def close(self) -> None:
        """Leave FSDP2 as it was."""
        for group in self._watched:
            vars(group).pop("post_backward", None)
            if isinstance(group._reduce_scatter_comm, _Noting):
                group._reduce_scatter_comm = group._reduce_scatter_comm.inner

    def begin(self, root: FSDPModule) -> None:
        """A micro batch begins: the root's parameters are gathered."""
        self.reduced.clear()
        # An evaluation leaves its passes there, which the next backward pass clears.
        self._first = len(_state(root)._comm_ctx.post_forward_order)

    def ran(self, root: FSDPModule) -> list[FSDPModule]:
        """The units whose forward pass in this micro batch is over, in order."""
        return [
            self._unit_of[id(group)]
            for group in _state(root)._comm_ctx.post_forward_order[self._first :]
            if getattr(group, "_param_group_index", 0) == 0
        ]

    def is_trained(self, unit: FSDPModule) -> bool:
        """Whether any of a unit's parameters gets a gradient."""
        return bool(trained_parameters(unit))

    def pass_by(self, unit: FSDPModule) -> None:
        """A unit's forward pass, all but the unit's own."""
        state = _state(unit)
        state._pre_forward(unit, (), {})
        state._post_forward(unit, (), None)

    def queue_callback(self, root: FSDPModule) -> None:
        """Have FSDP2 end the backward pass that is under way."""
        _state(root)._register_root_post_backward_final_callback()

    def forget_callback(self, root: FSDPModule) -> None:
        """A backward pass has failed, and its end will not come."""
        _state(root)._state_ctx.post_backward_final_callback_queued = False

    def begin_gathering(self, unit: FSDPModule) -> None:
        """Gather a unit's parameters for the backward pass ahead of their use, unless that was begun."""
        for group in _groups(unit):
            if group._training_state != TrainingState.POST_BACKWARD:
                with group.use_training_state(TrainingState.PRE_BACKWARD):
                    group.unshard(group.unshard_async_op)

    def gather(self, unit: FSDPModule) -> None:
        """Gather a unit's parameters for the backward pass, unless they are there."""
        for group in _groups(unit):
            # A unit whose reduction failed has been gathered, and has let go of it.
            if group._training_state != TrainingState.POST_BACKWARD:
                group._training_state = TrainingState.PRE_BACKWARD
                group.unshard(group.unshard_async_op)
                group.wait_for_unshard()

    def give_zeros(self, unit: FSDPModule, *, reduce: bool) -> None:
        """Put zeros where gradients are missing.

        Args:
            unit: to which unit.
            reduce: end its backward pass; otherwise FSDP2 does so at the end of the whole.
        """
        for group in _groups(unit):
            for record in group.fsdp_params if group.reduce_grads else ():
                whole = record._unsharded_param
                if whole.requires_grad and whole.grad is None and record.unsharded_accumulated_grad is None:
                    whole.grad = torch.zeros_like(whole)
            group._training_state = TrainingState.PRE_BACKWARD
            if reduce:
                group.post_backward()

    def _watch(self, unit: FSDPModule, group: Any) -> None:
        original = group.post_backward
        scatter = group._reduce_scatter_comm = _Noting(group._reduce_scatter_comm)

        def post_backward(*unused: Any) -> None:
            scatter.done = False
            try:
                original(*unused)
            except Exception:
                if not scatter.done:
                    raise  # to be called once more
                with no_way_back("after the others had its gradients of a sharded block, which they want once"):
                    raise
            self.reduced.add(unit)

        group.post_backward = post_backward


class BackwardInside:
    """Lets backward passes run inside a method that FSDP2 takes for a forward pass: manual optimization.

    FSDP2 reduces gradients in hooks that it sets where a forward pass ends. A ``training_step`` that calls
    ``manual_backward`` has not ended then: without this class the gradients of all that is not a block of its own stay
    in the gathered parameters, where no optimizer looks. So the forward pass is ended before a backward pass and begun
    again after it, and gathered weights are gathered again once an optimizer has stepped. Parameters whose
    ``requires_grad`` was taken away meanwhile, as ``toggle_optimizer`` does, get no gradient.

    Cost: the root's parameters are gathered twice more for each backward pass and each optimizer step.

    Args:
        root: the module whose ``training_step`` is registered as a forward pass.
    """

    def __init__(self, root: FSDPModule) -> None:
        self._root, self._units = root, fsdp_modules(root)  # type: ignore[arg-type]
        self._inside = False
        self._wanted: list[tuple[Any, bool]] = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While the training step runs."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def before_backward(self, loss: Tensor) -> None:
        """End the forward pass."""
        if self._inside:
            self._note()
            _state(self._root)._post_forward(self._root, (), loss)
            for record in self._records():
                # A gathered parameter is a leaf of its own, which does not hear of what is done to the sharded one.
                if not record.sharded_param.requires_grad:
                    record._unsharded_param.requires_grad_(False)

    def after_backward(self) -> None:
        """Begin the next forward pass."""
        if self._inside:
            self._begin()

    def after_step(self) -> None:
        """Let go of gathered weights, which the optimizer has not stepped."""
        if self._inside:
            self._note()
        self.release()
        if self._inside:
            self._begin()

    def release(self) -> None:
        """Hold sharded parameters, which optimizers know."""
        for unit in self._units:
            for group in _groups(unit):
                group._training_state = TrainingState.IDLE
            unit.reshard()

    def _begin(self) -> None:
        state = _state(self._root)
        state._training_state = TrainingState.IDLE
        state._pre_forward(self._root, (), {})
        for record, wanted in self._wanted:
            record._unsharded_param.requires_grad_(wanted)

    def _note(self) -> None:
        """Remember which of the root's gathered parameters the module wants gradients for."""
        records = [record for group in _groups(self._root) for record in group.fsdp_params]
        self._wanted = [(record, record._unsharded_param.requires_grad) for record in records]

    def _records(self) -> Iterator[Any]:
        for unit in self._units:
            for group in _groups(unit):
                yield from (record for record in group.fsdp_params if hasattr(record, "_unsharded_param"))


def sharded_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that optimizers step, by name."""
    for unit in fsdp_modules(module):
        for group in _groups(unit):
            for record in group.fsdp_params:
                yield parameter_name(record), record.sharded_param


def unreduced_parameter(module: nn.Module) -> str:
    """A parameter whose gradient was left in its gathered copy; empty where there is none."""
    for unit in fsdp_modules(module):
        for group in _groups(unit):
            for record in group.fsdp_params:
                whole = getattr(record, "_unsharded_param", None)
                if record.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                    return parameter_name(record)
    return ""


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP2's parameter groups of a unit."""
    state = _state(module)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)
