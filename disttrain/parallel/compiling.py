"""``compile: blocks``: every block of the model is compiled by ``torch.compile`` (TorchInductor).

Blocks are those that FSDP shards (:func:`disttrain.parallel.shard.shard_units`). Only their ``forward`` is compiled, so
FSDP's hooks stay outside, DDP reduces between blocks as before, and classes and names stay as they are. Blocks of one
structure share their compiled code. Activation checkpointing is compiled with its block. :func:`compilation` tells
where compilation broke off, which costs speed and nothing else.

Random numbers in compiled code are TorchInductor's own: other masks than without compiling, but keyed by the same
generators, hence the same in every layout. Cost: seconds to a minute for each structure, for training and for
evaluation, at the first step of a process; compiled code is kept on disk by PyTorch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from disttrain.errors import ConfigError
from disttrain.parallel.recompute import BlockForward
from disttrain.parallel.shard import no_blocks, shard_units

_Codes = dict[tuple[types.CodeType | None, str], types.CodeType]


@dataclass(frozen=True)
class Compilation:
    """What a process has compiled so far.

    Attributes:
        graphs: graphs that were compiled; one a structure and mode where nothing breaks.
        breaks: how often a graph broke off, by reason.
        recompiled: how often code was compiled anew, by reason.
    """

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    recompiled: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"graphs": self.graphs, "graph_breaks": self.breaks, "recompiled": self.recompiled}


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile the blocks of a module at their first use; blocks that are compiled already are left as they are.

    Args:
        module: whose blocks.
        device: where they will run.

    Raises:
        ConfigError: the module has no blocks, or nothing here can compile for the device.
    """
    blocks = shard_units(module)
    if not blocks:
        raise no_blocks("parallel.compile is blocks", module, "compile")
    _check_compiler(device)
    # It would cut graphs at the borders of DDP's buckets; blocks are cut already, and it refuses checkpointed ones.
    torch._dynamo.config.optimize_ddp = False
    codes: _Codes = {}
    for block in blocks:
        if not isinstance(block.forward, _Compiled):
            block.forward = _Compiled(block, codes)


def compilation() -> Compilation:
    """What this process has compiled so far."""
    from torch._dynamo import utils

    recompiled: dict[str, int] = {}
    for metrics in utils.get_compilation_metrics():
        reason = getattr(metrics, "recompile_reason", None)
        if reason:
            recompiled[_brief(reason)] = recompiled.get(_brief(reason), 0) + 1
    breaks: dict[str, int] = {}
    for reason, count in utils.counters["graph_break"].items():
        breaks[_brief(reason)] = breaks.get(_brief(reason), 0) + count
    return Compilation(int(utils.counters["stats"]["unique_graphs"]), breaks, recompiled)


class _Compiled(BlockForward):
    """A block's forward pass, compiled."""

    def __init__(self, block: nn.Module, codes: _Codes) -> None:
        self._call: Callable[..., Any] = torch.compile(_function(block.forward, repr(block), codes))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _function(forward: Callable[..., Any], structure: str, codes: _Codes) -> Callable[..., Any]:
    """The same function, with a code object for each structure.

    PyTorch keeps compiled variants with a function's code object and gives up compiling when there are too many: blocks
    of one structure should share one, blocks of different structures must not.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    method = isinstance(forward, types.MethodType) and isinstance(forward.__func__, types.FunctionType)
    own = forward.__func__ if method else run  # type: ignore[attr-defined]
    code = codes.setdefault((own.__code__ if method else None, structure), own.__code__.replace())
    copy = types.FunctionType(code, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return types.MethodType(copy, forward.__self__) if method else copy  # type: ignore[attr-defined]


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                f"parallel.compile is blocks, and Triton cannot compile for {torch.cuda.get_device_name(device)}",
                mend="install triton (it needs compute capability 7.0), or set parallel.compile to none",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ConfigError(
            "parallel.compile is blocks, and there is no C++ compiler to compile for the CPU",
            mend="install g++ or set the environment variable CXX, or set parallel.compile to none",
        ) from error


def _brief(reason: str) -> str:
    """The first line of what PyTorch explains at length, and where in the code it was."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[0] if lines else "unknown"
