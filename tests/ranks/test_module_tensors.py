"""Buffers and parameters of any type and layout: one model on all ranks, saved and resumed to the bit, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain import Checkpointing, ParallelConfig, ShardedDataModule, Trainer
from disttrain.distributed.synchronize_errors import gather
from disttrain.errors import ConfigError
from disttrain.parallel.model.module_tensors import _overlaps, settle_layout
from tests.support.features import write_features
from tests.support.ranks import run_ranks
from tests.support.tasks import FeatureTask

TYPES = (
    *("int8", "uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool", "float16", "bfloat16"),
    *("float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)


def odd_buffers() -> dict[str, Tensor]:
    made = {f"of_{name}": torch.ones(5, dtype=getattr(torch, name)) for name in TYPES}
    made["column"] = torch.ones(64, 2)[:, 0]
    made["expanded"] = torch.ones(1).expand(5)
    made["expanded_rows"] = torch.ones(3, 1).expand(3, 4)
    made["transposed"] = torch.ones(3, 4).t()
    made["channels_last"] = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    made["scalar"], made["empty"] = torch.ones(()), torch.ones(0, 3)
    return made


def bits(tensor: Tensor) -> list[int]:
    return cast(list[int], tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


class OddTensors(FeatureTask):
    """Ranks gather their own buffers in training; ``seen`` is what was evaluated."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in odd_buffers().items():
            self.register_buffer(name, tensor)
        self.kernel = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(3, 2).t())
        self.seen: dict[str, list[int]] = {}

    def forward(self, batch: Any) -> Any:
        return super().forward(batch) * (self.kernel.square().mean() + self.turned.square().mean())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name in odd_buffers():
            buffer = self.get_buffer(name)
            # Of types that PyTorch does not fill, the bytes of a number.
            value = torch.full(buffer.shape, 1 + self.global_rank + self.global_step % 3, dtype=torch.float64)
            buffer.copy_(value.to(torch.complex64).to(buffer.dtype) if buffer.is_complex() else value.to(buffer.dtype))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.seen = {name: bits(self.get_buffer(name)) for name in odd_buffers()}


def train(run_dir: str, shard: str, strategy: str) -> None:
    def fit(folder: str, steps: int, resume: str = "auto") -> OddTensors:
        trainer = Trainer(
            run_dir=f"{run_dir}/{folder}",
            max_steps=steps,
            validate_every_steps=2,
            progress_bar=False,
            parallel=ParallelConfig(strategy=cast(Any, strategy)),
            callbacks=[Checkpointing(every_steps=2, keep_last=9)],
        )
        torch.manual_seed(trainer.global_rank)  # weights are rank 0's
        task, start = OddTensors(), trainer.find_start(resume)
        fields: dict[str, Any] = {"features": "features.npy", "label": "cls"}
        data = ShardedDataModule(train=[shard], val=[shard], fields=fields, global_batch_size=8, micro_batch_size=2)
        trainer.fit(task, datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
        told = gather(task.seen)
        assert told[0] == told[1], [name for name in told[0] if told[0][name] != told[1][name]]
        state = trainer.strategy.lightning_module_state_dict()
        task.seen = {
            name: bits(cast(Any, t).full_tensor() if hasattr(t, "full_tensor") else t) for name, t in state.items()
        }
        assert gather(task.seen)[0] == task.seen
        return task

    whole, part = fit("whole", 6), fit("part", 4)
    assert whole.seen["of_int16"] != part.seen["of_int16"], "nothing is filled"
    resumed = fit("part", 6, f"{run_dir}/part")
    different = [name for name in whole.seen if whole.seen[name] != resumed.seen[name]]
    assert not different, different


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_buffer_is_one_on_all_ranks_and_comes_back(tmp_path: Path, strategy: str) -> None:
    shard = write_features(tmp_path, "a", 40, classes=2)
    run_ranks(2, train, str(tmp_path / "runs"), shard, strategy, folder=tmp_path / "logs").ok()


class ComplexWeights(FeatureTask):
    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class CountingWeights(FeatureTask):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.ones(3, dtype=torch.int16), requires_grad=False)


class TwoTypes(FeatureTask):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Parameter(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "strategy", "message"),
    [
        (ComplexWeights, "ddp", "parameter wave is complex64"),
        (ComplexWeights, "fsdp", "parameter wave is complex64"),
        (CountingWeights, "fsdp", "parameter count is int16, which FSDP cannot shard"),
        (TwoTypes, "fsdp", r"model\.0\.weight \(float32\) and fine \(float64\) are in one FSDP unit"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    tmp_path: Path, kind: type[FeatureTask], strategy: str, message: str
) -> None:
    trainer = Trainer(
        run_dir=str(tmp_path / "run"),
        max_steps=1,
        progress_bar=False,
        parallel=ParallelConfig(strategy=cast(Any, strategy)),
    )
    fields: dict[str, Any] = {"features": "features.npy", "label": "cls"}
    shard = write_features(tmp_path, "a", 40, classes=2)
    data = ShardedDataModule(train=[shard], fields=fields, global_batch_size=8, micro_batch_size=2)
    try:
        with pytest.raises(ConfigError, match=message) as caught:
            trainer.fit(kind(), datamodule=data)
        assert caught.value.hint
    finally:
        dist.destroy_process_group()


def test_only_what_shares_memory_is_copied() -> None:
    base = torch.arange(24.0)
    for tensor in (base.view(2, 3, 4), base.view(6, 4).t(), base[::2], base.view(2, 12)[:, :3], base[:1].expand(1, 1)):
        assert not _overlaps(tensor)
    for tensor in (base[:1].expand(5), base[:3].view(3, 1).expand(3, 2), base.unfold(0, 4, 2)):
        assert _overlaps(tensor)
    module, shared = nn.Module(), torch.ones(1).expand(4)
    for name, tensor in {"a": shared, "b": shared, "column": base.view(6, 4)[:, 1]}.items():
        module.register_buffer(name, tensor)
    column = module.get_buffer("column")
    settle_layout(module, sharded=False)
    assert module.get_buffer("column") is column
    assert module.get_buffer("a") is module.get_buffer("b"), "one buffer with two names stays one"
    assert torch.equal(module.get_buffer("a").add_(1), torch.full((4,), 2.0))
