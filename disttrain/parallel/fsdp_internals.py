"""The parts of FSDP2 that have no public name, in one place.

FSDP2 keeps the gradient of a micro batch that is not reduced in the parameter groups of its modules; nothing public
hands it out. Written for PyTorch 2.11 to 2.13: groups moved from one a module to a list.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


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
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return [record for group in groups for record in group.fsdp_params if record.sharded_param.requires_grad]


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
