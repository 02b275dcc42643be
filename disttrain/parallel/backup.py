"""Copies of what a training step changes, so that the step can be taken back.

:class:`BufferBackup` holds a module's buffers, such as the running statistics of batch norms, on their device.
:class:`OptimizerBackup` holds this rank's parameters and optimizer state on the host; state that did not exist then
is removed again. Cost: memory and time of the copies; the second waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class BufferBackup:
    """A copy of a module's buffers.

    Args:
        module: whose buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now."""
        older, self._copies = self._copies, {}
        for name, buffer in self._module.named_buffers():
            local, copy = _local(buffer), older.get(name)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype or copy.device != local.device:
                copy = torch.empty_like(local)
            self._copies[name] = copy.copy_(local)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for name, buffer in self._module.named_buffers():
            if name in self._copies:
                _local(buffer).copy_(self._copies[name])


class OptimizerBackup:
    """A copy, on the host, of a module's parameters and of the state of its optimizers.

    Args:
        module: whose parameters; the loss scale of its precision plugin is kept too.
        optimizers: PyTorch's, not Lightning's wrappers.
    """

    def __init__(self, module: pl.LightningModule, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._states = [
            {parameter: {name: _Kept(value) for name, value in state.items()} for parameter, state in o.state.items()}
            for o in optimizers
        ]
        self._groups = [
            [{name: _Kept(value) for name, value in group.items() if name != "params"} for group in o.param_groups]
            for o in optimizers
        ]
        self._scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        scale = [getattr(self._scaler, name, None) for name in ("_scale", "_growth_tracker")]
        self._tensors = [_Kept(tensor) for tensor in (*module.parameters(), *scale)]

    def restore(self) -> None:
        """Put the copies back."""
        for tensor in self._tensors:
            tensor.restored()
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            for parameter in [parameter for parameter in optimizer.state if parameter not in states]:
                del optimizer.state[parameter]
            for parameter, state in states.items():
                now = optimizer.state[parameter]
                now.clear()
                now.update({name: value.restored() for name, value in state.items()})
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.update({name: value.restored() for name, value in kept.items()})
        if self._scaler is not None:
            self._scaler._per_optimizer_states.clear()  # it would refuse to unscale a second time


class _Kept:
    """A value, and a copy of this rank's part of it where it is a tensor."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._copy = _local(value).to("cpu", copy=True) if isinstance(value, Tensor) else None

    @torch.no_grad()
    def restored(self) -> Any:
        """The same value, as it was."""
        if self._copy is not None:
            _local(self._value).copy_(self._copy)
        return self._value


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
