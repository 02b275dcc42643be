"""Bad samples under real ranks: masked without a trace in the gradient, counted, recorded, and bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from webdataset.writer import TarWriter

from disttrain import (
    Checkpointing,
    ClassificationTask,
    HooksConfig,
    OptimizerConfig,
    ParallelConfig,
    ShardedDataModule,
    Trainer,
)
from disttrain.callbacks.bad_sample_report import quarantined
from disttrain.models import MLP
from disttrain.report import write_report
from disttrain.run.folder import read_run
from tests.support.callbacks import KillAt
from tests.support.features import write_features
from tests.support.hooks import weigh_and_filter
from tests.support.ranks import run_ranks
from tests.support.shards import tar_samples

FIELDS = {"features": "features.npy", "label": "cls"}
BAD = (3, 4, 10, 17, 21)
TOTAL = 24


def write_damaged(folder: Path, bad: tuple[int, ...] = BAD) -> tuple[str, str]:
    """Two shards of the same samples: one with some damaged, one without those."""
    samples = tar_samples([write_features(folder, "whole", TOTAL)])
    damaged, good = folder / "damaged.tar", folder / "good.tar"
    with TarWriter(str(damaged), encoder=False) as writer, TarWriter(str(good), encoder=False) as other:
        for number, (key, fields) in enumerate(samples):
            is_bad = number in bad
            # No number, or none of the classes.
            writer.write({"__key__": key, **fields, **({"cls": b"none" if number % 2 else b"7"} if is_bad else {})})
            if not is_bad:
                other.write({"__key__": key, **fields})
    return str(damaged), str(good)


def train(
    shard: str,
    global_batch_size: int,
    micro_batch_size: int,
    strategy: str,
    run_dir: str,
    budget: int,
    hooks: HooksConfig | None = None,
    kill: int = 0,
) -> None:
    """Two epochs by plain SGD, then a test. Rank 0 saves the weights.

    With ``kill`` it ends there, sums seldom, saves every fourth step and resumes.
    """
    torch.manual_seed(0)
    task = ClassificationTask(
        MLP(6, hidden=[8], out_features=3, dropout=0.0),
        num_classes=3,
        input="features",
        optimizer=OptimizerConfig(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0),
    )
    data = ShardedDataModule(
        train=shard,
        val=shard,
        test=shard,
        fields=FIELDS,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        on_bad_sample="skip",
        max_bad_samples=budget,
        hooks=hooks,
    )
    parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    trainer = Trainer(
        run_dir=run_dir,
        max_epochs=2,
        log_every_steps=50 if kill else 1,
        progress_bar=False,
        parallel=parallel,
        callbacks=[Checkpointing(every_steps=4, save="sync"), KillAt(kill)] if kill else [],
    )
    start = trainer.find_start("auto")
    trainer.fit(task, datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in task.state_dict().items()
    }
    trainer.test(task, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        torch.save((weights, dict(task.last_evaluation)), Path(run_dir) / "out.pt")


def run(tmp_path: Path, name: str, ranks: int, *arguments: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    run_dir = tmp_path / name
    run_ranks(ranks, train, *arguments, str(run_dir), 5, folder=tmp_path / f"logs-{name}").ok()
    weights, metrics = torch.load(run_dir / "out.pt", weights_only=True)
    return weights, metrics


@pytest.mark.parametrize(("ranks", "micro", "strategy"), [(1, 24, "ddp"), (2, 4, "ddp"), (3, 8, "ddp"), (2, 3, "fsdp")])
def test_training_and_metrics_are_those_of_the_good_samples(
    tmp_path: Path, ranks: int, micro: int, strategy: str
) -> None:
    damaged, good = write_damaged(tmp_path)
    expected, metrics = run(tmp_path, "good", 1, good, TOTAL - len(BAD), TOTAL - len(BAD), "ddp")
    weights, found = run(tmp_path, "damaged", ranks, damaged, TOTAL, micro, strategy)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-6), f"{name} differs"
    assert found == pytest.approx(metrics, abs=1e-6)
    listed = sorted(line["key"] for line in quarantined(tmp_path / "damaged"))
    assert listed == [f"whole-{number:04d}" for number in BAD]


def test_skipped_samples_are_counted_in_log_record_and_report(tmp_path: Path) -> None:
    damaged, _ = write_damaged(tmp_path)
    run(tmp_path, "run", 2, damaged, TOTAL, 6, "ddp")
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert record["bad_samples"] == 2 * len(BAD), "each epoch meets them once"
    assert any("bad samples were met and skipped 10 times" in event["text"] for event in record["events"])
    assert "train/bad_samples" in (folder / "metrics.csv").read_text()
    page = write_report([folder]).read_text()
    assert "bad samples skipped" in page
    lines = list(quarantined(folder))
    assert {"shard", "key", "field", "offset", "reason", "split", "epoch", "step"} <= set(lines[0])
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["whole-0003"].startswith("field 'label' (cls): not a class number: b'none'")
    assert reasons["whole-0004"].startswith("field 'label' (cls): 7 is not one of the 3 classes 0 to 2")


def test_a_budget_ends_all_ranks_at_one_step_with_one_error(tmp_path: Path) -> None:
    damaged, _ = write_damaged(tmp_path)
    said = []
    for ranks in (1, 3):
        folder = tmp_path / f"run-{ranks}"
        outcome = run_ranks(ranks, train, damaged, 6, 2, "ddp", str(folder), 2, folder=tmp_path / f"logs-{ranks}")
        assert outcome.codes == [1] * ranks, outcome.text
        assert sum("RankError" in text for text in outcome.outputs) == ranks - 1, outcome.text
        found = {re.findall(r"(\d) bad samples in one pass over data.train, more than", t)[-1] for t in outcome.outputs}
        said.append((found, (folder / "metrics.csv").read_text().count("\n")))
    assert said[0] == said[1], "another count, or another step, on 3 ranks than on 1"
    assert said[0][0] <= {"3", "4", "5"}


@pytest.mark.parametrize(("ranks", "micro", "strategy"), [(2, 4, "ddp"), (2, 3, "fsdp")])
def test_weighted_and_filtered_samples_train_as_their_weighted_mean(
    tmp_path: Path, ranks: int, micro: int, strategy: str
) -> None:
    """A weight of 2 is that of two equal samples, one of 0 that of none, and what is filtered is not there at all."""
    samples = tar_samples([write_features(tmp_path, "whole", TOTAL)])
    written = tmp_path / "repeated.tar"
    count = 0
    with TarWriter(str(written), encoder=False) as writer:
        for number, (key, fields) in enumerate(samples):
            for copy in range(0 if number % 5 == 0 else number % 3):
                writer.write({"__key__": f"{key}-{copy}", **fields})
                count += 1
    expected, metrics = run(tmp_path, "repeated", 1, str(written), count, count, "ddp")
    run_dir = tmp_path / "weighted"
    arguments = (str(tmp_path / "whole.tar"), TOTAL, micro, strategy, str(run_dir), 0)
    hooks = HooksConfig(weigh_and_filter, weight="weight")
    run_ranks(ranks, train, *arguments, hooks, folder=tmp_path / "logs").ok()
    weights, found = torch.load(run_dir / "out.pt", weights_only=True)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-6), f"{name} differs"
    assert found["test/loss"] == pytest.approx(metrics["test/loss"], abs=1e-6)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["filtered_samples"] == 2 * 5, "each epoch meets them once"
    assert "bad_samples" not in record


def test_samples_that_were_filtered_before_a_checkpoint_count_after_a_resume(tmp_path: Path) -> None:
    shard = write_features(tmp_path, "whole", TOTAL)
    hooks = HooksConfig(weigh_and_filter, weight="weight")
    for kill in (6, 99):
        arguments = (shard, 2, 1, "ddp", str(tmp_path / "run"), 0, hooks, kill)
        outcome = run_ranks(2, train, *arguments, folder=tmp_path / f"logs-{kill}")
        assert outcome.codes == ([-9, -9] if kill == 6 else [0, 0]), outcome.text
    assert read_run(tmp_path / "run")["attempts"][-1]["from_step"] == 4
    assert read_run(tmp_path / "run")["filtered_samples"] == 2 * 5
