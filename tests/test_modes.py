"""Settings of the Trainer that say how the process computes: no CUDA beside a CPU training, gradients in a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain import ClassificationTask, OptimizerConfig, ParallelConfig, ShardedDataModule, Task, Trainer
from tests.support.features import write_features
from tests.support.ranks import run_ranks


def data_in(folder: Path, **options: Any) -> ShardedDataModule:
    shards = {name: write_features(folder, name, 32) for name in ("train", "val", "test")}
    fields = {"features": "features.npy", "label": "cls"}
    return ShardedDataModule(**shards, fields=fields, global_batch_size=8, micro_batch_size=4, **options)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 3))


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_training_on_the_cpu_does_not_start_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node that has it: each rank would take memory of device 0, and seconds."""
    started: list[str] = []

    def start() -> None:
        started.append(threading.current_thread().name)
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    monkeypatch.setattr(torch._C, "_cuda_init", start, raising=False)
    data = data_in(tmp_path)
    task = ClassificationTask(small(), num_classes=3, input="features", optimizer=OptimizerConfig(name="adamw"))
    trainer = Trainer(run_dir=str(tmp_path / "run"), max_steps=6, accelerator="cpu", progress_bar=False)
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    assert trainer.global_step == 6
    assert not started
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


class Forces(Task):
    """An energy, and its gradient by the positions, in every split."""

    def __init__(self) -> None:
        super().__init__(optimizer=OptimizerConfig(name="sgd", lr=0.01))
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.largest = 0.0

    def forward(self, batch: Any) -> Tensor:
        with torch.enable_grad():
            positions = batch["features"].clone().requires_grad_()
            energy = self.model(positions).sum()
            (forces,) = torch.autograd.grad(energy, positions, create_graph=self.training)
        return forces

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        self.largest = max(self.largest, float(outputs.detach().abs().max()))
        return (outputs + batch["features"]).square().mean(dim=1)


def evaluate(folder: str, strategy: Any) -> None:
    trainer = Trainer(
        run_dir=f"{folder}/{strategy}",
        parallel=ParallelConfig(strategy=strategy),
        inference_mode=False,
        accelerator="cpu",
        progress_bar=False,
    )
    data, task = data_in(Path(folder) / f"data-{trainer.global_rank}"), Forces()
    trainer.test(task, datamodule=data, verbose=False)
    assert task.largest > 0
    print(f"loss {float(trainer.callback_metrics['test/loss']):.6f}")


@pytest.mark.slow
def test_a_module_that_needs_gradients_in_a_test(tmp_path: Path) -> None:
    """With the same loss on one process and on two."""
    losses = set()
    for ranks, strategy in ((1, "ddp"), (2, "ddp")):
        outcome = run_ranks(ranks, evaluate, str(tmp_path), strategy, folder=tmp_path / f"logs-{ranks}{strategy}").ok()
        losses.add(outcome.outputs[0].split("loss ")[1].split()[0])
    assert len(losses) == 1, losses


@pytest.fixture
def kept_settings() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kept_settings")
def test_deterministic_trains_on_the_cpu_too(tmp_path: Path) -> None:
    weights = []
    for number in range(2):
        torch.manual_seed(0)
        task = ClassificationTask(small(), num_classes=3, input="features", optimizer=OptimizerConfig(name="adamw"))
        options: dict[str, Any] = {"accelerator": "cpu", "progress_bar": False, "deterministic": True}
        trainer = Trainer(run_dir=str(tmp_path / f"run{number}"), max_steps=4, **options)
        trainer.fit(task, datamodule=data_in(tmp_path / str(number)))
        assert torch.are_deterministic_algorithms_enabled()
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(*weights)
    assert bool(weights[0].isfinite().all())
