"""A model that runs out of memory where a test says so, and runs of it that are compared bit by bit."""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from disttrain import Checkpointing, ParallelConfig, SampleLedger, ShardedDataModule, Task, Trainer
from disttrain.callbacks.ledger import read_ledger
from disttrain.parallel.collectives import all_gather_single, reduce_scatter_single
from disttrain.parallel.fsdp_internals import fsdp_modules
from tests.support.features import write_features
from tests.support.ranks import Outcome, run_ranks
from tests.support.weights import differing, final_weights

GLOBAL, WIDTH = 64, 12


@dataclass
class Shortage:
    """Where an allocation fails: on which rank, in what, for micro batches of more samples than the limit.

    Attributes:
        phase: ``copy``, ``forward``, ``backward``, ``gather``, ``scatter``, ``cast``, ``exchange``, ``clip`` or
            ``optimizer``.
        place: ``stem``, ``0``, ``1``, ``2`` or ``head`` in a forward or backward pass; for copies and the buffers of
            FSDP and of the exchange of ``reduction: tree`` the number of an allocation.
        step: from which step on.
        micro_batch: in which of a step's; None in any.
        cpu: fail as the CPU's allocator does.
    """

    rank: int
    phase: str
    limit: int
    place: str = "1"
    step: int = 0
    micro_batch: int | None = None
    cpu: bool = False

    def error(self) -> RuntimeError:
        """What the allocator raises."""
        if self.cpu:
            try:
                torch.empty(2**60, dtype=torch.uint8)
            except RuntimeError as error:
                return error
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


class _FailBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.place.check("backward")
        return grad, None


class Place(nn.Module):
    """Somewhere in a model where an allocation may fail."""

    def __init__(self, task: ShortTask, name: str) -> None:
        super().__init__()
        self.__dict__["task"], self.name = task, name

    def check(self, phase: str) -> None:
        """Fail if that is due here."""
        self.task.check(phase, self.name)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        self.check("forward")
        out: Tensor = _FailBackward.apply(values, self)
        return out


class TightGather(AllGather):
    """FSDP2's all-gather, whose buffers may not fit."""

    def __init__(self, task: ShortTask) -> None:
        self._task = task

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._task.allocate("gather")
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class TightScatter(ReduceScatter):
    """FSDP2's reduce-scatter, whose buffers may not fit."""

    def __init__(self, task: ShortTask) -> None:
        self._task = task

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._task.allocate("scatter")
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        reduce_scatter_single(output_tensor, input_tensor, op=op, group=group)


class TightData(ShardedDataModule):
    """Batches that may not fit on the device."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        task: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        if task.training:
            task.allocate("copy")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class HalfAdamW(torch.optim.AdamW):
    """Steps half of its parameters before it runs out of memory."""

    task: Any = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        if self.task.is_due("optimizer"):
            parameters = [p for group in self.param_groups for p in group["params"]]
            for parameter in parameters[len(parameters) // 2 :]:
                parameter.grad = None
            super().step()
            raise self.task.shortage.error()
        super().step()
        return loss


class ShortTask(Task):
    """Blocks with dropout and, where wanted, batch norms, with places where memory may run short.

    Args:
        stem: have a layer before the blocks; without it they get the data.
        plain: have neither batch norms nor dropout.
        width: of the blocks.
        ballast: copies of each sample that a forward pass keeps, in 24 bytes each.
        thaws: train the layer before the blocks from the second step on.
    """

    def __init__(
        self, *, stem: bool = True, plain: bool = False, width: int = WIDTH, ballast: int = 0, thaws: bool = False
    ) -> None:
        super().__init__()
        self.ballast, self.thaws = ballast, thaws
        torch.manual_seed(1)
        self.shortage: Shortage | None = None
        first = width if stem else 6
        self.stem = nn.Sequential(nn.Linear(6, width), Place(self, "stem")) if stem else Place(self, "stem")
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(first if number == 0 else width, width),
                nn.LayerNorm(width) if plain else nn.BatchNorm1d(width),
                nn.GELU(),
                Place(self, str(number)),
                nn.Linear(width, width),
                nn.Dropout(0.0 if plain else 0.2),
            )
            for number in range(3)
        )
        self.head, self.last = nn.Linear(width, 3), Place(self, "head")
        self.size = self.micro_batch = self.allocations = 0
        self.stem.requires_grad_(not thaws)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Thaw at the second step."""
        if self.thaws and self.trainer.global_step == 1:
            self.stem.requires_grad_(True)

    def on_fit_start(self) -> None:
        """FSDP has its buffers from here on."""
        if self.shortage is not None and self.shortage.phase in ("gather", "scatter"):
            for unit in fsdp_modules(self):
                unit.set_custom_all_gather(TightGather(self))
                unit.set_custom_reduce_scatter(TightScatter(self))
        if self.shortage is not None and self.shortage.phase == "cast":
            for unit in fsdp_modules(self):  # what comes after the reduce-scatter
                unit.set_all_reduce_hook(lambda _: self.allocate("cast"))
        if self.shortage is not None and self.shortage.phase == "exchange":
            strategy: Any = self.trainer.strategy
            exchange = (getattr(strategy, "_hook", None) or strategy._scatters[0])._exchange
            empty = exchange.empty

            def tight(*arguments: Any) -> Tensor:
                self.allocate("exchange")
                out: Tensor = empty(*arguments)
                return out

            exchange.empty = tight

    def shard_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.size, self.micro_batch = len(batch["features"]), batch_idx % self.trainer.accumulate_grad_batches
        return super().training_step(batch, batch_idx)

    def forward(self, batch: Any) -> Tensor:
        hidden = self.stem(batch["features"])
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.last(self.head(hidden))
        if self.ballast and self.training:
            heavy = batch["features"].repeat(1, self.ballast)
            return out + 0.0 * heavy.sum()
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["label"], reduction="none")

    def loss_weights(self, batch: Any) -> Tensor:
        weights: Tensor = 1.0 + batch["label"].float()
        return weights

    def configure_gradient_clipping(self, *arguments: Any, **more: Any) -> None:
        if self.is_due("clip") and self.shortage is not None:
            raise self.shortage.error()
        super().configure_gradient_clipping(*arguments, **more)

    def configure_optimizers(self) -> Any:
        optimizer = HalfAdamW(self.parameters(), lr=0.01)
        optimizer.task = self
        return optimizer

    def is_due(self, phase: str) -> bool:
        """Whether memory runs short now."""
        short = self.shortage
        return (
            short is not None
            and short.phase == phase
            and short.rank in (self.global_rank, -1)
            and self.size > short.limit
            and self.trainer.global_step >= short.step
            and (short.micro_batch in (None, self.micro_batch) or phase in ("clip", "optimizer"))
        )

    def allocate(self, what: str) -> None:
        """Fail in the allocation of a buffer that ``place`` numbers, once, counted from the first after a step."""
        short = self.shortage
        if short is None or short.phase != what or short.rank != self.global_rank or not self.training:
            return
        if self.trainer.global_step >= short.step and self.trainer.datamodule.micro_batch_size > short.limit:  # type: ignore[attr-defined]
            self.allocations += 1
            if self.allocations == int(short.place):
                raise short.error()

    def check(self, phase: str, place: str) -> None:
        """Fail if that is due at a place."""
        if self.is_due(phase) and self.shortage is not None and self.shortage.place == place:
            raise self.shortage.error()


class ReaderThreads(Callback):
    """Sees that one loader reads ahead for training and one for evaluation, two threads each."""

    def on_train_batch_end(self, *unused: Any) -> None:
        """Count the threads."""
        reading = [thread.name for thread in threading.enumerate() if thread.name.startswith("disttrain-reader")]
        assert len(reading) <= 4, f"{len(reading)} reading threads: {reading}"


@dataclass
class Run:
    """A training to make.

    Attributes:
        name: its folder.
        size: its micro batch size; ``auto`` begins with ``start``.
        start: where ``auto`` begins; None for all of a rank's samples.
        then: goes on with this size after ``after`` steps, resumed.
        resume: begins with this checkpoint.
        samples: of a global batch.
        device_mib: train on CUDA in half precision, with so much memory and with 24 MiB of activations a sample.
    """

    name: str
    size: int | str
    parallel: ParallelConfig
    shortage: Shortage | None = None
    start: int | None = None
    then: int | None = None
    after: int = 0
    resume: Path | None = None
    task: dict[str, Any] = field(default_factory=dict)
    steps: int = 5
    samples: int = GLOBAL
    device_mib: int = 0


def make(ranks: int, runs: list[Run], folder: Path, timeout: float = 120) -> Outcome:
    """Make several runs in ``folder``, one after the other, on so many ranks."""
    shards = {name: write_features(folder / "data", name, size) for name, size in (("train", 230), ("val", 21))}
    return run_ranks(ranks, _train_all, runs, shards, str(folder), folder=folder / "logs", timeout=timeout)


def _train_all(runs: list[Run], shards: dict[str, str], folder: str) -> None:
    if runs[0].parallel.strategy == "fsdp":  # let PyTorch compare the ranks' collectives; DDP crashes under that
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        dist.set_debug_level_from_env()
    for run in runs:
        place = Path(folder) / run.name
        if run.after:
            _fit(run, run.size, run.after, shards, place, None)
        checkpoint = max((place / "checkpoints").glob("step-*")) if run.after else run.resume
        _fit(run, run.then or run.size, run.steps, shards, place, checkpoint)


def _fit(run: Run, size: Any, steps: int, shards: dict[str, str], place: Path, checkpoint: Path | None) -> None:
    data = TightData(
        **shards,  # type: ignore[arg-type]
        fields={"features": "features.npy", "label": "cls"},
        global_batch_size=run.samples,
        micro_batch_size=size,
    )
    if run.start is not None and size == "auto":
        data.limit_micro_batch_size(run.start)
    if run.device_mib:
        torch.cuda.set_per_process_memory_fraction(
            run.device_mib * 2**20 / torch.cuda.get_device_properties(0).total_memory
        )
    trainer = Trainer(
        run_dir=str(place),
        precision="16-mixed" if run.device_mib else "32-true",
        accelerator="cuda" if run.device_mib else "cpu",
        max_steps=steps,
        log_every_steps=1,
        validate_every_steps=2,
        gradient_clip_norm=1.0,
        parallel=run.parallel,
        # A checkpoint of the end of a run says that its epoch is over; one of its last step does not.
        callbacks=[SampleLedger(), Checkpointing(every_steps=steps), ReaderThreads()],
        progress_bar=False,
    )
    task = ShortTask(**run.task, ballast=2**20 if run.device_mib else 0)
    task.shortage = run.shortage
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    assert trainer.global_step == steps
    assert not task._step_sums, "sums of a step are left"


def losses(run_dir: Path) -> list[dict[str, str]]:
    """What a run has logged, without what depends on the clock."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if n not in ("time", "samples_per_second", "data_wait")} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    """Two runs have the same weights, running statistics, losses and samples, to the bit."""
    names = differing(final_weights(one), final_weights(other))
    assert not names, f"{one.name} and {other.name} differ in {names}"
    a, b = losses(one), losses(other)
    assert a == b, f"{one.name} logged\n{a}\n{other.name}\n{b}"
    first, second = read_ledger(one / "ledger"), read_ledger(other / "ledger")
    different = [step for step in first | second if first.get(step) != second.get(step)]
    assert not different, f"{one.name} and {other.name} had other samples in steps {different}"
    for step, keys in first.items():
        assert len(set(keys)) == len(keys), f"{one.name} had a sample twice in step {step}"
