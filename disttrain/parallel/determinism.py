"""Deterministic CUDA kernels, and detection of nondeterministic ones.

Some kernels sum with atomic operations, in whatever order threads arrive. ``trainer.deterministic`` makes PyTorch use
other kernels or raise. Without it, ``reduction: tree`` cannot keep its guarantee, so it rejects steps known to use such
a kernel: :func:`unordered_sums` searches the graph of the loss. Cost: one walk over that graph, and slower kernels if
requested.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final

import torch
from torch import Tensor

from disttrain.errors import ConfigError
from disttrain.system.device import uses_cuda

_VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
_VALUES: Final = (":4096:8", ":16:8")

# Names of autograd nodes that torch.use_deterministic_algorithms() replaces or rejects on CUDA. Some sum in the forward
# pass (cumsum, scatter_add), the others in the node's backward pass. Convolutions are not listed: cuDNN is set to be
# deterministic.
_UNORDERED: Final = re.compile(
    r"(ScaledDotProduct(Flash|Efficient|FusedAttentionOverrideable|Cudnn)(Attention)?"
    r"|FlashAttention|EfficientAttention"
    r"|IndexSelect|IndexAdd|Gather|ScatterAdd|ScatterReduce|Put|Cumsum|Cumprod"
    r"|AvgPool3D|AdaptiveAvgPool[23]D|AdaptiveMaxPool[23]D|FractionalMaxPool[23]D|MaxPool3DWithIndices"
    r"|Upsample(Linear1D|Bilinear2D|Bicubic2D|Trilinear3D)(Aa)?|GridSampler[23]D(Cudnn)?"
    r"|ReflectionPad[123]D|ReplicationPad[123]D|NllLoss2D|CtcLoss|CudnnCtcLoss)Backward\d*"
)


def use_deterministic_kernels(device: str) -> None:
    """Make PyTorch use deterministic kernels or raise, process-wide. Call before anything runs on a device.

    Args:
        device: device type.

    Raises:
        ConfigError: cuBLAS is configured otherwise, or this process has already used CUDA.
    """
    if device == "cuda":
        given = os.environ.get(_VARIABLE)
        if given is not None and given not in _VALUES:
            raise ConfigError(
                f"trainer.deterministic is true, and {_VARIABLE} is {given!r}, with which cuBLAS is not deterministic",
                hint=f"unset it, or export {_VARIABLE}={_VALUES[0]}",
            )
        if given is None and uses_cuda():
            raise ConfigError(
                "trainer.deterministic is true, but this process has used CUDA already",
                hint=f"export {_VARIABLE}={_VALUES[0]} before it starts, or build the Trainer first",
            )
        os.environ[_VARIABLE] = given or _VALUES[0]
        use_deterministic_convolutions()
    torch.use_deterministic_algorithms(True)


def use_deterministic_convolutions() -> None:
    """Make cuDNN choose deterministic kernels, process-wide; often they are the ones it would choose anyway."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def check_ordered_sums(loss: Tensor, device: torch.device) -> None:
    """Check that nothing in the graph of a loss sums in a nondeterministic order on this device.

    Raises:
        ConfigError: an operation is known to do so.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return
    if found := unordered_sums(loss):
        raise ConfigError(
            f"parallel.reduction is tree, and the model's {', '.join(found)} on CUDA adds in a different order"
            " each time",
            hint="set trainer.deterministic to true, or parallel.reduction to fast",
        )


def unordered_sums(loss: Tensor) -> list[str]:
    """Return sorted names of nodes in the graph of a loss whose default CUDA kernels sum in no fixed order."""
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
