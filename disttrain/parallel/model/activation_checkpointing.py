"""Activation checkpointing: blocks keep few activations and run again in the backward pass.

``blocks`` keeps only a block's inputs. ``selective`` also keeps the results of matrix products, convolutions and
attention, and recomputes only the rest. The recomputation draws the same random numbers, so training is bit-identical
with and without it. Blocks are the units that FSDP shards (:func:`disttrain.parallel.model.fsdp.shard_units`); classes
and parameter names are unchanged. Cost: ``blocks`` adds one forward pass of the blocks, and frees the activations of
all blocks except one; ``selective`` adds a few percent of time, and frees the activations of norms, activation
functions and dropout.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from disttrain.parallel.model.fsdp import no_blocks, shard_units

_KEPT: Final = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_KNOWS_HOOKS: Final = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
_KEPT_OPS: Final = frozenset(getattr(torch.ops.aten, name).default for name in _KEPT if hasattr(torch.ops.aten, name))


def checkpoint_blocks(module: nn.Module, kind: Literal["blocks", "selective"] = "blocks") -> None:
    """Make a module's blocks recompute in the backward pass; skip blocks that already do.

    Args:
        module: the module.
        kind: keep only the blocks' inputs, or also the results of expensive operations.

    Raises:
        ConfigError: the module has no blocks.
    """
    blocks = shard_units(module)
    if not blocks:
        raise no_blocks(f"parallel.activation_checkpointing is {kind}", module, "activation_checkpointing")
    for block in blocks:
        if not isinstance(block.forward, BlockForward):
            block.forward = _Recomputed(block, selective=kind == "selective")


class BlockForward:
    """Base class of replacement forward passes; marks a block as already changed."""


class _Recomputed(BlockForward):
    """A block's forward pass that keeps few activations while gradients are enabled."""

    def __init__(self, block: nn.Module, *, selective: bool) -> None:
        self._forward = block.forward
        self._more: dict[str, Any] = {}
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if selective or norms:
            self._more["context_fn"] = partial(_contexts, selective, norms)
        if selective and _KNOWS_HOOKS:
            # The default of all earlier versions; without it, PyTorch 2.14 warns inside hooks such as save_on_cpu.
            self._more["respect_saved_tensors_hooks"] = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **self._more, **kwargs)


def _contexts(selective: bool, norms: list[_BatchNorm]) -> tuple[Any, Any]:
    """Return contexts for a block's first run and its recomputation."""
    first: Any = nullcontext()
    second: Any = nullcontext()
    if selective:
        first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, _counted_once(norms, second) if norms else second


@contextmanager
def _counted_once(norms: list[_BatchNorm], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Restore running statistics after the recomputation, so that each batch counts once."""
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        with inner:
            yield
    finally:
        with torch.no_grad():
            for norm, values in zip(norms, before, strict=True):
                torch._foreach_copy_(list(norm.buffers()), values)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide what to keep: everything expensive, unless it draws random numbers.

    If the recomputation skipped an attention with dropout, it would also skip its random numbers, and later operations
    would draw different ones than in the first run.
    """
    if operation not in _KEPT_OPS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    names = [argument.name for argument in operation._schema.arguments]
    dropout = kwargs.get("dropout_p", 0.0)
    if "dropout_p" in names and len(args) > names.index("dropout_p"):
        dropout = args[names.index("dropout_p")]
    return CheckpointPolicy.PREFER_RECOMPUTE if dropout else CheckpointPolicy.MUST_SAVE
