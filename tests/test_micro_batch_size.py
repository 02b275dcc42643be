"""What counts as lack of memory, which size follows from it, and what is refused."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from disttrain import Checkpointing, OptimizerConfig, ShardedDataModule, Trainer
from disttrain.callbacks.micro_batch_size import Shortage, read_shortages
from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.errors import ConfigError
from disttrain.parallel.memory_errors import is_out_of_memory
from tests.support import foreign
from tests.support.features import write_features
from tests.support.ranks import run_ranks
from tests.support.sameness import PlainModule


def test_what_counts_as_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "HIP out of memory. Tried to allocate 1 GiB",
    ):
        assert is_out_of_memory(RuntimeError(text))
        assert is_out_of_memory(torch.AcceleratorError(text))
    nccl = "NCCL error: unhandled cuda error. Last error: "
    assert is_out_of_memory(dist.DistBackendError(f"{nccl}Failed to CUDA calloc 8 bytes"))
    assert is_out_of_memory(dist.DistBackendError(f"{nccl}Cuda failure 2 'out of memory'"))
    assert not is_out_of_memory(dist.DistBackendError(f"{nccl}remote process exited"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


def test_the_cause_of_an_error_counts_unless_it_is_hidden() -> None:
    """As of what a thread or a compiler has met."""
    with pytest.raises(ValueError, match="in a thread") as caught:
        raise ValueError("in a thread") from MemoryError()
    assert is_out_of_memory(caught.value)
    hidden = ValueError("another")
    hidden.__context__, hidden.__suppress_context__ = MemoryError(), True
    assert not is_out_of_memory(hidden)


def test_what_cannot_be_read_of_the_notes_is_passed_over(tmp_path: Path) -> None:
    assert read_shortages(tmp_path / "none") == []
    (tmp_path / "rank-00000-size-8.json").write_text('{"rank": 0, "step": 3, "phase": "forward pass", "size": 8}')
    for name, damage in (("1", ""), ("2", "{}"), ("3", "[1]"), ("4", '{"rank": 0, "more": 1}')):
        (tmp_path / f"rank-{name}-size-4.json").write_text(damage)
    assert read_shortages(tmp_path) == [Shortage(0, 3, "forward pass", 8)]


class Manual(foreign.ByHand, foreign.Evaluated):
    """Steps its optimizer by itself."""


def test_a_module_that_optimizes_by_hand_is_refused(tmp_path: Path) -> None:
    shard = write_features(tmp_path, "train", 12)
    data = ShardedDataModule(train=shard, global_batch_size=4, micro_batch_size="auto")
    trainer = Trainer(run_dir=str(tmp_path / "run"), max_steps=1, progress_bar=False)
    with pytest.raises(ConfigError, match="micro_batch_size is auto, and Manual steps its optimizers by itself"):
        trainer.fit(Manual(), datamodule=data)


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
