"""Modules that know nothing of disttrain: by hand, with thawed layers, through their layers; in every layout alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from disttrain import Checkpointing, ParallelConfig
from disttrain.errors import DisttrainError
from tests.support import foreign
from tests.support.ranks import run_ranks

GLOBAL, SAMPLES, EPOCHS = 8, 48, 2
BOUND = 2e-6


def loader(trainer: Any) -> DataLoader[Any]:
    """Every rank's part of the same global batches."""
    size, numbers = trainer.world_size, foreign.Numbers(SAMPLES)
    sampler = DistributedSampler(numbers, num_replicas=size, rank=trainer.global_rank, shuffle=True, seed=2)
    return DataLoader(numbers, batch_size=GLOBAL // size, sampler=sampler)


CASES: dict[str, tuple[type[foreign.Plain], Any]] = {
    "plain": (foreign.Plain, None),
    "thawed": (foreign.Plain, foreign.Thaw),
    "frozen": (foreign.Plain, foreign.Freeze),
    "resumed": (foreign.Plain, None),  # of one rank's, where the backbone was frozen
    "by hand": (foreign.ByHand, None),
    "two backwards": (foreign.TwoBackwards, None),
    "adversaries": (foreign.Adversaries, None),
}
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "ddp": (2, ParallelConfig()),
    "fsdp": (2, ParallelConfig(strategy="fsdp")),
    "kept": (2, ParallelConfig(strategy="fsdp", reshard_after_forward=False)),
    "tree": (2, ParallelConfig(reduction="tree")),
    "fsdp tree": (2, ParallelConfig(strategy="fsdp", reduction="tree")),
    "one fsdp": (1, ParallelConfig(strategy="fsdp")),
}


def by_hand(case: str) -> bool:
    return CASES[case][0] is not foreign.Plain


def train_in(folder: str, layout: str, one: str = "") -> None:
    """All cases, one after the other; rank 0 writes the weights, every rank checks that they are all ranks'."""
    warnings.simplefilter("ignore")
    for case, (kind, callback) in CASES.items():
        parallel = LAYOUTS[layout][1] if layout != "one" else ParallelConfig()
        if by_hand(case) and parallel.reduction == "tree":
            continue
        if case == "adversaries" and parallel.strategy == "ddp":
            parallel = ParallelConfig(find_unused_parameters=True)
        run = Path(folder) / layout / case
        callbacks = [Checkpointing(every_steps=3, keep_last=9), *([callback()] if callback else [])]
        trainer = foreign.trainer_of(run, *callbacks, parallel=parallel, max_epochs=EPOCHS)
        module, start = kind(), None
        if case == "resumed":
            start = trainer.find_start(str(Path(one or folder) / "one/frozen/checkpoints/step-00000009")).checkpoint
        trainer.fit(module, loader(trainer), ckpt_path=start)
        assert trainer.global_step == EPOCHS * SAMPLES // GLOBAL, f"{case}: {trainer.global_step} steps"
        weights = foreign.whole(module)
        if trainer.world_size > 1:
            told = [torch.empty_like(weights) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(told, weights)
            assert all(torch.equal(told[0], other) for other in told), f"{layout}, {case}: the ranks drifted apart"
        if trainer.is_global_zero:
            torch.save(weights, Path(folder) / f"{layout}-{case}.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of one rank."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(1, train_in, str(folder), "one", folder=folder / "logs").ok()
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "ddp",
        "fsdp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("kept", "tree", "fsdp tree", "one fsdp")),
    ],
)
def test_every_layout_trains_alike(tmp_path: Path, one: Path, layout: str) -> None:
    run_ranks(LAYOUTS[layout][0], train_in, str(tmp_path), layout, str(one), folder=tmp_path / "logs").ok()
    for case in CASES:
        if by_hand(case) and "tree" in layout:
            continue
        alone, here = torch.load(one / f"one-{case}.pt"), torch.load(tmp_path / f"{layout}-{case}.pt")
        assert float((alone - foreign.whole(CASES[case][0]())).abs().max()) > 0.05, f"{case}: nothing was trained"
        assert float((alone - here).abs().max()) < BOUND, f"{layout}, {case}: {float((alone - here).abs().max())}"


def refuse_in(folder: str) -> None:
    """What would let the ranks drift apart, or train nothing."""
    warnings.simplefilter("ignore")
    for strategy in ("ddp", "fsdp"):
        parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
        cases: list[tuple[Any, str]] = [
            (foreign.Backward(), r"Backward calls loss.backward\(\), whose gradients"),
            (foreign.Own(), r"SGD holds a parameter of shape \(3, 3\) that does not belong to"),
        ]
        if strategy == "ddp":
            cases += [
                (ThawsLate(), "parameter backbone.0.weight of ThawsLate has a gradient that was not reduced"),
                (Changes(thaw=True), "parameter backbone.0.weight of Changes has a gradient that was not reduced"),
                (Changes(thaw=False), "parameter backbone.0.weight of Changes has a gradient that was not reduced"),
                (foreign.Adversaries(), "parameter head.weight of Adversaries has a gradient that was not reduced"),
                (foreign.HalfByHand(), r"HalfByHand calls loss.backward\(\), whose gradients"),
            ]
        for module, words in cases:
            if isinstance(module, foreign.HalfByHand):
                parallel = ParallelConfig(find_unused_parameters=True)
            trainer = foreign.trainer_of(Path(folder) / strategy, parallel=parallel, max_epochs=1)
            trainer.accumulate_grad_batches = 2 if isinstance(module, Changes) else 1
            with pytest.raises(DisttrainError, match=words):
                trainer.fit(module, loader(trainer))


class ThawsLate(foreign.Plain):
    """Thaws a layer in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.backbone.requires_grad_(True)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Changes(foreign.Plain):
    """Freezes or thaws a layer between two micro batches of a step."""

    def __init__(self, *, thaw: bool) -> None:
        super().__init__()
        self.thaw = thaw
        self.backbone.requires_grad_(not thaw)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.backbone.requires_grad_(self.thaw)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_what_the_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse_in, str(tmp_path), folder=tmp_path / "logs").ok()


@pytest.mark.parametrize("kind", [foreign.ByHand, foreign.Adversaries])
def test_steps_by_hand_are_counted_and_resumed(tmp_path: Path, kind: type[foreign.Plain]) -> None:
    """A global batch is a step, whatever the module does in it: limits, names of checkpoints, the next attempt."""
    modules = []
    for name, limits in (("whole", (10,)), ("resumed", (4, 10))):
        for steps in limits:
            trainer = foreign.trainer_of(
                tmp_path / name, Checkpointing(every_steps=2, keep_last=9), max_steps=steps, log_every_steps=2
            )
            start = foreign.newest(trainer)
            modules.append(kind())
            trainer.fit(modules[-1], loader(trainer), ckpt_path=start)
            assert trainer.global_step == steps
    found = sorted(path.name for path in (tmp_path / "resumed/checkpoints").glob("step-*"))
    assert found == [f"step-{step:08d}" for step in range(2, 11, 2)], found
    assert [*modules[1].seen, *modules[2].seen] == modules[0].seen, "batches were repeated or left out"
    assert torch.equal(foreign.whole(modules[0]), foreign.whole(modules[2]))
