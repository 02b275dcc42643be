"""Activation checkpointing: blocks keep their inputs alone and run again in the backward pass.

The second run draws the same random numbers, so the weights of a run have the same bits with and without it. Blocks
are those that FSDP shards (:func:`disttrain.parallel.shard.shard_units`); classes and parameter names stay as they
are. Cost: one more forward pass of the blocks; it saves the memory of everything inside a block but one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from disttrain.errors import ConfigError
from disttrain.parallel.shard import shard_units


def checkpoint_blocks(module: nn.Module) -> None:
    """Let the blocks of a module run again in the backward pass; blocks that do so already are left as they are.

    Raises:
        ConfigError: the module has no blocks.
    """
    blocks = shard_units(module)
    if not blocks:
        raise ConfigError(
            f"parallel.activation_checkpointing is blocks, and {type(module).__name__} has none",
            mend="give the model a method shard_units() that returns its blocks, or set activation_checkpointing to"
            " none",
        )
    for block in blocks:
        if not isinstance(block.forward, _Recomputed):
            block.forward = _Recomputed(block)


class _Recomputed:
    """A block's forward pass that keeps its inputs alone while gradients are wanted."""

    def __init__(self, block: nn.Module) -> None:
        self._forward = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
