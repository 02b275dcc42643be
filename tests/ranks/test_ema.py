"""Averaged weights: the same bits in all layouts, evaluated, saved and resumed; training does not notice them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from disttrain import EMA, Checkpointing, OptimizerConfig, ParallelConfig, Trainer
from disttrain.checkpoint.format.reader import committed, read_meta, read_model
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli, run_ranks
from tests.support.sameness import MicroBatches, MLPTask, TransformerTask
from tests.support.weights import differing, whole_weights

STEPS, MICRO_BATCHES, DECAY = 8, 4, 0.7
LAYOUTS = {
    "ddp1": (1, ParallelConfig(reduction="tree")),
    "ddp2": (2, ParallelConfig(reduction="tree")),
    "fsdp2": (2, ParallelConfig(strategy="fsdp", reduction="tree")),
    "fsdp2-gathered": (2, ParallelConfig(strategy="fsdp", reduction="tree", reshard_after_forward=False)),
    "fsdp4": (4, ParallelConfig(strategy="fsdp", reduction="tree")),
    "hsdp4": (4, ParallelConfig(strategy="fsdp", reduction="tree", replicate=2)),
}


class Tied(TransformerTask):
    """An output layer that is the embedding under another name, and a part that is frozen."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.05))
        self.output = self.model.embedding
        self.model.norm.requires_grad_(False)


class Watch(Callback):
    """Stands before EMA: writes each step's whole weights, and saves checkpoints where the averages are swapped in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, [Tensor()]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.kept = shards(pl_module)
            self.write(trainer)
            if trainer.global_step == 4:
                trainer.save_checkpoint(self.folder / "step-4")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"batch-{trainer.global_step}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"end-{trainer.global_step}")

    def write(self, trainer: pl.Trainer) -> None:
        whole = whole_weights(trainer)
        if trainer.is_global_zero:
            torch.save(whole, self.folder / f"{trainer.global_step}.pt")


def shards(module: torch.nn.Module) -> list[Tensor]:
    """Copies of what this rank holds of the parameters."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return [tensor.detach().clone() for tensor in local]


def trainer_of(folder: Path, parallel: ParallelConfig, *callbacks: Callback, **settings: Any) -> Trainer:
    trainer = Trainer(
        run_dir=str(folder),
        parallel=parallel,
        seed=5,
        progress_bar=False,
        callbacks=[*callbacks, Checkpointing()],
        **{"max_steps": STEPS, "validate_every_steps": 4, **settings},
    )
    trainer.accumulate_grad_batches = MICRO_BATCHES // trainer.world_size
    return trainer


def batches(trainer: Trainer, steps: int = STEPS) -> MicroBatches:
    accumulation = trainer.accumulate_grad_batches
    return MicroBatches(trainer.global_rank, accumulation, micro_batches=MICRO_BATCHES, steps=steps)


def train_in(folder: str, parallel: ParallelConfig, averaged: bool, watched: bool) -> None:
    """Train with validations, under the watch of a callback that comes before EMA."""
    callbacks: list[Callback] = [Watch(Path(folder))] if watched else []
    if averaged:
        callbacks.append(EMA(decay=DECAY))
    trainer = trainer_of(Path(folder), parallel, *callbacks)
    trainer.fit(Tied(), train_dataloaders=batches(trainer), val_dataloaders=batches(trainer, 1))
    if trainer.is_global_zero:
        torch.save(trainer.callback_metrics["val/loss"], Path(folder) / "val-loss.pt")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Train in a layout, once a module; gives the run's folder."""
    root = tmp_path_factory.mktemp("ema")

    @cache
    def run(layout: str, averaged: bool = True, watched: bool = True) -> Path:
        ranks, parallel = LAYOUTS[layout]
        folder = root / f"{layout}-{averaged}-{watched}"
        run_ranks(ranks, train_in, str(folder), parallel, averaged, watched, folder=folder).ok()
        return folder

    return run


def last(folder: Path) -> Path:
    """A run's newest checkpoint."""
    return committed(folder / "checkpoints")[0][-1].path


def test_the_averages_are_those_of_the_formula(train) -> None:  # type: ignore[no-untyped-def]
    """Whole tensors, step by step, in this process; the checkpoint holds the trained parameters' alone."""
    folder = train("ddp1")
    weights = [torch.load(folder / f"{step}.pt", weights_only=True) for step in range(STEPS + 1)]
    averages = read_model(last(folder), group="ema")
    trained = [name for name, p in Tied().named_parameters() if p.requires_grad]
    assert list(averages) == trained
    for name in trained:
        expected = weights[0][name]
        for update, step in enumerate(weights[1:]):
            expected = torch.lerp(expected, step[name], 1 - min(DECAY, (1 + update) / (10 + update)))
        assert torch.equal(averages[name], expected), f"{name}: {(averages[name] - expected).abs().max()} apart"
        assert not torch.equal(averages[name], weights[-1][name]), f"{name} did not move: the test shows nothing"
    about = read_meta(last(folder))["tensor_groups"]["ema"]
    assert about == {"evaluated": True, "names": trained, "state": {"updates": STEPS}}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "fsdp4", "hsdp4")]


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2-gathered", *SLOW])
def test_the_same_bits_in_all_layouts(train, layout: str) -> None:  # type: ignore[no-untyped-def]
    alone, folder = train("ddp1"), train(layout)
    for group in ("model", "ema"):
        names = differing(read_model(last(alone), group=group), read_model(last(folder), group=group))
        assert not names, f"{group}: not equal bit by bit: {names}"
    losses = [torch.load(run / "val-loss.pt", weights_only=True) for run in (alone, folder)]
    assert losses[0] == losses[1], f"validation losses {losses}"


@pytest.mark.parametrize("layout", [pytest.param("ddp1", marks=pytest.mark.slow), "fsdp2-gathered"])
def test_training_does_not_notice(train, layout: str) -> None:  # type: ignore[no-untyped-def]
    """Nor where FSDP keeps gathered weights after a forward pass; saving would reshard them."""
    without, folder = (train(layout, averaged=averaged, watched=False) for averaged in (False, True))
    assert not differing(read_model(last(without)), read_model(last(folder)))
    losses = [float(torch.load(run / "val-loss.pt", weights_only=True)) for run in (without, folder)]
    assert losses[0] != losses[1], "the averages were not what was evaluated"


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2-gathered"])
def test_checkpoints_hold_the_training_weights_whoever_saves_them(train, layout: str) -> None:  # type: ignore[no-untyped-def]
    """Before the update of a step, in the midst of a validation, and at its end, ahead of EMA's own hooks."""
    folder = train(layout)
    weights = torch.load(folder / "4.pt", weights_only=True)
    averages = read_model(folder / "step-4", group="ema")
    for name in ("step-4", "batch-4", "end-4"):
        assert not differing(weights, read_model(folder / name)), name
        assert not differing(averages, read_model(folder / name, group="ema")), name
        assert read_meta(folder / name)["tensor_groups"]["ema"]["state"] == {"updates": 4}


def evaluate_in(checkpoint: str, folder: str) -> None:
    loss = torch.load(Path(checkpoint).parents[1] / "val-loss.pt", weights_only=True)
    found = []
    for number, callbacks in enumerate(([], [EMA()], [EMA(evaluate=False)])):
        trainer = trainer_of(Path(folder) / str(number), LAYOUTS["fsdp2"][1], *callbacks)
        trainer.validate(Tied(), batches(trainer, 1), ckpt_path=checkpoint, verbose=False)
        found.append(bool(trainer.callback_metrics["val/loss"] == loss))
    assert found == [True, True, False]


def test_loading_for_evaluation_gives_the_averages(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of tied parameters too, and whether the callback is there or not, unless it says otherwise."""
    run_ranks(2, evaluate_in, str(last(train("ddp1"))), str(tmp_path), folder=tmp_path).ok()


class Fails(MLPTask):
    """Fails in its second validation, after a forward pass."""

    validations = 0

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.validations += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.validations == 3:  # the first was the sanity check
            assert any(not torch.equal(a, b) for a, b in zip(shards(self), self.watch.kept, strict=True))
            raise ArithmeticError("as planned")


def fail_in(folder: str, parallel: ParallelConfig) -> None:
    watch = Watch(Path(folder))
    task = Fails(OptimizerConfig(lr=1e-2))
    task.watch = watch  # type: ignore[assignment]
    trainer = trainer_of(Path(folder), parallel, watch, EMA(decay=DECAY))
    with pytest.raises(ArithmeticError, match="as planned"):
        trainer.fit(task, train_dataloaders=batches(trainer), val_dataloaders=batches(trainer, 1))
    assert trainer.global_step == STEPS
    for mine, kept in zip(shards(task), watch.kept, strict=True):
        assert torch.equal(mine, kept), "the training weights did not come back"


@pytest.mark.parametrize("layout", ["ddp1", "ddp2", "fsdp2"])
def test_training_weights_come_back_after_an_exception(layout: str, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    run_ranks(ranks, fail_in, str(tmp_path), parallel, folder=tmp_path).ok()


def command(name: str, run_dir: Path, data: Path, *more: str) -> list[str]:
    return [
        *(name, "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16", "--trainer.max_steps", "24"),
        *more,
    ]


def averaging(decay: float = 0.9) -> list[str]:
    return ["--trainer.callbacks+=disttrain.EMA", f"--trainer.callbacks.decay={decay}"]


def fit(run_dir: Path, data: Path, ranks: int, strategy: str, *more: str, kill: int | None = None) -> None:
    """Train digits with averages; a checkpoint every 4 steps, a validation every 6."""
    arguments = [
        *("--trainer.parallel.strategy", strategy, "--trainer.parallel.reduction", "tree"),
        *(
            "--checkpoint.every_steps",
            "4",
            "--checkpoint.save",
            "sync",
            "--trainer.validate_every_steps",
            "6",
            *averaging(),
            *more,
        ),
    ]
    if kill is not None:
        arguments += ["--trainer.callbacks+=tests.support.callbacks.KillAt", f"--trainer.callbacks.step={kill}"]
    outcome = run_cli(ranks, command("fit", run_dir, data, *arguments), folder=run_dir.parent / "logs")
    assert outcome.codes == [0 if kill is None else -9] * ranks, outcome.text


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["true", "false"])
def test_killed_resumed_elsewhere_and_evaluated(digits: Path, tmp_path: Path, restore: str) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    best = ("--early_stopping.restore_best", restore)
    fit(whole, digits, 2, "fsdp", *best)
    fit(moved, digits, 2, "ddp", *best, kill=10)
    fit(moved, digits, 4, "fsdp", *best, kill=17)
    fit(moved, digits, 1, "ddp", *best)
    assert [attempt["from_step"] for attempt in read_run(moved)["attempts"]] == [0, 8, 16]
    for group in ("model", "ema"):
        assert not differing(read_model(last(whole), group=group), read_model(last(moved), group=group)), group
    assert read_run(moved)["result"] == read_run(whole)["result"]
    assert read_run(moved)["best"] == read_run(whole)["best"]

    # The commands evaluate the averages that were validated and tested in training, with the callback and without.
    record = read_run(whole)
    chosen = ("--checkpoint_path", "best" if restore == "true" else "last")
    for callbacks in ([], averaging()):
        text = run_cli(1, command("test", whole, digits, *chosen, *callbacks), folder=tmp_path / "t").ok().text
        for name, value in record["result"].items():
            assert f"{value:.6f}" in text, f"{name} was {value:.6f} after training\n{text}"
        text = run_cli(2, command("validate", whole, digits, *callbacks), folder=tmp_path / "v").ok().text
        assert f"{record['best']['value']:.6f}" in text, f"best was {record['best']}\n{text}"
    text = run_cli(1, command("predict", whole, digits), folder=tmp_path / "p").ok().text
    assert "predictions were made with the averaged weights" in text
    unaveraged = ["--trainer.callbacks+=disttrain.EMA", "--trainer.callbacks.evaluate=false"]
    text = run_cli(1, command("validate", whole, digits, *unaveraged), folder=tmp_path / "u").ok().text
    assert f"{record['best']['value']:.6f}" not in text, "the training weights were asked for"
