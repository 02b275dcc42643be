"""Ranks stop at one step, on the exact metric, whatever their own losses; patience survives a resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from disttrain import Checkpointing, EarlyStopping, ShardedDataModule, Trainer
from disttrain.checkpoint.format.reader import committed, read_model
from disttrain.system.reading import read_run
from tests.support.features import write_features
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing


def fit(run_dir: Path, data: Path, ranks: int, *more: str) -> Outcome:
    """Train until the validation loss falls by less than 0.05 in two times five steps."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--model.optimizer", "{name: sgd, lr: 0.05, momentum: 0.9}", "--model.schedule.name", "constant"),
        *("--trainer.validate_every_steps", "5", "--early_stopping.patience", "2"),
        *("--early_stopping.min_delta", "0.05"),
        *("--trainer.max_epochs", "20"),
        *more,
    ]
    return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs")


class SometimesScored(pl.LightningModule):
    """Logs ``val/score``, which never improves, in validations before training and after an odd number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch["features"]).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking or self.trainer.global_step % 2 == 1:
            self.log("val/score", torch.tensor(1.0), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Endless(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Batches without a number."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"features": torch.ones(4, 6)} for _ in range(3))


def test_a_validation_without_the_metric_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    shard = write_features(tmp_path, "some", 20)
    data = ShardedDataModule(
        train=shard, val=shard, fields={"features": "features.npy"}, global_batch_size=4, micro_batch_size=4
    )
    stopping = EarlyStopping(monitor="val/score", patience=3, restore_best=False)
    settings: dict[str, Any] = {"progress_bar": False, "accelerator": "cpu", "max_steps": 40}
    trainer = Trainer(run_dir=tmp_path / "run", validate_every_steps=1, callbacks=[stopping], **settings)
    trainer.fit(SometimesScored(), datamodule=data)
    # Scored at steps 1, 3, 5 and 7: the first is the best, the others use up the patience.
    assert (trainer.global_step, stopping.best_step, stopping.waited) == (7, 1, 3)
    said = capsys.readouterr().err
    assert said.count("the validation at step 2 did not log 'val/score'") == 1, said
    assert "never acts" not in said
    for settings_, first in (({"validate_every_steps": 9}, 9), ({}, 5)):
        late = EarlyStopping(monitor="val/score", restore_best=False)
        trainer = Trainer(
            run_dir=tmp_path / f"late-{first}", callbacks=[late], **{**settings, "max_steps": 3}, **settings_
        )
        trainer.fit(SometimesScored(), datamodule=data)
        text = (
            f"the first validation would be at step {first} and the run ends at step 3: early stopping on 'val/score'"
        )
        assert text in capsys.readouterr().err
    # Without early stopping, also after a resume at step 3: each validation rates its own checkpoint.
    for steps in (3, 6):
        keep = Checkpointing(monitor="val/score", keep_best=3, every_steps=1, keep_last=9)
        trainer = Trainer(
            run_dir=tmp_path / "rated",
            validate_every_steps=1,
            callbacks=[keep],
            **{**settings, "max_steps": steps},
        )
        start = trainer.find_start("auto" if steps == 3 else str(tmp_path / "rated"))
        trainer.fit(SometimesScored(), datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
    rated = {c.global_step: c.about.metric is not None for c in committed(tmp_path / "rated" / "checkpoints")[0]}
    assert rated == {1: True, 2: False, 3: True, 4: False, 5: True, 6: False}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_loader_without_a_length_has_no_last_step_to_compare_with(tmp_path: Path) -> None:
    stopping = EarlyStopping(monitor="val/score", restore_best=False)
    trainer = Trainer(run_dir=tmp_path / "run", max_steps=2, callbacks=[stopping], progress_bar=False)
    trainer.fit(SometimesScored(), Endless(), Endless())
    assert trainer.global_step == 2


def test_all_ranks_stop_at_the_step_at_which_one_process_stops(digits: Path, tmp_path: Path) -> None:
    runs = {}
    for ranks in (1, 4):
        run_dir = tmp_path / str(ranks)
        outcome = fit(run_dir, digits, ranks).ok()
        runs[ranks] = read_run(run_dir)
        assert "has not improved" in outcome.text
    steps = {ranks: run["attempts"][-1]["to_step"] for ranks, run in runs.items()}
    assert len(set(steps.values())) == 1, f"stopped at steps {steps}"
    assert steps[1] < 20 * 19, "the run came to its end instead of stopping early"
    bests = {ranks: run["best"]["step"] for ranks, run in runs.items()}
    assert len(set(bests.values())) == 1, f"best at steps {bests}"


@pytest.mark.slow
def test_patience_and_best_survive_a_resume(digits: Path, tmp_path: Path) -> None:
    fit(tmp_path / "whole", digits, 2).ok()
    whole = read_run(tmp_path / "whole")
    stop, best = whole["attempts"][-1]["to_step"], whole["best"]
    assert stop == best["step"] + 10, "two validations without improvement, five steps apart"
    # Killed between the two validations that did not improve: one of two is used up.
    killed = tmp_path / "killed"
    kill = ("--trainer.callbacks+=tests.support.callbacks.KillAt", f"--trainer.callbacks.step={stop - 2}")
    every = ("--checkpoint.every_steps", "1", "--checkpoint.save", "sync")
    assert fit(killed, digits, 2, *every, *kill).codes == [-9, -9]
    fit(killed, digits, 2, *every).ok()
    resumed = read_run(killed)
    assert resumed["attempts"][-1]["from_step"] == stop - 2
    assert resumed["attempts"][-1]["to_step"] == stop
    assert resumed["best"] == best
    assert resumed["stop_reason"] == whole["stop_reason"]


@pytest.mark.slow
def test_a_run_that_had_decided_to_stop_stays_stopped(digits: Path, tmp_path: Path) -> None:
    """Killed after the decision was saved, before the end: the resumed run does not train on."""
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 1).ok()
    stopped = read_run(run_dir)
    (run_dir / "run.json").write_text((run_dir / "run.json").read_text().replace('"completed"', '"running"'))
    fit(run_dir, digits, 1).ok()
    again = read_run(run_dir)
    assert [a["to_step"] for a in again["attempts"]] == [stopped["attempts"][0]["to_step"]] * 2
    assert again["result"] == stopped["result"]


@pytest.mark.slow
def test_best_weights_are_restored(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, digits, 2).ok()
    best = read_run(run_dir)["best"]["step"]
    there = {c.global_step: c.path for c in committed(run_dir / "checkpoints")[0]}
    assert best in there, f"the best checkpoint was pruned; there are {sorted(there)}"
    assert differing(read_model(there[best]), read_model(there[max(there)]))
    # The test after training used the best weights: testing that checkpoint gives the same numbers.
    arguments = [
        *("test", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.test={digits}/test.json", "--data.micro_batch_size", "16"),
        *("--checkpoint_path", str(there[best])),
    ]
    text = run_cli(1, arguments, folder=tmp_path / "test").ok().text
    for name, value in read_run(run_dir)["result"].items():
        assert f"{value:.6f}" in text, f"{name} was {value:.6f} after training\n{text}"
    assert torch.isfinite(torch.tensor(read_run(run_dir)["best"]["value"]))
