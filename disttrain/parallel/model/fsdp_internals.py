"""The parts of FSDP2 that have no public name, in one place.

FSDP2 keeps the gradient of a micro batch that is not reduced in the parameter groups of its modules; nothing public
hands it out. Written for PyTorch 2.11 to 2.13: groups moved from one a module to a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """The modules inside a module, itself included, whose parameters are sharded as a unit."""
    return [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Let a module hold its sharded parameters again, where an evaluation has left gathered ones.

    What is written to the shards while gathered copies are kept would not reach the next forward pass.
    """
    for unit in fsdp_modules(module):
        unit.reshard()


def can_abandon_pass(module: nn.Module) -> bool:
    """Whether :func:`abandon_pass` can put a module right; before PyTorch 2.13, not a sharded one."""
    return not isinstance(module, FSDPModule) or hasattr(module, "reset_iter_state")


def abandon_pass(module: nn.Module) -> None:
    """Let a module begin a forward pass after an error in the midst of another one, or of its backward pass."""
    if not isinstance(module, FSDPModule) or not can_abandon_pass(module):
        return
    module.reset_iter_state()  # new in PyTorch 2.13
    for unit in fsdp_modules(module):  # it leaves gradients in gathered parameters, which zero_grad() does not reach
        for group in _groups(unit):
            for record in group.fsdp_params:
                record.unsharded_accumulated_grad = None
                if hasattr(record, "_unsharded_param"):
                    record._unsharded_param.grad = None


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
