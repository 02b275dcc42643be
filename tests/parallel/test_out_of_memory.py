"""What counts as lack of memory, what is copied to undo a step, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain import Checkpointing, OptimizerConfig, ParallelConfig, ShardedDataModule, Trainer
from disttrain.callbacks.ledger import read_ledger
from disttrain.parallel.backup import BufferBackup, OptimizerBackup
from disttrain.parallel.out_of_memory import is_out_of_memory
from tests.support.features import write_features
from tests.support.memory import ShortTask
from tests.support.ranks import run_ranks
from tests.support.sameness import PlainModule


def test_what_counts_as_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(text))
        assert is_out_of_memory(torch.AcceleratorError(text))
    # Its ranks are in a collective already, which nobody can leave.
    nccl = dist.DistBackendError("NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc 8 bytes")
    assert not is_out_of_memory(nccl)
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def steps(optimizer: torch.optim.Optimizer, module: nn.Module, number: int) -> None:
    for step in range(number):
        for place, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + place + 1))
        optimizer.step()


class Trained(nn.Linear):
    """A module with as much of a trainer as a backup looks at."""

    trainer: Any = type("FakeTrainer", (), {"precision_plugin": None})


@pytest.mark.parametrize("before", [0, 2])
def test_an_optimizer_goes_back_to_what_it_was(before: int) -> None:
    wanted, module = Trained(3, 2), Trained(3, 2)
    module.load_state_dict(wanted.state_dict())
    one, other = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (wanted, module))
    steps(one, wanted, before)
    steps(other, module, before)
    backup = OptimizerBackup(module, [other])  # type: ignore[arg-type]
    steps(other, module, 3)
    other.param_groups[0]["lr"] = 7.0
    backup.restore()
    assert len(other.state) == (2 if before else 0)
    assert other.param_groups[0]["lr"] == 0.1
    steps(one, wanted, 2)
    steps(other, module, 2)
    for a, b in zip(wanted.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_buffers_go_back_even_if_they_were_replaced() -> None:
    norm = nn.BatchNorm1d(2)
    backup = BufferBackup(norm)
    backup.take()
    norm(torch.randn(4, 2))
    norm.running_var = torch.full((2,), 5.0)
    backup.restore()
    assert torch.equal(norm.running_mean, torch.zeros(2))  # type: ignore[arg-type]
    assert torch.equal(norm.running_var, torch.ones(2))
    assert norm.num_batches_tracked == 0


class SyncedTask(ShortTask):
    """A task that waits for all ranks in the middle of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.SyncBatchNorm(3)


class ManualTask(ShortTask):
    """A task that steps its optimizer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("it is to be refused first")


@pytest.mark.parametrize(
    ("module", "parallel", "message"),
    [
        (PlainModule, {}, "PlainModule is no disttrain.Task"),
        (SyncedTask, {}, "SyncedTask has a SyncBatchNorm"),
        (ManualTask, {}, "ManualTask steps its optimizers by itself"),
        (ShortTask, {"find_unused_parameters": True}, "parallel.find_unused_parameters is true"),
    ],
)
def test_what_cannot_keep_step_is_refused(tmp_path: Path, module: Any, parallel: dict[str, Any], message: str) -> None:
    outcome = run_ranks(1, _fit, module, parallel, str(tmp_path), folder=tmp_path / "logs")
    assert outcome.codes == [1]
    assert f"ConfigError: data.micro_batch_size is auto, and {message}" in outcome.text


def _fit(module: Any, parallel: dict[str, Any], folder: str) -> None:
    shard = write_features(Path(folder), "train", 12)
    data = ShardedDataModule(train=shard, global_batch_size=4, micro_batch_size="auto")
    trainer = Trainer(run_dir=folder, max_steps=1, parallel=ParallelConfig(**parallel), progress_bar=False)
    trainer.fit(module(OptimizerConfig()) if module is PlainModule else module(), datamodule=data)


class FeatureModule(PlainModule):
    """No task; the mean of a micro batch of the shards' features."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        every = torch.cat([parameter.flatten() for parameter in self.parameters()])
        return every.sum() * batch["features.npy"].mean()


def _resume_with_sizes(folder: str) -> None:
    shard = write_features(Path(folder), "train", 12)
    checkpoint: Path | None = None
    for step, size in enumerate((4, 2), start=1):
        data = ShardedDataModule(train=shard, global_batch_size=4, micro_batch_size=size)
        callbacks: list[Any] = [Checkpointing(every_steps=1)]
        trainer = Trainer(run_dir=folder, max_steps=step, callbacks=callbacks, progress_bar=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(FeatureModule(OptimizerConfig()), datamodule=data, ckpt_path=checkpoint)
        told = [str(warning.message) for warning in caught if "micro_batch_size" in str(warning.message)]
        wanted = [] if size == 4 else ["data.micro_batch_size was 4 and is 2: FeatureModule is no disttrain.Task"]
        assert [text.split(",")[0] for text in told] == wanted, told
        checkpoint = max((Path(folder) / "checkpoints").glob("step-*"))


def test_another_size_is_told_where_the_gradient_may_depend_on_it(tmp_path: Path) -> None:
    run_ranks(1, _resume_with_sizes, str(tmp_path), folder=tmp_path / "logs").ok()


def test_the_size_divides_what_a_rank_takes(tmp_path: Path) -> None:
    data = ShardedDataModule(train=write_features(tmp_path, "train", 40), global_batch_size=36, micro_batch_size="auto")
    data.setup("fit")
    found = [data.micro_batch_size]
    while found[-1] > 1:
        data.limit_micro_batch_size(found[-1] // 2)
        assert data.plan is not None
        assert data.plan.accumulation * data.micro_batch_size == 36
        found.append(data.micro_batch_size)
    assert found == [36, 18, 9, 4, 2, 1]
    assert data.state_dict()["micro_batch_size"] == 1


def test_an_evaluation_takes_no_more_than_what_was_found(tmp_path: Path) -> None:
    shards = {name: write_features(tmp_path, name, 200) for name in ("train", "val")}
    data = ShardedDataModule(**shards, global_batch_size=128, micro_batch_size="auto")  # type: ignore[arg-type]
    data.setup("fit")
    assert data.val_dataloader().micro_batch_size == 32  # type: ignore[union-attr]
    data.limit_micro_batch_size(16)
    assert data.val_dataloader().micro_batch_size == 16  # type: ignore[union-attr]


def test_a_ledger_with_micro_batches_of_several_sizes(tmp_path: Path) -> None:
    """A killed run wrote micro batches of 4, the resumed one of 6: each place counts once, and the last line holds."""
    lines = [(0, "abcd"), (4, "efgh"), (8, "ijkl"), (0, "ABCDEF"), (6, "GHIJKL")]
    (tmp_path / "rank-00000.jsonl").write_text(
        "".join(
            f'{{"epoch": 0, "step": 7, "first_position": {at}, "keys": {list(keys)}}}\n' for at, keys in lines
        ).replace("'", '"')
    )
    assert read_ledger(tmp_path) == {7: list("ABCDEFGHIJKL")}
