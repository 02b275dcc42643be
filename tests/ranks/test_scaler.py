"""``16-mixed`` with real ranks on the CPU, where users may not have it: one scale, one decision, one clipped gradient.

PyTorch's autocast and loss scaler run on the CPU too; the check that keeps users from it is taken out here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import disttrain.trainer
from disttrain import Checkpointing, OptimizerConfig, ParallelConfig, Trainer
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask

STEPS, BAD = 4, 1


class _Infinite(torch.autograd.Function):
    """Outputs as they are, and an infinite gradient for something else."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, other: Tensor) -> Tensor:
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.tensor(torch.inf)


class Overflow(MLPTask):
    """At one step the gradient of one row, which the last rank holds under FSDP, is infinite."""

    def forward(self, batch: Any) -> Tensor:
        outputs = super().forward(batch)
        if self.trainer.global_step == BAD:
            outputs = _Infinite.apply(outputs, self.row)  # type: ignore[no-untyped-call]
        return outputs

    def on_fit_start(self) -> None:
        head = self.model.head
        head.register_forward_pre_hook(lambda module, inputs: setattr(self, "row", module.weight[-1].sum()))


class Watch(Callback):
    """What every rank sees after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.flags: list[bool] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in pl_module.parameters()]
        self.flags.append(not all(bool(g.isfinite().all()) for g in grads))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in pl_module.parameters()]
        self.seen.append(
            {
                "scale": trainer.precision_plugin.scaler.get_scale(),
                "weights": [t.detach().clone() for t in local],
                "norm": float(pl_module.grad_norm),
                "own_bad": self.flags[-1],
            }
        )


def train_in(run_dir: str, parallel: ParallelConfig, precision: Literal["16-mixed", "32-true"], fused: bool) -> None:
    """Train some steps, one of which overflows; check on every rank."""
    disttrain.trainer.check_precision = lambda precision, device: None
    watch = Watch()
    trainer = make(run_dir, parallel, [watch], steps=STEPS)
    ranks, rank = trainer.world_size, trainer.global_rank
    shards = ranks // parallel.replicate
    task = Overflow(OptimizerConfig(name="sgd", lr=0.1))
    if fused:
        task.configure_optimizers = lambda: torch.optim.AdamW(task.parameters(), lr=0.01, fused=True)  # type: ignore
    batches = MicroBatches(rank, 1, micro_batches=ranks, steps=STEPS)
    trainer.fit(task, train_dataloaders=batches)

    scales = [step["scale"] for step in watch.seen]
    assert scales == [65536.0, 32768.0, 32768.0, 32768.0], scales
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))
        for before, after in zip(watch.seen, watch.seen[1:], strict=False)
    ]
    assert moved == [False, True, True], f"rank {rank} moved its weights: {moved}"
    bad = torch.tensor([step["own_bad"] for step in watch.seen], dtype=torch.int32)
    told = [torch.empty_like(bad) for _ in range(ranks)]
    dist.all_gather(told, bad)
    last = [parallel.strategy == "ddp" or r % shards == shards - 1 for r in range(ranks)]
    expected = [[0, int(holds), 0, 0] for holds in last]
    assert [t.tolist() for t in told] == expected, "the overflow was not where this test wants it"
    for step in (0, 2, 3):  # true norms, not 65536 times as large
        assert 0.01 < watch.seen[step]["norm"] < 20, f"norm {watch.seen[step]['norm']} at step {step}"
    assert not math.isfinite(watch.seen[BAD]["norm"])


def make(run_dir: str, parallel: ParallelConfig, callbacks: list[Callback], *, steps: int) -> Trainer:
    """A trainer on the CPU whose precision is 16-mixed."""
    return Trainer(
        run_dir=run_dir,
        max_steps=steps,
        parallel=parallel,
        precision="16-mixed",
        gradient_clip_norm=0.5,
        seed=5,
        progress_bar=False,
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    ("ranks", "parallel", "fused"),
    [
        (2, ParallelConfig(), False),
        (2, ParallelConfig(strategy="fsdp"), False),
        (2, ParallelConfig(strategy="fsdp"), True),
        (2, ParallelConfig(strategy="fsdp", offload=True), False),
        pytest.param(4, ParallelConfig(strategy="fsdp", replicate=2), False, marks=pytest.mark.slow),
    ],
)
def test_an_infinity_on_one_rank_is_skipped_by_all(
    tmp_path: Path, ranks: int, parallel: ParallelConfig, fused: bool
) -> None:
    run_ranks(ranks, train_in, str(tmp_path / "run"), parallel, "16-mixed", fused, folder=tmp_path / "logs").ok()


def resume_in(run_dir: str) -> None:
    """Train past the overflow, save, and go on in another trainer."""
    disttrain.trainer.check_precision = lambda precision, device: None
    parallel = ParallelConfig(strategy="fsdp")
    scales = []
    for steps in (2, 3):
        trainer = make(run_dir, parallel, [Checkpointing(every_steps=1)], steps=steps)
        made = sorted((Path(run_dir) / "checkpoints").glob("step-*"))
        start = trainer.find_start(str(made[-1]) if made else "never")
        assert bool(made) == (steps == 3)
        batches = MicroBatches(trainer.global_rank, 1, micro_batches=2, steps=3)
        task = Overflow(OptimizerConfig(name="sgd", lr=0.1))
        trainer.fit(task, train_dataloaders=batches, ckpt_path=start.checkpoint)
        scales.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]
    assert scales == [32768.0, 32768.0], scales


def test_a_resumed_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    run_ranks(2, resume_in, str(tmp_path / "run"), folder=tmp_path / "logs").ok()
