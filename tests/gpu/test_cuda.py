"""What only a CUDA device can show: precisions, compiled blocks, fused optimizers, offloading; one rank with NCCL."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain import OptimizerConfig, ParallelConfig, Trainer, UpdateGuard
from disttrain.parallel.gradients import clip_gradient_norm, scale_gradients
from disttrain.parallel.reduction.exchange import PartialSums
from disttrain.parallel.reduction.tree import plan_tree
from disttrain.system.reading import read_run
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask
from tests.support.weights import differing, distance

pytestmark = pytest.mark.gpu
STEPS, MICRO_BATCHES = 4, 4


class Task(MLPTask):
    """Inputs in the type of the weights."""

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"].to(self.model.head.weight.dtype))
        return out


def train_in(out: str, options: dict[str, Any], precision: str, optimizer: str) -> None:
    """Train some steps on one rank; write the weights."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=ParallelConfig(**options),
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_norm=0.5,
        seed=5,
        accelerator="cuda",
        progress_bar=False,
        tf32=False,
    )
    assert torch.get_float32_matmul_precision() == "highest"
    trainer.accumulate_grad_batches = MICRO_BATCHES
    if options.get("meta_init"):
        with torch.device("meta"):
            task = Task(OptimizerConfig(name=optimizer, lr=0.05))  # type: ignore[arg-type]
    else:
        task = Task(OptimizerConfig(name=optimizer, lr=0.05))  # type: ignore[arg-type]
    trainer.fit(task, train_dataloaders=MicroBatches(0, MICRO_BATCHES, micro_batches=MICRO_BATCHES, steps=STEPS))
    assert torch.distributed.get_backend() == "nccl" or options.get("offload")
    groups = trainer.optimizers[0].param_groups
    assert all(bool(group.get("fused")) != bool(options.get("offload")) for group in groups), "fused where it can be"
    weights = trainer.strategy.lightning_module_state_dict()
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in weights.items()}
    torch.save({name: t.cpu() for name, t in whole.items()}, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The weights after training, and the run's folder; once a module."""
    folder = tmp_path_factory.mktemp("cuda")

    @cache
    def run(options: tuple[tuple[str, Any], ...], precision: str, optimizer: str) -> tuple[dict[str, Tensor], Path]:
        name = "-".join([precision, optimizer, *(f"{key}={value}" for key, value in options)])
        out = folder / f"{name}.pt"
        run_ranks(
            1, train_in, str(out), dict(options), precision, optimizer, folder=folder / f"{name}-logs", timeout=300
        ).ok()
        return torch.load(out, weights_only=True), folder / name

    def by_name(precision: str = "32-true", optimizer: str = "sgd", **options: Any) -> tuple[dict[str, Tensor], Path]:
        found: tuple[dict[str, Tensor], Path] = run(tuple(sorted(options.items())), precision, optimizer)
        return found

    return by_name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 3e-2), ("16-mixed", 1e-2), ("bf16-true", 6e-2)]
)
def test_every_precision_trains(train, strategy: str, precision: str, bound: float) -> None:  # type: ignore[no-untyped-def]
    exact, _ = train(strategy="ddp")
    assert distance(exact, train(precision, strategy=strategy)[0]) <= bound


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_fused_optimizers_with_a_loss_scaler(train, strategy: str, optimizer: str) -> None:  # type: ignore[no-untyped-def]
    exact, _ = train(optimizer=optimizer, strategy="ddp")
    assert distance(exact, train("16-mixed", optimizer, strategy=strategy)[0]) <= 0.3  # Adam magnifies small gradients


def test_the_tree_has_the_same_bits_under_both_strategies(train) -> None:  # type: ignore[no-untyped-def]
    ddp, fsdp = (train(strategy=strategy, reduction="tree")[0] for strategy in ("ddp", "fsdp"))
    assert not differing(ddp, fsdp)


def test_partial_sums_on_the_device() -> None:
    device, plan = torch.device("cuda", 0), plan_tree(1, 4)
    draws = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    sums = PartialSums(0)
    sums.start(plan)
    for draw in draws[:3]:
        sums.add([draw.to(device)])
    last = [draws[3].to(device)]
    assert sums.finish([0], last) == []
    assert torch.equal(last[0].cpu(), (draws[0] + draws[1]) + (draws[2] + draws[3]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_meta_init_starts_both_strategies_alike(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    alone, _ = train(strategy="ddp", meta_init=True)
    assert distance(alone, train(strategy=strategy, meta_init=True)[0]) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"meta_init": True}])
def test_offloading_trains_as_the_device_alone_does(train, options: dict[str, bool]) -> None:  # type: ignore[no-untyped-def]
    kept, _ = train(strategy="fsdp", **options)
    assert distance(kept, train(strategy="fsdp", offload=True, **options)[0]) <= 1e-5


class SickTask(Task):
    """A loss that is not a number in the third step."""

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return super().losses(outputs, batch) * (math.nan if self.trainer.global_step == 2 else 1.0)


def train_guarded(out: str, options: dict[str, Any], accelerator: str = "cuda") -> None:
    """Train through a bad step, with a threshold for norms too."""
    guard = UpdateGuard(spikes=10, window=64)
    trainer = Trainer(
        run_dir=out,
        max_steps=STEPS,
        parallel=ParallelConfig(**options),
        accelerator=accelerator,  # type: ignore[arg-type]
        callbacks=[guard],
        progress_bar=False,
    )
    trainer.accumulate_grad_batches = MICRO_BATCHES
    task = SickTask(OptimizerConfig(name="adamw", lr=0.05))
    trainer.fit(task, train_dataloaders=MicroBatches(0, MICRO_BATCHES, micro_batches=MICRO_BATCHES, steps=STEPS))
    assert guard.skipped == 1
    weights = trainer.strategy.lightning_module_state_dict()
    assert all(
        bool(torch.isfinite(t.full_tensor() if hasattr(t, "full_tensor") else t).all()) for t in weights.values()
    )


@pytest.mark.parametrize("options", [{}, {"strategy": "fsdp"}, {"strategy": "fsdp", "offload": True}])
def test_a_bad_step_is_left_out_on_the_device_and_offloaded(tmp_path: Path, options: dict[str, Any]) -> None:
    run_ranks(1, train_guarded, str(tmp_path / "run"), options, folder=tmp_path / "logs", timeout=300).ok()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["none", "blocks", "selective"])
def test_compiled_blocks_train(train, strategy: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    alone, _ = train(strategy="ddp", compile="blocks")
    got, run_dir = train(strategy=strategy, compile="blocks", activation_checkpointing=kind)
    assert distance(alone, got) <= 1e-5
    assert read_run(run_dir)["compile"]["graph_breaks"] == {}


def test_tensor_cores_are_used_unless_told_otherwise(tmp_path: Path) -> None:
    for tf32, expected in ((False, "highest"), (True, "high")):
        Trainer(run_dir=str(tmp_path), progress_bar=False, tf32=tf32)
        assert torch.get_float32_matmul_precision() == expected


def test_clipping_and_weighing_on_the_device_wait_for_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(10, device="cuda"))
    parameter.grad = torch.full_like(parameter, 3.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip_gradient_norm([parameter], 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert abs(float(norm) - 90**0.5) < 1e-6


def test_half_precision_is_scaled_by_a_factor_in_float32() -> None:
    """A factor that is rounded to bfloat16 gives another product for about every tenth element."""
    grad = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    factor = torch.tensor(0.3337, dtype=torch.float64)
    expected = (grad.float() * factor.float()).bfloat16()
    assert not torch.equal(expected, grad * factor.bfloat16()), "the test shows nothing"
    parameter = torch.nn.Parameter(torch.zeros_like(grad, device="cuda"))
    parameter.grad = grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale_gradients([parameter], factor.cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(parameter.grad.cpu(), expected)
