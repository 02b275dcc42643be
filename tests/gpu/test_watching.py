"""What only CUDA can show of what watches a run: the guard on any module, timing by events, NCCL's recorder."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain import Trainer, UpdateGuard
from disttrain.callbacks.watchdog.callback import _last_collectives
from disttrain.system.reading import read_run
from tests.support.ranks import run_ranks
from tests.support.sameness import DropoutMLP, MicroBatches

pytestmark = pytest.mark.gpu
STEPS, MICRO_BATCHES = 16, 2


class Plain(pl.LightningModule):
    """Knows nothing of disttrain; its loss is not a number in the third step."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.model = fused, DropoutMLP()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.model(batch["inputs"]), batch["labels"])
        return loss * (math.nan if self.trainer.global_step == 2 else 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


def train_plain(out: str, fused: bool, accelerator: str = "cuda") -> None:
    guard = UpdateGuard(spikes=10, window=64)
    trainer = Trainer(
        run_dir=out,
        max_steps=STEPS,
        accelerator=accelerator,  # type: ignore[arg-type]
        callbacks=[guard],
        progress_bar=False,
    )
    trainer.accumulate_grad_batches = MICRO_BATCHES
    module = Plain(fused)
    trainer.fit(module, train_dataloaders=MicroBatches(0, MICRO_BATCHES, micro_batches=MICRO_BATCHES, steps=STEPS))
    assert guard.skipped == 1
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_any_module_is_guarded_and_its_passes_are_measured(tmp_path: Path, fused: bool) -> None:
    run_ranks(1, train_plain, str(tmp_path / "run"), fused, folder=tmp_path / "logs", timeout=300).ok()
    told = read_run(tmp_path / "run")["ranks"][0]
    assert 0 < told["forward_p50"] < told["step_p50"], told
    assert 0 < told["backward_p50"] < told["step_p50"], told


def print_last_collectives() -> None:
    os.environ["TORCH_FR_BUFFER_SIZE"] = os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] = "100"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=torch.device("cuda", 0), **alone)
    dist.all_reduce(torch.ones(3, device="cuda"))
    torch.cuda.synchronize()
    print("\n".join(_last_collectives()))
    dist.destroy_process_group()


def test_a_hang_report_reads_the_recorder_of_nccl(tmp_path: Path) -> None:
    text = run_ranks(1, print_last_collectives, folder=tmp_path / "logs").ok().text
    assert "nccl:all_reduce" in text, text
