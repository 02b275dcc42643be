"""``meta_init``: the same initial bits in every layout, through training, kills and the command line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from disttrain import OptimizerConfig, ParallelConfig, Trainer
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli, run_ranks
from tests.support.sameness import TASKS, MicroBatches
from tests.support.weights import differing, distance, final_weights, whole_weights

LAYOUTS = [
    (1, ParallelConfig(strategy="fsdp", meta_init=True)),
    (2, ParallelConfig(strategy="ddp", meta_init=True)),
    (2, ParallelConfig(strategy="fsdp", meta_init=True)),
    (4, ParallelConfig(strategy="fsdp", meta_init=True)),
    (4, ParallelConfig(strategy="fsdp", replicate=2, meta_init=True)),
]


def start_in(out: str, ranks: int, parallel: ParallelConfig, task: str, precision: str) -> None:
    """Train one step with a learning rate of nearly nothing; rank 0 writes the weights that it began with."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=1,
        parallel=parallel,
        precision=precision,  # type: ignore[arg-type]
        seed=5,
        progress_bar=False,
    )
    found: dict[str, torch.Tensor] = {}

    class Watched(TASKS[task]):  # type: ignore[misc]
        def on_train_start(self) -> None:
            found.update(whole_weights(trainer))

    torch.manual_seed(trainer.global_rank)  # must not matter
    with torch.device("meta"):
        model = Watched(OptimizerConfig(name="sgd", lr=0.1))
    trainer.accumulate_grad_batches = 4 // ranks
    batches = MicroBatches(trainer.global_rank, 4 // ranks, micro_batches=4, steps=1)
    trainer.fit(model, train_dataloaders=batches)
    if trainer.is_global_zero:
        torch.save(found, out)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The initial weights of a task in a layout, once a module."""
    folder = tmp_path_factory.mktemp("meta")

    @cache
    def run(ranks: int, parallel: ParallelConfig, task: str, precision: str = "32-true") -> dict[str, torch.Tensor]:
        out = folder / f"{task}-{ranks}-{parallel.strategy}-{parallel.replicate}-{precision}.pt"
        run_ranks(ranks, start_in, str(out), ranks, parallel, task, precision, folder=folder / f"{out.stem}-logs").ok()
        found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return found

    return run


@pytest.mark.parametrize(
    ("task", "ranks", "parallel"), [("mlp", *LAYOUTS[-2]), *(("transformer", *layout) for layout in LAYOUTS)]
)
def test_every_layout_starts_with_the_same_bits(start, task: str, ranks: int, parallel: ParallelConfig) -> None:  # type: ignore[no-untyped-def]
    alone = start(1, ParallelConfig(meta_init=True), task)
    assert not differing(alone, start(ranks, parallel, task))
    assert sum(float(t.std()) > 0 for t in alone.values() if t.numel() > 1) > 2, "nothing was drawn"


def test_half_precision_starts_with_the_rounded_bits(start) -> None:  # type: ignore[no-untyped-def]
    alone = start(1, ParallelConfig(meta_init=True), "transformer")
    for strategy in ("ddp", "fsdp"):
        got = start(2, ParallelConfig(strategy=strategy, meta_init=True), "transformer", "bf16-true")
        assert not differing({name: t.to(torch.bfloat16) for name, t in alone.items()}, got)


@pytest.mark.slow
def test_a_recipe_trains_is_killed_and_resumed_in_other_layouts(digits: Path, tmp_path: Path) -> None:
    def fit(run_dir: Path, ranks: int, strategy: str, *more: str) -> None:
        arguments = [
            *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--data.micro_batch_size", "16", "--trainer.max_steps", "24", "--checkpoint.every_steps", "4"),
            *("--checkpoint.save", "sync"),
            *("--trainer.parallel.strategy", strategy, "--trainer.parallel.meta_init", "true"),
            *("--early_stopping.restore_best", "false", "--model.optimizer", "{name: sgd, lr: 0.05}", *more),
        ]
        run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")

    fit(tmp_path / "whole", 1, "ddp")
    killed = ["--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=6"]
    fit(tmp_path / "moved", 2, "fsdp", *killed, "--trainer.callbacks.micro_batch=0")
    fit(tmp_path / "moved", 2, "ddp")
    assert [attempt["from_step"] for attempt in read_run(tmp_path / "moved")["attempts"]] == [0, 4]
    apart = distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / "moved"))
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"
    table = run_cli(
        2,
        [
            *("test", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(tmp_path / "moved")),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--trainer.parallel", "{strategy: fsdp, meta_init: true}", "--checkpoint_path", "last"),
        ],
        folder=tmp_path / "test",
    ).ok()
    result = read_run(tmp_path / "moved")["result"]
    assert f"{result['test/accuracy']:.6f}" in table.text, table.text
