"""Options of ``trainer.parallel`` on real ranks: copies of a sharded model (HSDP), gradients that travel in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing, distance, final_weights

STEPS = 24
SGD = "{name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 1.0e-4}"


def fit(run_dir: Path, data: Path, ranks: int, parallel: str, *more: str) -> Outcome:
    """Train digits with gradient descent; a checkpoint every 4 steps."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "48", "--data.micro_batch_size", "12", "--model.optimizer", SGD),
        *(
            "--trainer.max_steps",
            str(STEPS),
            "--trainer.parallel",
            parallel,
            "--checkpoint.every_steps",
            "4",
            "--checkpoint.save",
            "sync",
        ),
        *("--early_stopping.restore_best", "false"),
        *more,
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("layouts") / "alone"
    fit(run_dir, digits, 1, "{strategy: ddp}").ok()
    return run_dir


@pytest.mark.parametrize(
    "parallel",
    [
        "{strategy: fsdp, replicate: 2}",
        pytest.param("{strategy: fsdp, replicate: -1, shard: 2}", marks=pytest.mark.slow),
    ],
)
def test_copies_of_a_sharded_model_train_as_one_process(
    digits: Path, tmp_path: Path, alone: Path, parallel: str
) -> None:
    fit(tmp_path / "run", digits, 4, parallel).ok()
    apart = distance(final_weights(alone), final_weights(tmp_path / "run"))
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"


@pytest.mark.slow
def test_checkpoints_of_copies_load_in_other_layouts(digits: Path, tmp_path: Path, alone: Path) -> None:
    moved = tmp_path / "moved"
    fit(moved, digits, 4, "{strategy: fsdp, replicate: 2}", *killed_at(9))
    fit(moved, digits, 2, "{strategy: ddp}", *killed_at(14))
    fit(moved, digits, 4, "{strategy: fsdp, shard: 2, replicate: 2}", *killed_at(18))
    fit(moved, digits, 1, "{strategy: fsdp}").ok()
    assert [attempt["from_step"] for attempt in read_run(moved)["attempts"]] == [0, 8, 12, 16]
    apart = distance(final_weights(alone), final_weights(moved))
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"


@pytest.mark.slow
def test_a_killed_run_of_copies_resumes_with_the_same_bits(digits: Path, tmp_path: Path) -> None:
    copies = "{strategy: fsdp, replicate: 2}"
    fit(tmp_path / "whole", digits, 4, copies).ok()
    fit(tmp_path / "killed", digits, 4, copies, *killed_at(11))
    fit(tmp_path / "killed", digits, 4, copies).ok()
    assert read_run(tmp_path / "killed")["attempts"][-1]["from_step"] == 8
    assert not differing(final_weights(tmp_path / "whole"), final_weights(tmp_path / "killed"))


def test_degrees_that_do_not_fit_the_ranks_are_one_clear_error(digits: Path, tmp_path: Path) -> None:
    outcome = fit(tmp_path / "run", digits, 4, "{strategy: fsdp, replicate: 3}")
    assert outcome.codes[0] == 2, outcome.text
    assert "parallel.replicate 3 x parallel.shard -1 does not equal 4 ranks" in outcome.text
    assert "use replicate x shard of 2 x 2 or 1 x 4" in outcome.text
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, "strategy: ddp"),
        (2, "strategy: fsdp"),
        pytest.param(4, "strategy: fsdp, replicate: 2", marks=pytest.mark.slow),
    ],
)
def test_gradients_that_travel_in_bf16_are_rounded_and_no_more(
    digits: Path, tmp_path: Path, alone: Path, ranks: int, parallel: str
) -> None:
    fit(tmp_path / "run", digits, ranks, f"{{{parallel}, reduce_dtype: bf16}}").ok()
    apart = distance(final_weights(alone), final_weights(tmp_path / "run"))
    assert 1e-5 < apart < 5e-3, f"weights are {apart:.2e} apart"
