"""Optimizers and learning-rate schedules from frozen configurations, in optimizer steps.

Weight decay is not applied to norms and biases (parameters with fewer than two dimensions) by default. ``sgd`` and
``adam`` add it to the gradient (L2 regularization); ``adamw`` decays the weights directly (Loshchilov & Hutter 2019,
arXiv:1711.05101). Parameters can have their own settings, by patterns over their names. Strategies do not change the
names, so the groups are the same in all layouts. Schedules are closed forms of the step, so a resumed run continues
with the same values. No cost beyond the optimizer's own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from disttrain.errors import ConfigError

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "linear", "step"]
REST: Final = "rest"
"""The group of parameters that match no pattern."""


@dataclass(frozen=True)
class ParameterGroupConfig:
    """Settings for the parameters whose names match; unset ones come from the optimizer.

    Attributes:
        pattern: glob over the parameter's full name, such as ``model.head.*`` (``*`` matches dots too), or several.
        name: name of the group; by default its patterns.
        lr: peak learning rate.
        lr_scale: factor on the optimizer's peak learning rate, instead of ``lr``.
        weight_decay: overrides the optimizer's, for the group's parameters that decay.
        betas: overrides the optimizer's.
        decay_norm_and_bias: overrides the optimizer's.
    """

    pattern: str | tuple[str, ...]
    name: str = ""
    lr: float | None = None
    lr_scale: float = 1.0
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    decay_norm_and_bias: bool | None = None

    def __post_init__(self) -> None:
        if not self.patterns or not all(self.patterns):
            raise ConfigError(
                f"a pattern of optimizer.groups is {self.pattern!r}", hint="give a glob, such as model.head.*"
            )
        if self.lr is not None and self.lr_scale != 1:
            raise ConfigError(
                f"group {self.label!r} of optimizer.groups has lr {self.lr} and lr_scale {self.lr_scale}",
                hint="set one of them",
            )
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"lr of {self.label!r} in optimizer.groups is {self.lr}", hint="use a positive number")
        if not self.lr_scale > 0:
            raise ConfigError(
                f"lr_scale of {self.label!r} in optimizer.groups is {self.lr_scale}",
                hint="use a positive number; to freeze parameters, call requires_grad_(False) in the model",
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ConfigError(
                f"weight_decay of {self.label!r} in optimizer.groups is {self.weight_decay}", hint="use 0 or more"
            )
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas of {self.label!r} in optimizer.groups are {self.betas}", hint="use values from 0 to below 1"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, as a tuple."""
        return (self.pattern,) if isinstance(self.pattern, str) else tuple(self.pattern)

    @property
    def label(self) -> str:
        """The name of the group."""
        return self.name or ", ".join(self.patterns)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its hyper-parameters.

    Attributes:
        name: ``sgd``, ``adam`` or ``adamw``.
        lr: peak learning rate.
        weight_decay: L2 coefficient for ``sgd`` and ``adam``, decoupled decay for ``adamw``.
        momentum: momentum of ``sgd``.
        nesterov: use Nesterov momentum.
        betas: decay rates of the moments of ``adam`` and ``adamw``.
        eps: added to the denominator of ``adam`` and ``adamw``.
        decay_norm_and_bias: also apply weight decay to parameters with fewer than two dimensions.
        groups: parameters with their own settings, by name; the first match wins.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_norm_and_bias: bool = False
    groups: tuple[ParameterGroupConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam", "adamw"):
            raise ConfigError(f"optimizer.name is {self.name!r}", hint="use sgd, adam or adamw")
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr is {self.lr}", hint="use a positive learning rate")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}", hint="use 0 or more")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum is {self.momentum}", hint="use a value from 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}", hint="use two values from 0 to below 1")
        if self.eps <= 0:
            raise ConfigError(f"optimizer.eps is {self.eps}", hint="use a small positive number, such as 1e-8")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov is set without momentum", hint="set optimizer.momentum, such as 0.9")
        object.__setattr__(self, "groups", tuple(self.groups))
        labels = [group.label for group in self.groups]
        twice = sorted({label for label in labels if labels.count(label) > 1 or label == REST})
        if twice:
            raise ConfigError(
                f"the name {twice[0]!r} in optimizer.groups occurs twice or is reserved", hint="use unique names"
            )
        for group in self.groups:
            if self.name == "sgd" and group.betas is not None:
                raise ConfigError(f"group {group.label!r} of optimizer.groups sets betas for sgd", hint="remove them")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule, in optimizer steps.

    Attributes:
        name: ``constant``; ``cosine`` or ``linear`` decay to ``final_fraction``; ``step`` decay by ``gamma``
            every ``step_size`` steps.
        warmup_steps: steps of linear warm-up from 0. With a decay, a run no longer than this warms up for a tenth of
            its steps instead.
        total_steps: steps until the end of a decay; 0 takes the run's limit (``max_steps`` or ``max_epochs``).
        final_fraction: fraction of the peak that remains at the end of a decay.
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
            raise ConfigError(f"schedule.name is {self.name!r}", hint="use constant, cosine, linear or step")
        if self.warmup_steps < 0 or self.total_steps < 0 or self.step_size < 1:
            raise ConfigError(
                f"schedule has warmup_steps {self.warmup_steps}, total_steps {self.total_steps},"
                f" step_size {self.step_size}",
                hint="use 0 or more for the first two and at least 1 for step_size",
            )
        if not 0 <= self.final_fraction <= 1 or self.gamma <= 0:
            raise ConfigError(
                f"schedule has final_fraction {self.final_fraction} and gamma {self.gamma}",
                hint="use a final_fraction from 0 to 1 and a positive gamma",
            )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the configured optimizer over a model's trainable parameters, in groups.

    Raises:
        ConfigError: the model has no trainable parameters, or a group's pattern matches none.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameters", hint="set requires_grad on what should be trained")
    groups = parameter_groups(named, config)
    fused = {"fused": True} if all(p.device.type == "cuda" for _, p in named) else {}
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, **fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, **fused)


def can_skip_on_device(optimizer: Optimizer) -> bool:
    """Return whether the next step is a no-op if the optimizer's ``found_inf`` is 1, which its fused kernels check.

    Call this once the gradients exist. Fused SGD allocates momentum uninitialized, which stays so if the step is
    skipped, and it fails if only some parameters have momentum. So this fills in missing momentum with zeros: without
    dampening, the step then has the same result. With dampening the initial momentum cannot be emulated, so the step
    cannot be skipped on the device.
    """
    groups = optimizer.param_groups
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or not all(group.get("fused") for group in groups):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        return True  # PyTorch's other fused optimizers initialize their state
    for group in groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is None or optimizer.state[parameter].get("momentum_buffer") is not None:
                continue
            if group["dampening"]:
                return False
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
    return True


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return PyTorch's parameter groups: unmatched parameters, then each configured group, split by whether they decay.

    A group's ``name`` is its label, with ``, no decay`` for its norms and biases; empty groups are omitted.

    Raises:
        ConfigError: a pattern matches no parameter, or only ones of earlier groups, or a group's weight decay applies
            to none of its parameters.
    """
    named = list(named)
    _check_patterns([name for name, _ in named], config.groups)
    configured = [ParameterGroupConfig("*", name=REST), *config.groups]
    members: list[list[nn.Parameter]] = [[] for _ in configured]
    for name, parameter in named:
        matching = (place for place, group in enumerate(config.groups, 1) if _match(name, group.patterns))
        members[next(matching, 0)].append(parameter)
    found: list[dict[str, Any]] = []
    for group, own in zip(configured, members, strict=True):
        everything = config.decay_norm_and_bias if group.decay_norm_and_bias is None else group.decay_norm_and_bias
        decayed = [p for p in own if p.ndim >= 2 or everything]
        kept = [p for p in own if not (p.ndim >= 2 or everything)]
        if group.weight_decay and not decayed:
            raise ConfigError(
                f"group {group.label!r} of optimizer.groups has weight_decay {group.weight_decay}, but holds only"
                " norms and biases, which do not decay",
                hint="set decay_norm_and_bias in the group, or remove its weight_decay",
            )
        settings: dict[str, Any] = {}
        if group.lr is not None or group.lr_scale != 1:
            settings["lr"] = config.lr * group.lr_scale if group.lr is None else group.lr
        if group.betas is not None:
            settings["betas"] = group.betas
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        found.append({"params": decayed, "name": group.label, "weight_decay": decay, **settings})
        found.append({"params": kept, "name": f"{group.label}, no decay", "weight_decay": 0.0, **settings})
    return [group for group in found if group["params"]]


def _match(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(names: list[str], groups: tuple[ParameterGroupConfig, ...]) -> None:
    """Check that each pattern matches a parameter that no earlier group has."""
    left = names
    for group in groups:
        for pattern in group.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.0)
                raise ConfigError(
                    f"pattern {pattern!r} of optimizer.groups matches none of the {len(names)} trainable parameters",
                    hint=f"correct it; the nearest names are {', '.join(near)}",
                )
            if not any(fnmatchcase(name, pattern) for name in left):
                raise ConfigError(
                    f"pattern {pattern!r} of optimizer.groups matches only parameters of earlier groups",
                    hint="the first match wins: put the narrower pattern first",
                )
        left = [name for name in left if not _match(name, group.patterns)]


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, *, total_steps: int) -> LambdaLR:
    """Build the configured schedule; step it once per optimizer step.

    Args:
        optimizer: the optimizer whose learning rates it sets.
        config: which schedule.
        total_steps: the run's limit in steps, used for ``total_steps: 0``; 0 if the run has none.

    Raises:
        ConfigError: a decay has no end.
    """
    total = config.total_steps or total_steps
    if config.name in ("cosine", "linear") and total <= config.warmup_steps:
        raise ConfigError(
            f"schedule.name is {config.name}, but it would end at step {total}, not after its"
            f" {config.warmup_steps} warm-up steps",
            hint="use fewer schedule.warmup_steps or a later schedule.total_steps"
            if total
            else "set schedule.total_steps, or limit the run with trainer.max_steps or trainer.max_epochs",
        )
    return LambdaLR(optimizer, lr_factor(config, total))


def fit_warmup(config: ScheduleConfig, total_steps: int) -> ScheduleConfig:
    """Shorten a warm-up that would outlast the run, as in a short trial of a longer run's configuration.

    Args:
        config: which schedule; one that sets ``total_steps`` is returned unchanged.
        total_steps: the run's limit in steps, 0 if it has none.

    Returns:
        The same schedule, or one with a warm-up of a tenth of the run, rounded down.
    """
    decays = config.name in ("cosine", "linear") and not config.total_steps
    if decays and 0 < total_steps <= config.warmup_steps:
        return replace(config, warmup_steps=total_steps // 10)
    return config


def lr_factor(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the peak learning rate as a function of the step, counted from 0."""

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
