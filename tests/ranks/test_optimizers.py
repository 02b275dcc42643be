"""Resumed in the middle of an epoch, every optimizer and schedule of PyTorch goes on to the same bits.

The module has parameters that are trained, shared, unused, frozen, thawed and frozen again on the way
(:class:`tests.support.optimizers.Fates`); a checkpoint from after the thawing is loaded into a fresh module, which has
not thawed. A new class of PyTorch fails here until it was decided upon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from disttrain import ParallelConfig
from disttrain.errors import CheckpointError, ConfigError
from disttrain.parallel.gradients import clip_gradient_norm, clip_gradient_value, scale_gradients
from disttrain.parallel.optimizers import check_optimizers
from tests.support.optimizers import Fates, Odd, checkpoint, classes, data, fit
from tests.support.ranks import run_ranks
from tests.support.weights import differing, distance, final_weights

partial = functools.partial
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name: partial(getattr(torch.optim, name), lr=0.05)
    for name in (
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "ASGD",
        "Muon",
        "NAdam",
        "RAdam",
        "Rprop",
    )
}
OPTIMIZERS |= {
    "LBFGS": partial(torch.optim.LBFGS, lr=0.05, max_iter=2, history_size=3),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "SparseAdam": partial(torch.optim.SparseAdam, lr=0.05),
    "Odd": Odd,
}
"""How each is built."""
MODULES: dict[str, dict[str, Any]] = {"Muon": {"matrices": True}, "SparseAdam": {"sparse": True, "fates": False}}
WHOLE = {"Adafactor", "LBFGS", "Muon", "Rprop", "SparseAdam"}
"""Those that FSDP does not divide."""


def chained(optimizer: Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(optimizer, 3), lr_scheduler.LinearLR(optimizer)])


def sequential(optimizer: Optimizer) -> Any:
    parts: list[Any] = [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[6])


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": chained,
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=10),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=20),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=7),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=4),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=10),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[3, 10]),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=15),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.5),
    "SequentialLR": sequential,
    "StepLR": partial(lr_scheduler.StepLR, step_size=4),
}


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Two states are equal to the bit and in their types."""
    assert type(one) is type(other), f"{place}: {one!r} and {other!r}"
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{place}: {one.keys()} and {other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, both in enumerate(zip(one, other, strict=True)):
            assert_same(*both, f"{place}.{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), f"{place}: {one} and {other}"
    else:
        assert one == other, f"{place}: {one!r} and {other!r}"


def state_of(trainer: Any) -> list[Any]:
    """All that optimizers and schedules hold."""
    found = [optimizer.state_dict() for optimizer in trainer.optimizers]
    plain = ("_get_lr_called_within_step", "_last_lr", "last_epoch", "best", "num_bad_epochs", "cooldown_counter")
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return [found, [{key: state[key] for key in plain if key in state} for state in schedules]]


def resume_each(folder: Path, cases: dict[str, tuple[dict[str, Any], dict[str, Any]]], saved: tuple[int, ...]) -> None:
    """Train whole, then from each checkpoint again, into the same bits."""
    for name, (module, settings) in cases.items():
        every = 1 if "ReduceLROnPlateau" in name else saved[0]
        whole = fit(Fates(**module), folder / name, data(folder / "data"), every=every, **settings)
        want, state = final_weights(folder / name), state_of(whole)
        for step in saved:
            place = folder / f"{name}-{step}"
            path = checkpoint(folder / name, step)
            resumed = fit(Fates(**module), place, data(folder / "data"), resume=path, every=100, **settings)
            assert not differing(want, final_weights(place)), f"{name} resumed at step {step}"
            assert_same(state_of(resumed), state, f"{name} resumed at step {step}")


def optimizer_cases(names: list[str]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {name: ({"optimizer": OPTIMIZERS[name], **MODULES.get(name, {})}, {}) for name in names}


def resume_optimizers(folder: Path, names: list[str]) -> None:
    """With the checkpoint from before and after parameters were thawed."""
    resume_each(folder, optimizer_cases(names), (4, 12))


def resume_schedules(folder: Path, names: list[str]) -> None:
    """Stepped at each step, and at each epoch."""
    sgd = OPTIMIZERS["SGD"]
    cases = {
        f"{name}-{interval}": (
            {"optimizer": sgd, "schedule": SCHEDULES[name], "interval": interval},
            {"steps": 18, "validate": 3},
        )
        for name in names
        for interval in ("step", "epoch")
    }
    resume_each(folder, cases, (6, 8, 11) if names == ["ReduceLROnPlateau"] else (10,))


def test_every_class_of_pytorch_is_decided_upon() -> None:
    assert classes(torch.optim, Optimizer).keys() == OPTIMIZERS.keys() - {"Odd"}
    assert classes(lr_scheduler, lr_scheduler.LRScheduler).keys() == SCHEDULES.keys()


def test_odd_state_and_sparse_gradients_are_resumed(tmp_path: Path) -> None:
    run_ranks(
        1, resume_optimizers, tmp_path, ["Odd", "SparseAdam", "LBFGS"], folder=tmp_path / "logs", timeout=300
    ).ok()


def test_a_schedule_that_waits_for_a_metric_is_resumed(tmp_path: Path) -> None:
    run_ranks(1, resume_schedules, tmp_path, ["ReduceLROnPlateau"], folder=tmp_path / "logs", timeout=300).ok()


@pytest.mark.slow
def test_every_optimizer_is_resumed(tmp_path: Path) -> None:
    names = sorted(OPTIMIZERS.keys() - {"Odd", "SparseAdam", "LBFGS"})
    run_ranks(1, resume_optimizers, tmp_path, names, folder=tmp_path / "logs", timeout=300).ok()


@pytest.mark.slow
def test_every_schedule_is_resumed(tmp_path: Path) -> None:
    names = sorted(SCHEDULES.keys() - {"ReduceLROnPlateau"})
    run_ranks(1, resume_schedules, tmp_path, names, folder=tmp_path / "logs", timeout=300).ok()


def resume_by_hand(folder: Path) -> None:
    """Manual optimization, one and two optimizers."""
    schedule = partial(lr_scheduler.StepLR, step_size=4)
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        f"by-hand-{two}": ({"optimizer": OPTIMIZERS["AdamW"], "schedule": schedule, "manual": True, "two": two}, {})
        for two in (False, True)
    }
    resume_each(folder, cases, (9,))


def resume_in_layout(folder: Path, name: str, strategy: Any, fates: bool) -> None:
    """In a layout of several ranks, and from the checkpoint of one rank."""
    parallel = ParallelConfig(strategy=strategy, find_unused_parameters=strategy == "ddp")
    settings: dict[str, Any] = {"parallel": parallel, "every": 9 if fates else 5}
    make = partial(Fates, OPTIMIZERS[name], fates=fates)
    loaded = partial(data, folder / "data", micro=2)
    step = 9 if fates else 5
    fit(make(), folder / "whole", loaded(), **settings)
    fit(make(), folder / "same", loaded(), resume=checkpoint(folder / "whole", step), **settings)
    fit(make(), folder / "moved", loaded(), resume=checkpoint(folder / "alone", step), **settings)


def train_alone(folder: Path, name: str, fates: bool) -> None:
    """On one rank."""
    fit(Fates(OPTIMIZERS[name], fates=fates), folder / "alone", data(folder / "data"), every=9 if fates else 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "fates"), [("Odd", "ddp", False), ("AdamW", "fsdp", True), ("ASGD", "fsdp", False)]
)
def test_two_ranks_are_resumed(tmp_path: Path, name: str, strategy: str, fates: bool) -> None:
    run_ranks(1, train_alone, tmp_path, name, fates, folder=tmp_path / "alone-logs").ok()
    run_ranks(2, resume_in_layout, tmp_path, name, strategy, fates, folder=tmp_path / "logs", timeout=300).ok()
    whole, same, moved, alone = (final_weights(tmp_path / run) for run in ("whole", "same", "moved", "alone"))
    assert not differing(whole, same)
    assert distance(alone, whole) < 1e-5
    assert distance(alone, moved) < 1e-5


def refuse_parts(folder: Path) -> None:
    """A sum over a divided gradient is no state that could be saved; told after the first step."""
    parallel = ParallelConfig(strategy="fsdp")
    with pytest.raises(CheckpointError, match=r"state 'seen' of .* is of type DTensor with pending partial sums"):
        fit(Fates(Odd, fates=False), folder / "odd", data(folder / "data", micro=2), parallel=parallel)


def test_state_of_parts_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_parts, tmp_path, folder=tmp_path / "logs", timeout=300).ok()


def test_what_a_layout_cannot_train_is_refused() -> None:
    module = nn.Linear(3, 3)
    sparse = nn.Sequential(nn.Embedding(3, 3, sparse=True))
    fsdp, ddp = ParallelConfig(strategy="fsdp"), ParallelConfig(strategy="ddp")
    alone, many = {"ranks": 1, "accumulation": 1}, {"ranks": 2, "accumulation": 1}
    for name in OPTIMIZERS.keys() - {"Odd"}:
        optimizer = OPTIMIZERS[name]([module.weight])
        check_optimizers([optimizer], module, ddp, **alone)
        if name in WHOLE:
            with pytest.raises(ConfigError, match=f"{name} needs whole parameters"):
                check_optimizers([optimizer], module, fsdp, **many)
        else:
            check_optimizers([optimizer], module, fsdp, **many)
    lbfgs = OPTIMIZERS["LBFGS"](module.parameters())
    for layout in (many, {"ranks": 1, "accumulation": 2}):
        with pytest.raises(ConfigError, match="LBFGS evaluates the batch of a step several times"):
            check_optimizers([lbfgs], module, ddp, **layout)
    check_optimizers([], sparse, ddp, **many)
    gate = nn.Linear(3, 3)
    gate.sparse = True  # type: ignore[assignment]  # a word of its author's
    check_optimizers([], gate, fsdp, **many)
    tree = ParallelConfig(strategy="ddp", reduction="tree")
    narrow = ParallelConfig(strategy="ddp", reduce_dtype="bf16")
    for config, words in ((fsdp, "strategy fsdp"), (tree, "reduction tree"), (narrow, "reduce_dtype bf16")):
        with pytest.raises(ConfigError, match=f"0 has sparse gradients .* with parallel.{words}"):
            check_optimizers([], sparse, config, **many)


def test_sparse_gradients_are_scaled_and_clipped_as_dense_ones() -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=sparse)
        (table(torch.tensor([1, 1, 5, 7])).square().sum() * 3).backward()
        scale_gradients([table.weight], torch.tensor(0.5))
        norms = [clip_gradient_norm([table.weight], 2.0), clip_gradient_value([table.weight], 0.3)]
        grad = table.weight.grad
        assert grad is not None
        results.append((torch.stack(norms), grad.to_dense() if sparse else grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


@pytest.mark.slow
def test_manual_optimization_is_resumed(tmp_path: Path) -> None:
    run_ranks(1, resume_by_hand, tmp_path, folder=tmp_path / "logs", timeout=300).ok()
