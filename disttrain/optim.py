"""Optimizers and learning-rate schedules from frozen configurations, in optimizer steps.

Weight decay is never applied to norms and biases (parameters of fewer than two dimensions) unless asked for;
``sgd`` and ``adam`` add it to the gradient (L2 regularization), ``adamw`` decays the weights directly
(Loshchilov & Hutter 2019, arXiv:1711.05101). Schedules are closed forms of the step, so that a resumed run
goes on with the same values. No cost beyond the optimizer's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from disttrain.errors import ConfigError

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "linear", "step"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, with which hyper-parameters.

    Attributes:
        name: ``sgd``, ``adam`` or ``adamw``.
        lr: peak learning rate.
        weight_decay: L2 coefficient for ``sgd`` and ``adam``, decoupled decay for ``adamw``.
        momentum: momentum of ``sgd``.
        nesterov: Nesterov's form of that momentum.
        betas: decay rates of the moments of ``adam`` and ``adamw``.
        eps: added to the denominator of ``adam`` and ``adamw``.
        decay_norm_and_bias: apply weight decay to parameters of fewer than two dimensions too.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_norm_and_bias: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam", "adamw"):
            raise ConfigError(f"optimizer.name is {self.name!r}", mend="use sgd, adam or adamw")
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr is {self.lr}", mend="use a positive learning rate")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}", mend="use 0 or more")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum is {self.momentum}", mend="use a value from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}", mend="use two values from 0 to below 1")
        if self.eps <= 0:
            raise ConfigError(f"optimizer.eps is {self.eps}", mend="use a small positive number, such as 1e-8")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov is set without momentum", mend="set optimizer.momentum, such as 0.9")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves, in optimizer steps.

    Attributes:
        name: ``constant``; ``cosine`` or ``linear`` decay to ``final_fraction``; ``step`` decay by ``gamma``
            every ``step_size`` steps.
        warmup_steps: steps of linear warm-up from 0.
        total_steps: steps until the end of a decay; 0 takes the run's limit (``max_steps`` or ``max_epochs``).
        final_fraction: what is left of the peak at the end of a decay.
        step_size: steps between two drops.
        gamma: factor of a drop.
    """

    name: ScheduleName = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    final_fraction: float = 0.0
    step_size: int = 1000
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("constant", "cosine", "linear", "step"):
            raise ConfigError(f"schedule.name is {self.name!r}", mend="use constant, cosine, linear or step")
        if self.warmup_steps < 0 or self.total_steps < 0 or self.step_size < 1:
            raise ConfigError(
                f"schedule has warmup_steps {self.warmup_steps}, total_steps {self.total_steps},"
                f" step_size {self.step_size}",
                mend="use 0 or more for the first two and at least 1 for step_size",
            )
        if not 0 <= self.final_fraction <= 1 or self.gamma <= 0:
            raise ConfigError(
                f"schedule has final_fraction {self.final_fraction} and gamma {self.gamma}",
                mend="use a final_fraction from 0 to 1 and a positive gamma",
            )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over a model's trainable parameters, in decay groups.

    Raises:
        ConfigError: the model has no trainable parameters.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameters", mend="set requires_grad on what should be trained")
    groups = decay_groups(named, config)
    fused = {"fused": True} if all(p.device.type == "cuda" for _, p in named) else {}
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, **fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, **fused)


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: weights that decay, and norms and biases that do not; empty groups are left out."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for _, parameter in named:
        (decayed if parameter.ndim >= 2 or config.decay_norm_and_bias else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, *, total_steps: int) -> LambdaLR:
    """The configured schedule; step it once an optimizer step.

    Args:
        optimizer: whose learning rates to move.
        config: which schedule.
        total_steps: the run's limit in steps, for ``total_steps: 0``; 0 where the run has none.

    Raises:
        ConfigError: a decay has no end.
    """
    total = config.total_steps or total_steps
    if config.name in ("cosine", "linear") and total <= config.warmup_steps:
        raise ConfigError(
            f"schedule.name is {config.name}, but it would end at step {total}, not after its"
            f" {config.warmup_steps} warm-up steps",
            mend="set schedule.total_steps, or limit the run with trainer.max_steps or trainer.max_epochs",
        )
    return LambdaLR(optimizer, lr_factor(config, total))


def lr_factor(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate as a function of the step, counted from 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.name == "constant":
            return 1.0
        if config.name == "step":
            return config.gamma ** ((step - config.warmup_steps) // config.step_size)
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        left = 0.5 * (1 + math.cos(math.pi * done)) if config.name == "cosine" else 1 - done
        return config.final_fraction + (1 - config.final_fraction) * left

    return factor
