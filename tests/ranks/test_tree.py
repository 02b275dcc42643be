"""``reduction: tree``: the same bits on any number of ranks, under DDP and FSDP."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain import OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli, run_ranks
from tests.support.sameness import TASKS, MicroBatches
from tests.support.weights import final_weights, whole_weights

STEPS = 12
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.05),
}
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"task": "mlp", "optimizer": "sgd", "clip": 0.5},
    "mlp-loose": {"task": "mlp", "optimizer": "adamw", "clip": 1e3},
    "transformer": {"task": "transformer", "optimizer": "adamw", "clip": 0.3},
    "repeated": {"task": "repeated", "optimizer": "sgd", "clip": 0.5},
    "plain": {"task": "plain", "optimizer": "adamw", "clip": 0.3},
    "thawing": {"task": "thawing", "optimizer": "sgd", "clip": 0.5},
    "bf16": {"task": "transformer", "optimizer": "adamw", "clip": 0.3, "precision": "bf16-mixed"},
}


def train_in(out: str, ranks: int, micro_batches: int, parallel: ParallelConfig, case: dict[str, Any]) -> None:
    """Train some steps in a layout; rank 0 writes weights and gradient norms."""
    norms = []

    class Norms(TASKS[case["task"]]):  # type: ignore[misc]
        def configure_gradient_clipping(self, *arguments: Any, **more: Any) -> None:
            super().configure_gradient_clipping(*arguments, **more)
            if case["clip"] is not None:
                norms.append((self if isinstance(self, Task) else self.trainer.strategy).grad_norm.clone())

    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=parallel,
        gradient_clip_norm=case["clip"],
        precision=case.get("precision", "32-true"),
        seed=5,
        progress_bar=False,
    )
    accumulation = micro_batches // ranks
    trainer.accumulate_grad_batches = accumulation
    batches = MicroBatches(trainer.global_rank, accumulation, micro_batches=micro_batches, steps=STEPS)
    trainer.fit(Norms(OPTIMIZERS[case["optimizer"]]), train_dataloaders=batches)
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save({**whole, "norms": torch.stack(norms) if norms else torch.zeros(0)}, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Train a case in a layout, once a module; gives weights and gradient norms."""
    folder = tmp_path_factory.mktemp("tree")

    @cache
    def run(case: str, ranks: int, micro_batches: int, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
        name = f"{case}-{ranks}-{micro_batches}-{parallel.strategy}-{parallel.reduction}-{parallel.replicate}"
        name += f"-{parallel.activation_checkpointing}"
        out = folder / f"{name}.pt"
        arguments = (str(out), ranks, micro_batches, parallel, CASES[case])
        run_ranks(ranks, train_in, *arguments, folder=folder / f"{name}-logs").ok()
        found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return found

    return run


def assert_same_bits(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    """No element of any tensor differs."""
    different = {name: int((expected[name] != got[name]).sum()) for name in expected}
    assert expected.keys() == got.keys()
    assert not any(different.values()), f"elements that differ: {different}"


TREE = {name: ParallelConfig(strategy=name, reduction="tree") for name in ("ddp", "fsdp")}  # type: ignore[arg-type]
LAYOUTS_OF_TWO = [(1, "ddp"), (2, "ddp"), (2, "fsdp")]
LAYOUTS = [(1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]


LATER = [pytest.param(case, marks=pytest.mark.slow) for case in ("mlp-loose", "bf16")]


@pytest.mark.parametrize("case", ["mlp", "transformer", *LATER])
@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_eight_micro_batches_give_the_same_bits(train, case: str, ranks: int, strategy: str) -> None:  # type: ignore[no-untyped-def]
    alone = train(case, 1, 8, TREE["ddp"])
    assert_same_bits(alone, train(case, ranks, 8, TREE[strategy]))
    clipped = alone["norms"] > CASES[case]["clip"]
    assert bool(clipped.any()) == (case != "mlp-loose"), f"norms {alone['norms']}"


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [*(pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS), (3, "ddp"), (3, "fsdp")],
)
def test_twelve_micro_batches_give_the_same_bits(train, ranks: int, strategy: str) -> None:  # type: ignore[no-untyped-def]
    assert_same_bits(train("transformer", 1, 12, TREE["ddp"]), train("transformer", ranks, 12, TREE[strategy]))


@pytest.mark.parametrize("strategy", TREE)
def test_one_micro_batch_a_rank_gives_the_same_bits(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    assert_same_bits(train("mlp", 1, 4, TREE["ddp"]), train("mlp", 4, 4, TREE[strategy]))


@pytest.mark.parametrize("strategy", TREE)
def test_layers_may_be_frozen_and_thawed(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    assert_same_bits(train("thawing", 1, 4, TREE["ddp"]), train("thawing", 2, 4, TREE[strategy]))


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (3, "fsdp")])
def test_any_lightning_module_gives_the_same_bits(train, ranks: int, strategy: str) -> None:  # type: ignore[no-untyped-def]
    alone = train("plain", 1, 12, TREE["ddp"])
    assert bool((alone["norms"] > CASES["plain"]["clip"]).any()), "nothing was clipped"
    assert_same_bits(alone, train("plain", ranks, 12, TREE[strategy]))


@pytest.mark.parametrize("strategy", TREE)
def test_a_block_that_runs_twice_gives_the_same_bits(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    assert_same_bits(train("repeated", 1, 4, TREE["ddp"]), train("repeated", 2, 4, TREE[strategy]))


@pytest.mark.parametrize(
    ("case", "micro_batches"), [("mlp", 8), ("transformer", 12), pytest.param("bf16", 8, marks=pytest.mark.slow)]
)
def test_copies_of_a_sharded_model_give_the_same_bits(train, case: str, micro_batches: int) -> None:  # type: ignore[no-untyped-def]
    copies = ParallelConfig(strategy="fsdp", replicate=2, reduction="tree")
    assert_same_bits(train(case, 1, micro_batches, TREE["ddp"]), train(case, 4, micro_batches, copies))


@pytest.mark.parametrize(
    ("case", "ranks", "strategy", "kind"),
    [
        *((case, *layout, "blocks") for case in ("transformer", "bf16") for layout in LAYOUTS_OF_TWO),
        *(("bf16", *layout, "selective") for layout in LAYOUTS_OF_TWO),
    ],
)
def test_blocks_that_run_again_give_the_same_bits(train, case: str, ranks: int, strategy: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    again = replace(TREE[strategy], activation_checkpointing=kind)  # type: ignore[arg-type]
    assert_same_bits(train(case, 1, 8, TREE["ddp"]), train(case, ranks, 8, again))


def test_the_fast_reduction_does_not(train) -> None:  # type: ignore[no-untyped-def]
    """Else the tests above would show nothing."""
    fast = ParallelConfig()
    a, b = train("mlp", 1, 8, fast), train("mlp", 4, 8, fast)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    tree = train("mlp", 1, 8, TREE["ddp"])
    assert max(float((tree[name] - a[name]).abs().max()) for name in a) < 1e-4, "another gradient than the fast one's"


@pytest.mark.slow
def test_killed_and_resumed_in_other_layouts(digits: Path, tmp_path: Path) -> None:
    """Two DDP ranks, then four of FSDP, then one process: the bits of a run that was never killed."""

    def fit(run_dir: Path, ranks: int, strategy: str, kill: int | None = None) -> None:
        arguments = [
            *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--data.global_batch_size", "64", "--data.micro_batch_size", "16", "--trainer.max_steps", "24"),
            *("--trainer.parallel.strategy", strategy, "--trainer.parallel.reduction", "tree"),
            *("--checkpoint.every_steps", "4", "--checkpoint.save", "sync", "--early_stopping.restore_best", "false"),
        ]
        if kill is not None:
            arguments += ["--trainer.callbacks+=tests.support.callbacks.KillAt", f"--trainer.callbacks.step={kill}"]
            arguments += ["--trainer.callbacks.micro_batch=0"]
        outcome = run_cli(ranks, arguments, folder=tmp_path / "logs")
        assert outcome.codes == [0 if kill is None else -9] * ranks, outcome.text

    fit(tmp_path / "whole", 2, "fsdp")
    moved = tmp_path / "moved"
    fit(moved, 2, "ddp", kill=10)
    fit(moved, 4, "fsdp", kill=18)
    fit(moved, 1, "ddp")
    assert [attempt["from_step"] for attempt in read_run(moved)["attempts"]] == [0, 8, 16]
    assert_same_bits(final_weights(tmp_path / "whole"), final_weights(moved))
    assert read_run(moved)["result"] == read_run(tmp_path / "whole")["result"]
