"""``compile: blocks``: compile every block of the model with ``torch.compile`` (TorchInductor).

Blocks are the units that FSDP shards (:func:`disttrain.parallel.model.fsdp.shard_units`). Only their ``forward`` is
compiled, so FSDP's hooks stay outside, DDP still reduces between blocks, and classes and names are unchanged. Blocks of
the same structure share compiled code. Activation checkpointing is compiled along with its block. :func:`compilation`
reports graph breaks, which only cost speed.

Compiled code uses TorchInductor's random numbers: dropout masks differ from eager mode, but the same generators seed
them, so they are the same in every layout. Cost: seconds to a minute per structure, for training and again for
evaluation, in the first step of a process; PyTorch caches compiled code on disk.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from disttrain.errors import ConfigError
from disttrain.parallel.model.activation_checkpointing import BlockForward
from disttrain.parallel.model.fsdp import no_blocks, shard_units

_Codes = dict[tuple[types.CodeType | None, str], types.CodeType]


@dataclass(frozen=True)
class Compilation:
    """What this process has compiled so far.

    Attributes:
        graphs: number of compiled graphs; without breaks, one per structure and mode.
        breaks: number of graph breaks by reason.
        recompiled: number of recompilations by reason.
    """

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    recompiled: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for the run's record."""
        return {"graphs": self.graphs, "graph_breaks": self.breaks, "recompiled": self.recompiled}


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Make a module's blocks compile on first use; skip blocks that already do.

    Args:
        module: the module.
        device: where the blocks will run.

    Raises:
        ConfigError: the module has no blocks, or this machine lacks a compiler for the device.
    """
    blocks = shard_units(module)
    if not blocks:
        raise no_blocks("parallel.compile is blocks", module, "compile")
    _check_compiler(device)
    # DDPOptimizer splits graphs at bucket boundaries. Blocks are split already, and it rejects checkpointed ones.
    torch._dynamo.config.optimize_ddp = False
    codes: _Codes = {}
    for block in blocks:
        if not isinstance(block.forward, _Compiled):
            block.forward = _Compiled(block, codes)


def compilation() -> Compilation:
    """Return what this process has compiled so far."""
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
    """A block's compiled forward pass."""

    def __init__(self, block: nn.Module, codes: _Codes) -> None:
        self._call: Callable[..., Any] = torch.compile(_function(block.forward, repr(block), codes))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _function(forward: Callable[..., Any], structure: str, codes: _Codes) -> Callable[..., Any]:
    """Copy a function, with one code object per structure.

    PyTorch attaches compiled variants to a function's code object, and stops compiling when there are too many. Blocks
    of the same structure should share one; blocks of different structures must not.
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
                f"parallel.compile is blocks, but Triton cannot compile for {torch.cuda.get_device_name(device)}",
                hint="install triton (it needs compute capability 7.0), or set parallel.compile to none",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ConfigError(
            "parallel.compile is blocks, but there is no C++ compiler for the CPU",
            hint="install g++ or set the environment variable CXX, or set parallel.compile to none",
        ) from error


def _brief(reason: str) -> str:
    """Return the first line of PyTorch's long explanation."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[0] if lines else "unknown"
