"""Kernels of CUDA that give the same bits each time they run on the same numbers, and those that do not.

Some kernels add by atomic operations, in whichever order the threads arrive. ``trainer.deterministic`` makes PyTorch
take others, or refuse. Without it, ``reduction: tree`` cannot hold what it promises, so a step that is known to use
such a kernel is refused then: :func:`unordered_sums` finds it in the graph of the loss. No cost but one walk over that
graph, and slower kernels where they are asked for.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final

import torch
from torch import Tensor

from disttrain.data.device import uses_cuda
from disttrain.errors import ConfigError

_VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
_VALUES: Final = (":4096:8", ":16:8")

# By the names of autograd's nodes: what torch.use_deterministic_algorithms() replaces or refuses on CUDA. Some add in
# the forward pass (cumsum, scatter_add), the others in the backward pass of the node. Convolutions are left out: for
# them cuDNN is told to be deterministic.
_UNORDERED: Final = re.compile(
    r"(ScaledDotProduct(Flash|Efficient|FusedAttentionOverrideable|Cudnn)(Attention)?"
    r"|FlashAttention|EfficientAttention"
    r"|IndexSelect|IndexAdd|Gather|ScatterAdd|ScatterReduce|Put|Cumsum|Cumprod"
    r"|AvgPool3D|AdaptiveAvgPool[23]D|AdaptiveMaxPool[23]D|FractionalMaxPool[23]D|MaxPool3DWithIndices"
    r"|Upsample(Linear1D|Bilinear2D|Bicubic2D|Trilinear3D)(Aa)?|GridSampler[23]D(Cudnn)?"
    r"|ReflectionPad[123]D|ReplicationPad[123]D|NllLoss2D|CtcLoss|CudnnCtcLoss)Backward\d*"
)


def use_deterministic_kernels(device: str) -> None:
    """Have PyTorch use deterministic kernels or refuse, for the whole process. Before anything runs on a device.

    Args:
        device: kind of device.

    Raises:
        ConfigError: cuBLAS has been told otherwise, or this process has used CUDA before.
    """
    if device == "cuda":
        given = os.environ.get(_VARIABLE)
        if given is not None and given not in _VALUES:
            raise ConfigError(
                f"trainer.deterministic is true, and {_VARIABLE} is {given!r}, with which cuBLAS is not deterministic",
                mend=f"unset it, or export {_VARIABLE}={_VALUES[0]}",
            )
        if given is None and uses_cuda():
            raise ConfigError(
                "trainer.deterministic is true, but this process has used CUDA already",
                mend=f"export {_VARIABLE}={_VALUES[0]} before it starts, or build the Trainer first",
            )
        os.environ[_VARIABLE] = given or _VALUES[0]
        use_deterministic_convolutions()
    torch.use_deterministic_algorithms(True)


def use_deterministic_convolutions() -> None:
    """Have cuDNN choose deterministic kernels, for the whole process; they are often those it would have chosen."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def check_ordered_sums(loss: Tensor, device: torch.device) -> None:
    """See that nothing in the graph of a loss adds in an order of its own on this device.

    Raises:
        ConfigError: something is known to.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return
    if found := unordered_sums(loss):
        raise ConfigError(
            f"parallel.reduction is tree, and the model's {', '.join(found)} on CUDA adds in another order each time",
            mend="set trainer.deterministic to true, or parallel.reduction to fast",
        )


def unordered_sums(loss: Tensor) -> list[str]:
    """Names of the nodes in the graph of a loss whose kernels on CUDA add in no fixed order, by default; sorted."""
    found: set[str] = set()
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if match := _UNORDERED.fullmatch(node.name()):
            found.add(match[1])
        nodes += [following for following, _ in node.next_functions]
    return sorted(found)
