"""Optimizers against torch's own, schedules against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    decay_groups,
    lr_factor,
)

quick = settings(derandomize=True, deadline=None, max_examples=100)


def model_of(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4), nn.LayerNorm(4))


def train(
    model: nn.Module, optimizer: Optimizer, *, first: int = 0, steps: int = 4, after: Callable[[], None] = lambda: None
) -> None:
    """A few steps on fixed random data."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(5, 2, 4, generator=generator) for _ in range(first + steps)]
    for batch in data[first:]:
        optimizer.zero_grad()
        (model(batch) - batch[:, 0]).square().mean().backward()
        optimizer.step()
        after()


DECAY = ("1.weight", "3.weight")


def by_hand(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Torch's parameter groups with decay on the weights alone."""
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in DECAY], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name not in DECAY], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (OptimizerConfig("sgd", lr=0.1), lambda g: torch.optim.SGD(g, lr=0.1)),
        (
            OptimizerConfig("sgd", lr=0.1, momentum=0.9, weight_decay=0.2),
            lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        ),
        (
            OptimizerConfig("sgd", lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
            lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.8, nesterov=True),
        ),
        (OptimizerConfig("adam", lr=0.02, weight_decay=0.3), lambda g: torch.optim.Adam(g, lr=0.02)),
        (
            OptimizerConfig("adamw", lr=0.02, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-4),
            lambda g: torch.optim.AdamW(g, lr=0.02, betas=(0.8, 0.95), eps=1e-4),
        ),
    ],
)
def test_each_optimizer_is_torchs_own(config: OptimizerConfig, theirs: Callable[[Any], Optimizer]) -> None:
    ours, reference = model_of(), model_of()
    train(ours, build_optimizer(ours, config))
    train(reference, theirs(by_hand(reference, config.weight_decay)))
    start = dict(model_of().named_parameters())
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q), f"{config}: {name} differs from torch's by {(p - q).abs().max()}"
        assert not torch.equal(p, start[name]), f"{name} did not move: the test shows nothing"


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    model = model_of()
    names = {id(p): name for name, p in model.named_parameters()}
    config = OptimizerConfig(weight_decay=0.3)
    groups = [
        ([names[id(p)] for p in group["params"]], group["weight_decay"])
        for group in decay_groups(model.named_parameters(), config)
    ]
    assert groups == [
        (list(DECAY), 0.3),
        (["0.weight", "0.bias", "1.bias", "3.bias", "4.weight", "4.bias"], 0.0),
    ]


def test_empty_groups_are_left_out() -> None:
    everything = OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=True)
    (group,) = decay_groups(model_of().named_parameters(), everything)
    assert (len(group["params"]), group["weight_decay"]) == (8, 0.3)
    (group,) = decay_groups(nn.LayerNorm(3).named_parameters(), OptimizerConfig(weight_decay=0.3))
    assert group["weight_decay"] == 0


def test_decay_is_decoupled_in_adamw_alone() -> None:
    """Without a gradient, ``adamw`` shrinks a weight by lr x decay; in the others the decay is a gradient."""
    moved = {}
    for name in ("sgd", "adam", "adamw"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        optimizer = build_optimizer(model, OptimizerConfig(name, lr=0.1, weight_decay=0.5))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        moved[name] = model.weight.item()
    assert moved["sgd"] == pytest.approx(2 - 0.1 * 0.5 * 2)
    assert moved["adam"] == pytest.approx(2 - 0.1, rel=1e-6)  # Adam's first step is lr, whatever the gradient
    assert moved["adamw"] == pytest.approx(2 * (1 - 0.1 * 0.5))


def test_frozen_parameters_are_left_out() -> None:
    model = model_of()
    model[1].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        build_optimizer(model, OptimizerConfig())


@pytest.mark.parametrize(
    ("config", "total", "expected"),
    [
        (ScheduleConfig(), 0, {0: 1, 1: 1, 10**9: 1}),
        (ScheduleConfig(warmup_steps=4), 0, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        (ScheduleConfig("linear"), 10, {0: 1, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0, 11: 0}),
        (
            ScheduleConfig("linear", warmup_steps=2, final_fraction=0.2),
            12,
            {0: 0.5, 1: 1, 2: 1, 7: 0.6, 12: 0.2, 99: 0.2},
        ),
        (ScheduleConfig("linear", total_steps=4), 100, {0: 1, 1: 0.75, 4: 0, 100: 0}),
        (ScheduleConfig("cosine"), 8, {0: 1, 2: 0.5 + math.sqrt(0.125), 4: 0.5, 6: 0.5 - math.sqrt(0.125), 8: 0, 9: 0}),
        (ScheduleConfig("cosine", warmup_steps=1, final_fraction=0.1), 5, {0: 1, 1: 1, 3: 0.55, 5: 0.1, 50: 0.1}),
        (ScheduleConfig("step", step_size=3, gamma=0.5), 0, {0: 1, 2: 1, 3: 0.5, 5: 0.5, 6: 0.25, 30: 2**-10}),
        (ScheduleConfig("step", warmup_steps=2, step_size=3, gamma=0.1), 0, {0: 0.5, 1: 1, 4: 1, 5: 0.1, 8: 0.01}),
    ],
)
def test_schedules_at_chosen_steps(config: ScheduleConfig, total: int, expected: dict[int, float]) -> None:
    factor = lr_factor(config, config.total_steps or total)
    found = {step: factor(step) for step in expected}
    assert found == pytest.approx(expected), f"{config} of {total} steps"
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(model, OptimizerConfig("sgd", lr=0.3))
    schedule = build_schedule(optimizer, config, total_steps=total)
    for step in range(13):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * factor(step)), f"learning rate of step {step}"
        optimizer.step()
        schedule.step()


schedules = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["constant", "cosine", "linear", "step"]),
    warmup_steps=st.integers(0, 20),
    final_fraction=st.floats(0, 1),
    step_size=st.integers(1, 30),
    gamma=st.floats(0.01, 1),
)


@quick
@given(schedules, st.integers(21, 60))
def test_schedules_rise_to_the_peak_and_never_rise_again(config: ScheduleConfig, total: int) -> None:
    factor = lr_factor(config, total)
    values = [factor(step) for step in range(total + 5)]
    warm, rest = values[: config.warmup_steps], values[config.warmup_steps :]
    assert all(0 < a < b for a, b in pairwise(warm)), f"the warm-up does not rise: {warm}"
    assert rest[0] == pytest.approx(1), f"the peak is {rest[0]}"
    assert all(a >= b >= 0 for a, b in pairwise(rest)), f"rises after the warm-up: {rest}"
    if config.name in ("cosine", "linear"):
        assert values[total:] == pytest.approx([config.final_fraction] * 5), "the end is not the final fraction"


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_resumed_schedule_goes_on_with_the_same_values(name: Any, at: int) -> None:
    config = ScheduleConfig(name, warmup_steps=3, step_size=2, gamma=0.7, final_fraction=0.05)
    optimizer_config = OptimizerConfig("adamw", lr=0.1, weight_decay=0.1)

    def begin() -> tuple[nn.Module, Optimizer, Any, list[float]]:
        model = model_of()
        optimizer = build_optimizer(model, optimizer_config)
        return model, optimizer, build_schedule(optimizer, config, total_steps=12), []

    model, optimizer, schedule, whole = begin()
    train(model, optimizer, steps=12, after=lambda: (schedule.step(), whole.append(schedule.get_last_lr()[0])))  # type: ignore[func-returns-value]

    first, first_optimizer, first_schedule, _ = begin()
    train(first, first_optimizer, steps=at, after=first_schedule.step)
    second, second_optimizer, second_schedule, tail = begin()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_schedule.load_state_dict(first_schedule.state_dict())
    train(
        second,
        second_optimizer,
        first=at,
        steps=12 - at,
        after=lambda: (second_schedule.step(), tail.append(second_schedule.get_last_lr()[0])),  # type: ignore[func-returns-value]
    )
    assert tail == whole[at:], f"learning rates after step {at}"
    for (key, p), q in zip(second.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), f"{key} differs from the uninterrupted run's"


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (10, 10), (10, 3)])
def test_a_decay_without_an_end_is_refused(name: Any, warmup: int, total: int) -> None:
    optimizer = build_optimizer(nn.Linear(1, 1), OptimizerConfig())
    with pytest.raises(ConfigError) as caught:
        build_schedule(optimizer, ScheduleConfig(name, warmup_steps=warmup), total_steps=total)
    for word in (f"schedule.name is {name}", f"end at step {total}", f"{warmup} warm-up steps", "trainer.max_steps"):
        assert word in str(caught.value), f"the message does not say {word!r}"
    build_schedule(optimizer, ScheduleConfig(name, warmup_steps=warmup, total_steps=11), total_steps=total)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (OptimizerConfig, {"name": "adamax"}, "optimizer.name is 'adamax'"),
        (OptimizerConfig, {"lr": 0.0}, "optimizer.lr is 0.0"),
        (OptimizerConfig, {"lr": math.nan}, "optimizer.lr is nan"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
        (OptimizerConfig, {"momentum": 1.0}, "optimizer.momentum is 1.0"),
        (OptimizerConfig, {"name": "sgd", "nesterov": True}, "optimizer.nesterov is set without momentum"),
        (ScheduleConfig, {"name": "cosin"}, "schedule.name is 'cosin'"),
        (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps -1"),
        (ScheduleConfig, {"total_steps": -1}, "total_steps -1"),
        (ScheduleConfig, {"step_size": 0}, "step_size 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: type, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        kind(**arguments)
    assert caught.value.mend
