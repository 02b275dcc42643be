"""Fused optimizers that leave a step out on the device: the same as those that the host keeps from it.

PyTorch's fused kernels for the CPU look at ``found_inf`` as those for CUDA do. Memory that nothing has written is NaN
here (``fill_uninitialized_memory``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import disttrain.trainer
from disttrain import OptimizerConfig, Trainer, UpdateGuard
from disttrain.optim import can_skip_on_device
from tests.support.sameness import MicroBatches, MLPTask
from tests.support.weights import distance

STEPS = 5
OPTIMIZERS: dict[str, Any] = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampening": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "plain": partial(torch.optim.SGD, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
}


@pytest.fixture(autouse=True)
def uninitialized_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class SickTask(MLPTask):
    """Losses that are not numbers, or infinite, in some steps; one bias is frozen until the fourth step."""

    bad: tuple[int, ...]
    make: Any

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        if not self.optimizers().param_groups[0].get("dampening"):  # PyTorch's own fused step fails on that
            self.model.head.bias.requires_grad_(self.trainer.global_step > 2)
        return super().losses(outputs, batch) * (math.inf if self.trainer.global_step in self.bad else 1.0)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def weights_after(folder: Path, optimizer: str, bad: tuple[int, ...], *, fused: bool, precision: Any) -> dict[str, Any]:
    """Train on this process; the weights."""
    task = SickTask(OptimizerConfig())
    task.bad, task.make = bad, partial(OPTIMIZERS[optimizer], fused=fused)
    guard = UpdateGuard()
    trainer = Trainer(
        run_dir=str(folder / f"{fused}"),
        max_steps=STEPS,
        precision=precision,
        gradient_clip_norm=0.5,
        progress_bar=False,
        callbacks=[guard],
    )
    trainer.fit(task, train_dataloaders=MicroBatches(0, 1, micro_batches=1, steps=STEPS))
    assert guard.skipped == (0 if precision == "16-mixed" else len(bad))
    return {name: value.detach().clone() for name, value in task.state_dict().items()}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_first_steps_and_a_later_one_are_left_out(
    optimizer: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disttrain.trainer, "check_precision", lambda precision, device: None)
    run = partial(weights_after, tmp_path, optimizer, (0, 1, 3), precision=precision)
    fused, whole = run(fused=True), run(fused=False)
    assert all(bool(value.isfinite().all()) for value in fused.values()), "memory that nothing has written was used"
    assert distance(whole, fused) <= 1e-5


def test_zero_momentum_before_the_first_step_changes_no_bit() -> None:
    weights = []
    for prepared in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 101))
        sgd = torch.optim.SGD([weight], lr=0.3, momentum=0.9, weight_decay=0.1, fused=True)
        for step in range(4):
            weight.grad = torch.sin(weight.detach() * (step + 3))
            assert not prepared or can_skip_on_device(sgd)
            sgd.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_an_optimizer_that_is_fused_in_name_alone_is_kept_from_the_step_by_the_host() -> None:
    class Own(torch.optim.SGD):
        pass

    optimizer = Own([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0]["fused"] = True
    assert not can_skip_on_device(optimizer)
