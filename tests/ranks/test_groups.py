"""Every process group gives a collective up as late as the first one, and after the run would report a hang."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

import disttrain
from disttrain import DDP, Checkpointing, OptimizerConfig, ParallelConfig, Trainer
from disttrain.distributed.synchronize_errors import timeout_of
from disttrain.lightning import bases
from disttrain.parallel.config import Degrees
from disttrain.parallel.ranks import divide_ranks
from tests.support.ranks import run_ranks
from tests.support.sameness import MicroBatches, MLPTask

LAYOUTS = {
    "ddp": ParallelConfig(reduction="tree"),
    "hsdp": ParallelConfig(strategy="fsdp", replicate=2, reduction="tree"),
}


class Look(Callback):
    """Notes how long each group waits, by group, while the training runs: afterwards some are closed."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.timeouts = {group: timeout_of(group) for group in dist.distributed_c10d._world.pg_map}


def train_in(folder: str) -> None:
    """Train in each layout with saves, and look at the groups."""
    for name, parallel in LAYOUTS.items():
        trainer = Trainer(
            run_dir=f"{folder}/{name}",
            max_steps=2,
            parallel=parallel,
            hang_timeout="45m",
            progress_bar=False,
            callbacks=[Checkpointing(every_steps=1), look := Look()],
        )
        task = MLPTask(OptimizerConfig(name="sgd", lr=0.1))
        trainer.fit(task, train_dataloaders=MicroBatches(trainer.global_rank, 1, micro_batches=4, steps=2))
        # All ranks, the vote, the saves; and the tree's, or the mesh's.
        assert len(look.timeouts) >= 4, look.timeouts
        assert set(look.timeouts.values()) == {timedelta(minutes=50)}, name
        if name == "hsdp":
            known = set(dist.distributed_c10d._world.pg_map)
            divide_ranks(Degrees(replicate=1, shard=2, tensor=2), trainer.global_rank)
            new: list[Any] = [group for group in dist.distributed_c10d._world.pg_map if group not in known]
            assert {timeout_of(group) for group in new} == {timedelta(minutes=50)}
        dist.barrier()  # a rank that is still connecting would meet a closed connection
        dist.destroy_process_group()


def test_all_groups_have_the_timeout_of_the_first(tmp_path: Path) -> None:
    run_ranks(4, train_in, str(tmp_path), folder=tmp_path / "logs").ok()


def test_groups_are_made_in_one_place_alone() -> None:
    """PyTorch's own functions give a group a timeout of their own."""
    makers: dict[str, list[str]] = {}
    root = Path(disttrain.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name.startswith(("new_group", "new_subgroups", "split_group")):
                makers.setdefault(str(path.relative_to(root)), []).append(name)
    assert makers == {"distributed/synchronize_errors.py": ["new_group"]}


def test_ddp_is_wrapped_on_the_stream_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning 2.6.6 wraps on a stream of its own, for which every backward pass then waits."""

    def no_stream(*arguments: Any) -> None:
        raise AssertionError("another stream")

    strategy = DDP()
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: [0])
    monkeypatch.setattr(bases, "DistributedDataParallel", lambda model, **options: options)
    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    wrapped: Any = strategy._setup_model(torch.nn.Linear(1, 1))
    assert wrapped["device_ids"] == [0]
    assert wrapped["bucket_cap_mb"] == strategy.config.bucket_mib
