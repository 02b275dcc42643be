"""Functions that wrap FSDP2's private attributes, kept in one place.

FSDP2 keeps unreduced gradients of a micro batch in its modules' parameter groups and has no public access to them.
Supports PyTorch 2.11 to 2.13, between which the single group per module became a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """Return the modules, including this one, whose parameters are sharded as a unit."""
    return [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free gathered parameters that an evaluation has left behind.

    While gathered copies exist, the next forward pass uses them and ignores what is written to the shards.
    """
    for unit in fsdp_modules(module):
        unit.reshard()


def can_abandon_pass(module: nn.Module) -> bool:
    """Return whether :func:`abandon_pass` supports a module; sharded ones need PyTorch 2.13."""
    return not isinstance(module, FSDPModule) or hasattr(module, "reset_iter_state")


def abandon_pass(module: nn.Module) -> None:
    """Reset a module after an error inside a forward or backward pass, so that the next forward pass can start."""
    if not isinstance(module, FSDPModule) or not can_abandon_pass(module):
        return
    module.reset_iter_state()  # new in PyTorch 2.13
    for unit in fsdp_modules(module):  # it keeps the gradients of gathered parameters, which zero_grad() does not reach
        for group in _groups(unit):
            for record in group.fsdp_params:
                record.unsharded_accumulated_grad = None
                if hasattr(record, "_unsharded_param"):
                    record._unsharded_param.grad = None


def trained_parameters(module: FSDPModule) -> list[Any]:
    """Return FSDP2's records of a unit's trainable parameters, in the order of its reduce-scatter."""
    return [record for group in _groups(module) for record in group.fsdp_params if record.sharded_param.requires_grad]


def parameter_name(record: Any) -> str:
    """Return a parameter's name in its module."""
    return str(record._param_fqn or record._module_info.param_name)


def take_unreduced(record: Any) -> Tensor | None:
    """Return and clear a parameter's gradient accumulated since the last reduction."""
    gradient: Tensor | None = record.unsharded_accumulated_grad
    if gradient is not None:
        record.unsharded_accumulated_grad = None
    elif (parameter := getattr(record, "_unsharded_param", None)) is not None:
        gradient, parameter.grad = parameter.grad, None
    # With tensor parallelism the gradient is a DTensor: take this rank's part, reduced over the group if it is partial.
    inner: Tensor | None = None if gradient is None else record._get_grad_inner_tensor(gradient)
    return inner


class BackwardInside:
    """Allows backward passes inside a method that FSDP2 treats as a forward pass, for manual optimization.

    FSDP2 reduces gradients in hooks that it registers at the end of a forward pass. A ``training_step`` that calls
    ``manual_backward`` has not ended at that point. Without this class, the root's gradients (of all parameters outside
    blocks) would stay in the gathered parameters, where optimizers do not see them. So the forward pass is ended before
    each backward pass and begun again afterwards, and weights are gathered again after each optimizer step. Parameters
    whose ``requires_grad`` was cleared in between, as by ``toggle_optimizer``, get no gradient.

    Cost: the root's parameters are gathered twice more per backward pass and optimizer step.

    Args:
        root: the module whose ``training_step`` is registered as a forward pass.
    """

    def __init__(self, root: FSDPModule) -> None:
        self._root, self._units = root, fsdp_modules(root)  # type: ignore[arg-type]
        self._inside = False
        self._wanted: list[tuple[Any, bool]] = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Mark the training step as running."""
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
                # A gathered parameter is a separate leaf tensor: copy requires_grad from the sharded one.
                if not record.sharded_param.requires_grad:
                    record._unsharded_param.requires_grad_(False)

    def after_backward(self) -> None:
        """Begin the next forward pass."""
        if self._inside:
            self._begin()

    def after_step(self) -> None:
        """Free gathered weights, which are stale after the optimizer step."""
        if self._inside:
            self._note()
        self.release()
        if self._inside:
            self._begin()

    def release(self) -> None:
        """Switch back to the sharded parameters, which the optimizers hold."""
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
        """Record which of the root's gathered parameters require gradients."""
        records = [record for group in _groups(self._root) for record in group.fsdp_params]
        self._wanted = [(record, record._unsharded_param.requires_grad) for record in records]

    def _records(self) -> Iterator[Any]:
        for unit in self._units:
            for group in _groups(unit):
                yield from (record for record in group.fsdp_params if hasattr(record, "_unsharded_param"))


def sharded_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names and sharded parameters, the ones that optimizers step."""
    for unit in fsdp_modules(module):
        for group in _groups(unit):
            for record in group.fsdp_params:
                yield parameter_name(record), record.sharded_param


def unreduced_parameter(module: nn.Module) -> str:
    """Return the name of a parameter whose gradient is left in its gathered copy, or an empty string."""
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
    """Return FSDP2's parameter groups of a unit."""
    state = _state(module)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)
