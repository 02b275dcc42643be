"""A run does not know how many ranks it has: order, weights and metrics over layouts and strategies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli
from tests.support.weights import distance, final_weights

STEPS = 40
OPTIMIZERS = {
    "sgd": ("{name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 1.0e-4}", 1e-6),
    "adamw": ("{name: adamw, lr: 3.0e-3, weight_decay: 0.05}", 1e-5),
}


@pytest.fixture(scope="module")
def train(digits: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Train 40 steps in a layout, once a module; gives the run's folder."""
    folder = tmp_path_factory.mktemp("sameness")

    @cache
    def run(optimizer: str, ranks: int, strategy: str, micro_batch_size: int) -> Path:
        run_dir = folder / f"{optimizer}-{ranks}-{strategy}-{micro_batch_size}"
        arguments = [
            *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--data.global_batch_size", "48", "--data.micro_batch_size", str(micro_batch_size)),
            *("--trainer.max_steps", str(STEPS), "--trainer.parallel.strategy", strategy),
            *("--model.optimizer", OPTIMIZERS[optimizer][0], "--early_stopping.restore_best", "false"),
            "--trainer.callbacks+=disttrain.callbacks.SampleLedger",
        ]
        run_cli(ranks, arguments, folder=run_dir / "logs").ok()
        return run_dir

    return run


# Micro batches of 12 for 1, 2 and 4 ranks (accumulation 4, 2, 1), of 16 for 3 (against accumulation 3).
LAYOUTS = [(ranks, strategy) for ranks in (2, 3, 4) for strategy in ("ddp", "fsdp")]


QUICK = {("sgd", 2, "fsdp"), ("adamw", 4, "ddp")}
CASES = [
    pytest.param(name, *layout, marks=[] if (name, *layout) in QUICK else pytest.mark.slow)
    for name in OPTIMIZERS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("optimizer", "ranks", "strategy"), CASES)
def test_weights_order_and_metrics_do_not_depend_on_the_layout(
    train, optimizer: str, ranks: int, strategy: str
) -> None:  # type: ignore[no-untyped-def]
    size = 16 if ranks == 3 else 12
    alone, together = train(optimizer, 1, "ddp", size), train(optimizer, ranks, strategy, size)

    expected, keys = read_ledger(alone / "ledger"), read_ledger(together / "ledger")
    assert list(keys) == list(range(STEPS))
    different = [step for step in expected if expected[step] != keys[step]]
    assert not different, f"global batches differ at steps {different[:5]}"

    apart = distance(final_weights(alone), final_weights(together))
    assert apart <= OPTIMIZERS[optimizer][1], f"weights are {apart:.2e} apart"

    one, other = read_run(alone)["result"], read_run(together)["result"]
    shown = {name: (f"{one[name]:.4f}", f"{other[name]:.4f}") for name in one}
    assert all(a == b for a, b in shown.values()), f"test metrics differ: {shown}"


def test_one_fsdp_rank_is_one_ddp_rank(train) -> None:  # type: ignore[no-untyped-def]
    apart = distance(
        final_weights(train("sgd", 1, "ddp", 12)),
        final_weights(train("sgd", 1, "fsdp", 12)),
    )
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"
