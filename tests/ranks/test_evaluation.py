"""Evaluation is exact at every world size: the metric of one process, each sample once, and no hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from disttrain import ClassificationTask, ParallelConfig, ShardedDataModule, Trainer
from disttrain.models import MLP
from tests.support.features import write_features
from tests.support.ranks import run_cli, run_ranks

SIZES = (1, 2, 3, 7, 16, 33)
FIELDS = {"features": "features.npy", "label": "cls"}


def evaluate(shards: dict[int, str], out: str, strategy: str) -> None:
    """Validate a fixed model on data of several sizes; rank 0 writes the metrics."""
    results = {}
    for size, path in shards.items():
        torch.manual_seed(0)
        task = ClassificationTask(MLP(6, hidden=[8], out_features=3), num_classes=3, input="features")
        data = ShardedDataModule(val=path, fields=FIELDS, micro_batch_size=4)
        parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
        trainer = Trainer(run_dir=str(Path(out).parent / "run"), progress_bar=False, parallel=parallel)
        trainer.validate(task, datamodule=data, verbose=False)
        results[size] = dict(task.last_evaluation)
        if trainer.is_global_zero:
            Path(out).write_text(json.dumps(results))


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_metrics_are_those_of_one_process(tmp_path: Path, strategy: str) -> None:
    shards = {size: write_features(tmp_path, f"val-{size}", size) for size in SIZES}
    results = {}
    for ranks in (1, 2, 3, 4):
        out = tmp_path / f"{ranks}.json"
        run_ranks(ranks, evaluate, shards, str(out), strategy, folder=tmp_path / f"logs-{ranks}").ok()
        results[ranks] = json.loads(out.read_text())
    for ranks in (2, 3, 4):
        assert results[ranks] == results[1], f"{ranks} ranks differ from one"
    assert set(results[1]["7"]) == {"val/loss", "val/accuracy", "val/f1"}


def test_metrics_are_those_computed_by_hand(tmp_path: Path) -> None:
    path = write_features(tmp_path, "val", 33)
    out = tmp_path / "out.json"
    run_ranks(2, evaluate, {33: path}, str(out), "ddp", folder=tmp_path / "logs").ok()
    measured = json.loads(out.read_text())["33"]

    torch.manual_seed(0)
    model = MLP(6, hidden=[8], out_features=3).eval()
    data = ShardedDataModule(val=path, fields=FIELDS, micro_batch_size=33)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    logits = model(batch["features"])
    loss = torch.nn.functional.cross_entropy(logits, batch["label"])
    accuracy = (logits.argmax(1) == batch["label"]).double().mean()
    assert measured["val/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert measured["val/accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)


def test_predictions_are_written_once_a_sample_in_order(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = [
        *("--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
    ]
    short = ["--trainer.max_steps", "5", "--model.schedule.name", "constant"]
    run_cli(2, ["fit", *common, *short], folder=tmp_path / "fit").ok()

    texts = {}
    for ranks in (1, 3):
        output = tmp_path / f"predictions-{ranks}.jsonl"
        run_cli(ranks, ["predict", *common, "--output", str(output)], folder=tmp_path / f"predict-{ranks}").ok()
        texts[ranks] = output.read_text()
    keys = [json.loads(line)["key"] for line in texts[1].splitlines()]
    data = ShardedDataModule(test=str(digits / "test.json"))
    data.setup("test")
    reader = data.reader("test")
    assert keys == reader.keys(torch.arange(len(reader.index)).numpy())
    assert texts[1] == texts[3], "predictions differ between 1 and 3 ranks"

    outcome = run_cli(2, ["test", *common, "--checkpoint_path", "last"], folder=tmp_path / "test").ok()
    recorded = json.loads((run_dir / "run.json").read_text())["result"]
    for name, value in recorded.items():
        assert f"{name}" in outcome.text
        assert f"{value:.6f}" in outcome.text, f"{name} was {value:.6f} after training\n{outcome.text}"
