"""Check that an optimizer only steps parameters that the strategy reduces.

If a parameter's gradient is not reduced, each rank silently trains it on its own samples: the ranks diverge, and the
checkpoint holds rank 0's values. So every optimizer's parameters are compared with the module's at their first step and
whenever their number changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from disttrain.errors import ConfigError


def class_name(module: nn.Module) -> str:
    """Return a module's class name as its author wrote it: ``fully_shard`` creates a subclass with a prefix."""
    kind = type(module)  # under FSDP2, the MRO begins with the subclass, FSDPModule and the original class
    return kind.__mro__[2].__name__ if isinstance(module, FSDPModule) else kind.__name__


def check_members(optimizer: Optimizer, reducible: Mapping[str, nn.Parameter], module: nn.Module) -> None:
    """Reject an optimizer that steps parameters which the strategy does not reduce.

    Args:
        optimizer: the optimizer.
        reducible: the parameters whose gradients are reduced, or will be once they are trained, by name.
        module: the LightningModule, for the message.

    Raises:
        ConfigError: it holds another parameter that is trained.
    """
    known = set(map(id, reducible.values()))
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in parameters if p.requires_grad and id(p) not in known]
    if not strange:
        return
    kind, count = type(optimizer).__name__, len(strange)
    raise ConfigError(
        f"{kind} of {class_name(module)} updates {count} parameter{'s' * (count > 1)}, the first of shape"
        f" {tuple(strange[0].shape)}, that the strategy does not manage: the module does not hold"
        f" {'them' if count > 1 else 'it'}, or did not when training was set up, so the ranks would diverge",
        hint="create layers in __init__, hold them in a module or nn.ModuleList (not a plain list), and create"
        " optimizers in configure_optimizers",
    )
