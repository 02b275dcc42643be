"""The metrics file: rows survive kills, new columns and resumes; and Lightning's logger over it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from disttrain.errors import ConfigError, DataError
from disttrain.run.loggers import EventsLog, MetricsLog
from disttrain.run.metrics_file import MetricsFile, Row, read_metrics, read_rows
from tests.support.chaos import disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.csv"


def write(path: Path, *rows: tuple[int, dict[str, float]]) -> None:
    file = MetricsFile(path)
    for step, values in rows:
        file.append(values, step=step, epoch=step // 10, time_seconds=1000.0 + step)
    file.close()


def test_the_file_has_the_documented_form(path: Path) -> None:
    write(path, (1, {"train/loss": 0.5, "lr": 1e-3}), (2, {"lr": 0.0005}))
    expected = "step,epoch,time,train/loss,lr\n1,0,1001.000,0.5,0.001\n2,0,1002.000,,0.0005\n"
    assert path.read_text() == expected, f"the file differs:\n{path.read_text()}"


def test_values_read_back_to_the_same_bits(path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": 1.7976931348623157e308, "d": -0.0, "e": math.inf, "f": -math.inf}
    write(path, (1, {**values, "g": math.nan}))
    read = {name: series[0][1] for name, series in read_metrics(path).items() if name not in ("epoch", "time")}
    assert math.isnan(read.pop("g")), "nan was not kept"
    same = {name: math.copysign(1, read[name]) == math.copysign(1, value) for name, value in values.items()}
    assert read == values
    assert all(same.values()), f"the sign of a zero was lost: {same}"


def test_each_row_is_in_the_file_before_the_next(path: Path) -> None:
    file = MetricsFile(path)
    for step in range(1, 4):
        file.append({"loss": 1.0}, step=step)
        assert [row.step for row in read_rows(path)] == list(range(1, step + 1)), f"row {step} was not flushed"
    file.close()


def test_a_new_column_keeps_the_rows_and_appends_after_them(path: Path) -> None:
    file = MetricsFile(path)
    file.append({"train/loss": 2.0}, step=1, time_seconds=1.0)
    file.append({"val/loss": 3.0, 'odd, "name"': 4.0}, step=1, time_seconds=2.0)
    file.append({"train/loss": 1.0}, step=2, time_seconds=3.0)
    file.close()
    expected = [
        Row(1, None, 1.0, {"train/loss": 2.0}),
        Row(1, None, 2.0, {"val/loss": 3.0, 'odd, "name"': 4.0}),
        Row(2, None, 3.0, {"train/loss": 1.0}),
    ]
    assert list(read_rows(path)) == expected
    assert os.listdir(path.parent) == ["metrics.csv"], "a temporary file was left"


def test_a_known_column_does_not_copy_the_file(path: Path) -> None:
    write(path, (1, {"a": 1.0, "b": 2.0}))
    before = path.stat().st_ino
    write(path, (2, {"b": 3.0}), (3, {"a": 3.0}), (4, {}))
    assert path.stat().st_ino == before, "appending rows of known columns replaced the file"


def test_a_failed_copy_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, (1, {"a": 1.0}))
    before = path.read_bytes()

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, (2, {"b": 1.0}))
    assert path.read_bytes() == before, "the file changed although the copy failed"
    assert os.listdir(path.parent) == ["metrics.csv"], "a temporary file was left"


def test_a_file_cut_anywhere_loses_only_the_torn_line(path: Path) -> None:
    write(path, (1, {"a": 0.125, "b": 2.0}), (12, {"a": 3.5}), (123, {"b": -1.5}))
    whole, rows = path.read_bytes(), list(read_rows(path))
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = rows[: max(0, whole[:cut].count(b"\n") - 1)]
        assert list(read_rows(path)) == kept, f"cut at byte {cut}: wrong rows read"
        write(path, (200, {"b": 7.0}))
        found = list(read_rows(path))
        assert found == [*kept, Row(200, 20, 1200.0, {"b": 7.0})], f"cut at byte {cut}: appending went wrong"


def test_damaged_lines_are_passed_over(path: Path) -> None:
    write(path, (1, {"a": 1.0}))
    with open(path, "ab") as file:
        file.write(b"\0\0\0\0\n2,0,1.0\n3,0,1.0,1,1\nx,0,1.0,1\n\n4,0,1.0,4.0\n")
    assert [row.step for row in read_rows(path)] == [1, 4]
    write(path, (5, {"new": 1.0}))
    assert [row.step for row in read_rows(path)] == [1, 4, 5], "copying the file lost or kept the wrong lines"


def test_truncate_after_drops_later_steps_only(path: Path) -> None:
    write(path, *[(step, {"a": float(step)}) for step in (10, 20, 20, 30, 40)])
    file = MetricsFile(path)
    file.append({"a": 50.0}, step=50)
    file.truncate_after(20)
    file.append({"a": 21.0}, step=21)
    file.close()
    assert read_metrics(path)["a"] == [(10, 10.0), (20, 20.0), (20, 20.0), (21, 21.0)]


def test_after_truncating_an_old_writer_is_cut_off(path: Path) -> None:
    old, new = MetricsFile(path), MetricsFile(path)
    old.append({"a": 1.0}, step=1)
    new.truncate_after(1)
    old.append({"a": 2.0}, step=2)
    new.append({"a": 2.5}, step=2)
    old.close()
    new.close()
    assert read_metrics(path)["a"] == [(1, 1.0), (2, 2.5)], "the row of the earlier attempt is in the file"


def test_truncating_a_missing_file_does_nothing(path: Path) -> None:
    MetricsFile(path).truncate_after(3)
    assert not path.exists()
    assert read_metrics(path) == {}


def test_another_file_is_not_overwritten(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("name,age\nx,3\n")
    for use in (lambda: write(path, (1, {"a": 1.0})), lambda: list(read_rows(path))):
        with pytest.raises(DataError, match="not a metrics file") as caught:
            use()
        assert caught.value.hint, "the error says no hint"
    assert path.read_text() == "name,age\nx,3\n"


@pytest.mark.parametrize("name", ["time", "two\nlines"])
def test_an_impossible_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write(path, (1, {name: 1.0}))
    assert caught.value.hint, "the error says no hint"
    assert not path.exists(), "a file was made"


def test_the_logger_writes_what_lightning_hands_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.log_metrics({"train/loss": 1.0, "epoch": 2}, step=7)
    log.log_metrics({"val/loss": 0.5, "epoch": 2.0}, step=7)
    log.log_metrics({"x": 1.0, "step": 9.0})
    log.log_metrics({"x": 2.0})
    log.log_hyperparams({"lr": 1})
    log.finalize("success")
    log.log_metrics({"test/loss": 0.25}, 9)
    found = [(row.step, row.epoch, row.values) for row in read_rows(tmp_path / "run" / "metrics.csv")]
    assert found == [
        (7, 2, {"train/loss": 1.0}),
        (7, 2, {"val/loss": 0.5}),
        (9, None, {"x": 1.0}),
        (9, None, {"x": 2.0}),
        (9, None, {"test/loss": 0.25}),
    ]
    log.truncate_after(8)
    assert [row.step for row in read_rows(tmp_path / "run" / "metrics.csv")] == [7, 7]
    log.finalize("success")
    assert (log.name, log.version, log.save_dir, log.log_dir) == ("", "", str(tmp_path / "run"), str(tmp_path / "run"))


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = MetricsLog(tmp_path)
    first.log_metrics({"a": 1.0}, step=5)
    first.finalize("success")
    before = (tmp_path / "metrics.csv").read_bytes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log = MetricsLog(tmp_path)
    log.log_metrics({"a": 2.0}, step=6)
    log.truncate_after(0)
    log.experiment.append({"a": 2.0}, step=6)
    log.finalize("success")
    assert (tmp_path / "metrics.csv").read_bytes() == before, "a rank other than 0 changed the file"


class _Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders
def test_a_trainer_logs_through_it(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=MetricsLog(tmp_path), log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.ones(3, 1))
    trainer.fit(_Line(), data, data)
    series = read_metrics(tmp_path / "metrics.csv")
    counts = {name: len(values) for name, values in series.items()}
    assert counts == {"epoch": 8, "time": 8, "train/loss": 6, "val/loss": 2}, f"wrong rows: {series}"
    assert [value for _, value in series["epoch"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert trainer.log_dir == str(tmp_path)


@pytest.mark.skipif(not disk.can_mount(), reason="file systems cannot be mounted here: no disk to fill")
def test_a_full_disk_costs_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are lost, none is torn, and there are rows again when there is room."""
    run_dir = tmp_path / "run"
    with disk.small_disk(run_dir):
        log = MetricsLog(run_dir)
        log.log_metrics({"loss": 0.5}, step=1000)
        ballast = disk.fill(run_dir)
        for step in range(1001, 1500):  # rows of one length: none is short enough to fit where another did not
            log.log_metrics({"loss": 0.5}, step=step)
        ballast.unlink()
        for step in range(1500, 1503):
            log.log_metrics({"loss": 0.5}, step=step)
        log.finalize("success")
        rows = [(row.step, row.values) for row in read_rows(run_dir / "metrics.csv")]
    told = capsys.readouterr().err.splitlines()
    steps = [step for step, _ in rows]
    missing = 503 - len(rows)
    assert missing > 0, "the disk was not full"
    assert steps == [*range(1000, 1500 - missing), 1500, 1501, 1502]
    assert rows == [(step, {"loss": 0.5}) for step in steps]
    assert told == [
        f"disttrain: {run_dir}/metrics.csv cannot be written: No space left on device;"
        " its rows are skipped until it can",
        f"disttrain: {run_dir}/metrics.csv can be written again; {missing} rows are missing",
    ]


@pytest.mark.skipif(not disk.can_mount(), reason="file systems cannot be mounted here: no disk to fill")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its own thread's
def test_a_full_disk_costs_tensorboard_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    with disk.small_disk(run_dir):
        log = EventsLog(run_dir)
        log.log_metrics({"loss": 1.0}, step=1)
        disk.fill(run_dir)
        for step in range(2, 2000):
            log.log_metrics({"loss": 1 / step}, step=step)
        log.finalize("success")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("disttrain:")]
    assert told == [f"disttrain: stopped writing TensorBoard events to {run_dir}/tensorboard: No space left on device"]
