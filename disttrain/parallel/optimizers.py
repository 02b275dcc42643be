"""Reject, at setup, optimizers and gradients that would not train the same way in this layout as on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.config import ParallelConfig

_WHOLE: Final = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon, torch.optim.Rprop, torch.optim.SparseAdam)
"""Optimizers that are not element-wise, or that PyTorch cannot run on a shard."""

_EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)


def check_optimizers(
    optimizers: Sequence[Optimizer], module: nn.Module, config: ParallelConfig, *, ranks: int, accumulation: int
) -> None:
    """Reject what would fail or give wrong results in this layout.

    Raises:
        ConfigError: an optimizer needs whole parameters, but FSDP shards them; LBFGS, which evaluates a step's batch
            repeatedly and uses its loss, runs with several ranks or micro batches; or sparse gradients cannot be
            summed.
    """
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if config.strategy == "fsdp" and isinstance(optimizer, _WHOLE):
            raise ConfigError(
                f"{kind} needs whole parameters and gradients, but parallel.strategy fsdp shards them",
                hint="set parallel.strategy to ddp, or use an element-wise optimizer, such as AdamW",
            )
        if isinstance(optimizer, torch.optim.LBFGS) and (ranks > 1 or accumulation > 1):
            raise ConfigError(
                f"{kind} evaluates the batch of a step several times and uses its loss, but no rank or micro batch has"
                f" the loss of the global batch: there are {ranks} ranks with {accumulation} micro batches per step",
                hint="train on one rank with micro_batch_size equal to global_batch_size, or use another optimizer",
            )
    layers = [(name, inner) for name, inner in module.named_modules() if isinstance(inner, _EMBEDDINGS)]
    sparse = [name for name, inner in layers if inner.sparse]
    wrong = _no_sparse(config, module)
    if sparse and wrong:
        raise ConfigError(
            f"{sparse[0]} has sparse gradients (sparse=True), which cannot be added with {wrong}",
            hint="use sparse=False, or strategy ddp with reduction fast in 32-true",
        )


def _no_sparse(config: ParallelConfig, module: nn.Module) -> str:
    """Return the setting with which sparse gradients cannot be summed, or an empty string."""
    if config.strategy == "fsdp":
        return "parallel.strategy fsdp"
    if config.reduction == "tree":
        return "parallel.reduction tree"
    if config.reduce_dtype == "bf16":
        return "parallel.reduce_dtype bf16"
    if any(parameter.dtype == torch.bfloat16 for parameter in module.parameters()):
        return "trainer.precision bf16-true"
    return ""
