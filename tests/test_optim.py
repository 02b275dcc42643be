"""Optimizers against torch's own, schedules against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim import Optimizer

from disttrain.checkpoint.format.optimizer_state import agreed_groups
from disttrain.errors import CheckpointError, ConfigError
from disttrain.optim import (
    OptimizerConfig,
    ParameterGroupConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    fit_warmup,
    lr_factor,
    parameter_groups,
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
        for group in parameter_groups(model.named_parameters(), config)
    ]
    assert groups == [
        (list(DECAY), 0.3),
        (["0.weight", "0.bias", "1.bias", "3.bias", "4.weight", "4.bias"], 0.0),
    ]


def test_empty_groups_are_left_out() -> None:
    everything = OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=True)
    (group,) = parameter_groups(model_of().named_parameters(), everything)
    assert (len(group["params"]), group["weight_decay"]) == (8, 0.3)
    (group,) = parameter_groups(nn.LayerNorm(3).named_parameters(), OptimizerConfig(weight_decay=0.3))
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
    way_out = "fewer schedule.warmup_steps" if total else "trainer.max_steps"
    for word in (f"schedule.name is {name}", f"end at step {total}", f"{warmup} warm-up steps", way_out):
        assert word in str(caught.value), f"the message does not say {word!r}"
    build_schedule(optimizer, ScheduleConfig(name, warmup_steps=warmup, total_steps=11), total_steps=total)


@pytest.mark.parametrize(
    ("warmup", "total", "fitted"), [(20, 19, 1), (20, 20, 2), (20, 1, 0), (20, 21, 20), (20, 0, 20)]
)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_warmup_of_a_short_run_is_a_tenth_of_it(name: Any, warmup: int, total: int, fitted: int) -> None:
    config = ScheduleConfig(name, warmup_steps=warmup)
    assert fit_warmup(config, total).warmup_steps == fitted
    if total:
        factors = [lr_factor(fit_warmup(config, total), total)(step) for step in range(total + 1)]
        assert max(factors) == 1, "it reaches its peak"
        assert factors[total] == (0 if total > fitted else 1)
    for other in (ScheduleConfig(name, warmup_steps=warmup, total_steps=9), ScheduleConfig("constant", warmup)):
        assert fit_warmup(other, total) is other, "nobody asked for another one"


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
    assert caught.value.hint


class Net(nn.Module):
    """Names of several levels, a norm, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)


Group = ParameterGroupConfig


def described(config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """The groups of an optimizer by name, with names for members."""
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    optimizer = build_optimizer(net, config)
    keys = ("lr", "weight_decay", "betas")
    return {
        group["name"]: {
            "params": [names[id(p)] for p in group["params"]],
            **{key: group[key] for key in keys if key in group},
        }
        for group in optimizer.param_groups
    }


def test_patterns_give_parameters_settings_of_their_own() -> None:
    groups = (
        Group("*.bias", name="biases", lr_scale=2.0, weight_decay=0.01, decay_norm_and_bias=True),
        Group(("blocks.0.*", "embedding.*"), weight_decay=0.0),
        Group("blocks.*", lr=0.5, betas=(0.8, 0.9)),
    )
    found = described(OptimizerConfig(lr=0.1, weight_decay=0.3, groups=groups))
    betas = (0.9, 0.999)
    assert found == {
        "rest": {"params": ["head.weight"], "lr": 0.1, "weight_decay": 0.3, "betas": betas},
        "rest, no decay": {"params": ["norm.weight"], "lr": 0.1, "weight_decay": 0.0, "betas": betas},
        "biases": {
            "params": ["blocks.0.bias", "blocks.1.bias", "norm.bias", "head.bias"],
            "lr": 0.2,
            "weight_decay": 0.01,
            "betas": betas,
        },
        "blocks.0.*, embedding.*": {
            "params": ["embedding.weight", "blocks.0.weight"],
            "lr": 0.1,
            "weight_decay": 0.0,
            "betas": betas,
        },
        "blocks.*": {"params": ["blocks.1.weight"], "lr": 0.5, "weight_decay": 0.3, "betas": (0.8, 0.9)},
    }


def test_a_schedule_scales_each_groups_own_learning_rate() -> None:
    config = OptimizerConfig("sgd", lr=0.1, groups=(Group("head.*", lr=0.5), Group("blocks.*", lr_scale=0.1)))
    optimizer = build_optimizer(Net(), config)
    schedule = build_schedule(optimizer, ScheduleConfig("linear"), total_steps=4)
    peaks = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert peaks["head.*"] == 0.5
    assert peaks["blocks.*, no decay"] == pytest.approx(0.01)
    for step in range(4):
        now = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert now == pytest.approx({name: peak * (1 - step / 4) for name, peak in peaks.items()})
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ((Group("haed.*"),), r"'haed.\*' of optimizer.groups matches none of the 9 .*\n.* head.weight"),
        ((Group("frozen.*"),), "'frozen.*' of optimizer.groups matches none"),
        ((Group(("head.*", "heads.*")),), "'heads.*' of optimizer.groups matches none"),
        ((Group("*.weight"), Group("head.weight")), "'head.weight' .* only parameters of earlier groups"),
        ((Group("norm.*", weight_decay=0.1),), "'norm.*' .* has weight_decay 0.1, but holds only norms and biases"),
    ],
)
def test_patterns_without_effect_are_refused(groups: tuple[ParameterGroupConfig, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_optimizer(Net(), OptimizerConfig(groups=groups))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Group(""), "a pattern of optimizer.groups is ''"),
        (lambda: Group(()), "a pattern of optimizer.groups is"),
        (lambda: Group("a", lr=0.1, lr_scale=2), "'a' of optimizer.groups has lr 0.1 and lr_scale 2"),
        (lambda: Group("a", lr=0), "lr of 'a' in optimizer.groups is 0"),
        (lambda: Group("a", lr_scale=0), "lr_scale of 'a' in optimizer.groups is 0"),
        (lambda: Group("a", weight_decay=-1), "weight_decay of 'a' in optimizer.groups is -1"),
        (lambda: Group("a", betas=(0.9, 1.0)), "betas of 'a'"),
        (
            lambda: OptimizerConfig(groups=(Group("a"), Group("b", name="a"))),
            "the name 'a' in optimizer.groups occurs twice",
        ),
        (lambda: OptimizerConfig(groups=(Group("a", name="rest"),)), "the name 'rest' .* occurs twice or is reserved"),
        (lambda: OptimizerConfig("sgd", groups=(Group("a", betas=(0.9, 0.9)),)), "'a' .* sets betas for sgd"),
    ],
)
def test_groups_that_cannot_work_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert caught.value.hint


def test_checkpoints_from_before_groups_had_names_are_accepted() -> None:
    now = [{"params": ["a", "b"], "lr": 0.1, "initial_lr": 0.1, "name": "rest"}]
    old = [{"params": ["b", "a"], "lr": 0.05, "initial_lr": 0.1}]
    agreed_groups(Path("c"), "AdamW", old, now)
    for wrong, words in (
        ([*old, *old], "settings or parameter groups that differ from this run's AdamW"),
        ([{**old[0], "momentum": 0.9}], "settings or parameter groups that differ"),
        (
            [{**old[0], "params": ["a", "c"]}],
            "different parameters in the optimizer's parameter group 'rest': b and 1 more",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            agreed_groups(Path("c"), "AdamW", wrong, now)
    assert agreed_groups(Path("c"), "AdamW", [{**old[0], "initial_lr": 0.2}], now)[0]["initial_lr"] == 0.2
