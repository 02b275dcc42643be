"""A run's folder that is deleted or replaced in mid-run: the run ends with a message, and makes nothing of it anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from disttrain import Trainer
from disttrain.checkpoint.format import writer
from disttrain.errors import ConfigError
from disttrain.run.folder import read_run
from disttrain.run.loggers import EventsLog
from disttrain.run.metrics_file import MetricsFile
from disttrain.system.files import (
    append_lines,
    check_held,
    expand_path,
    hold,
    make_folder,
    release,
    sync_records,
    write_atomically,
)
from tests.commands.test_complete import fit, tree
from tests.support.power import Disk
from tests.support.ranks import run_ranks
from tests.support.tasks import PlainFeatures


def test_nothing_is_written_to_a_folder_that_took_the_place_of_a_runs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_folder(run_dir / "checkpoints")
    hold(run_dir)
    try:
        write_atomically(run_dir / "run.json", "{}")
        metrics = MetricsFile(run_dir / "metrics.csv")
        metrics.append({"a": 1.0}, step=1)
        os.rename(run_dir, tmp_path / "moved")
        for replaced in (False, True):
            if replaced:
                run_dir.mkdir()
            writes: list[Callable[[], Any]] = [
                lambda: write_atomically(run_dir / "run.json", "{}"),
                lambda: append_lines(run_dir / "quarantine" / "rank-00000.jsonl", "{}\n"),
                lambda: make_folder(run_dir / "checkpoints"),
                lambda: metrics.append({"a": 1.0, "b": 2.0}, step=2),  # a new column makes the file anew
            ]
            for write_it in writes:
                with pytest.raises(OSError, match=r"folder was (replaced|removed)") as caught:
                    write_it()
                assert caught.value.errno == errno.ESTALE
        assert list(run_dir.iterdir()) == []
        check_held(tmp_path / "other" / "run.json")
    finally:
        release(run_dir)
    write_atomically(run_dir / "run.json", "{}")


class TakeAway(Callback):
    """Takes the run's folder away within a save, as another process would."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the trap: right before the tensors of the second save are written."""
        run_dir, real, count = Path(trainer.default_root_dir), writer.dcp_save, 0

        def trapped(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == 2:
                if self.how == "deleted":
                    shutil.rmtree(run_dir)
                else:
                    os.rename(run_dir, run_dir.with_name("moved"))
                if self.how == "replaced":
                    (run_dir / "checkpoints").mkdir(parents=True)
                    (run_dir / "run.json").write_text('{"status": "running"}')
            return real(*arguments, **more)

        writer.dcp_save = trapped


def take_the_folder_away(folder: Path, data: Path) -> None:
    real = writer.dcp_save
    for how in ("deleted", "moved", "replaced"):
        run_dir = folder / how / "run"
        trap = json.dumps({"class_path": "tests.run.test_lost_folder.TakeAway", "init_args": {"how": how}})
        try:
            code, text = fit(data, run_dir, f"--trainer.callbacks+={trap}", "--trainer.log_every_steps", "1", steps=30)
        finally:
            writer.dcp_save = real
        assert code == 2, text
        assert text.count("disttrain: error") == 1, text
        assert "will not publish anything" in text, text
        assert "Traceback" not in text, text
        left = tree(run_dir) if run_dir.exists() else None
        assert left == ({"run.json": b'{"status": "running"}'} if how == "replaced" else None), (how, left)


@pytest.mark.slow
def test_a_run_ends_whose_folder_is_taken_away(digits: Path, tmp_path: Path) -> None:
    run_ranks(1, take_the_folder_away, tmp_path, digits, folder=tmp_path / "logs", timeout=300).ok()


def test_the_thread_that_writes_for_tensorboard_says_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    former, log = threading.excepthook, EventsLog(tmp_path / "run")
    log.log_metrics({"a": 1.0}, 1)
    shutil.rmtree(tmp_path / "run")
    log.log_metrics({"a": 2.0}, 2)
    log.finalize("success")
    log.log_metrics({"a": 3.0}, 3)
    told = capfd.readouterr().err
    assert "Traceback" not in told, told
    assert told.count("stopped writing TensorBoard events") == 1, told
    assert threading.excepthook is former, "the hook of others is to be back"
    assert not (tmp_path / "run").exists()


def test_a_path_with_a_dollar_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a$b").touch()
    assert expand_path(f"{tmp_path}/a$b", name="x") == tmp_path / "a$b"
    with pytest.raises(ConfigError, match="the environment variable c_ is not set"):
        expand_path(f"{tmp_path}/a$c_", name="x")


def test_a_save_leaves_the_files_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def guarded(path: Path, *arguments: Any) -> Any:
        opened.append(path.name)
        if path.name == "a-colleagues":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *arguments)

    for name in ("a-colleagues", "events.jsonl", "metrics.csv"):
        (tmp_path / name).touch()
    append_lines(tmp_path / "quarantine" / "rank-00000.jsonl", "{}\n")
    monkeypatch.setattr("disttrain.system.files.open", guarded, raising=False)
    sync_records(tmp_path, 0)
    assert sorted(opened) == ["events.jsonl", "metrics.csv", "rank-00000.jsonl"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_record_that_lacks_entries_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1, "events": [{"text": "of no kind"}]}')
    trainer = Trainer(run_dir=tmp_path, max_steps=1, progress_bar=False, accelerator="cpu")
    trainer.fit(PlainFeatures(), DataLoader([{"features": torch.ones(6), "label": 0}]))  # type: ignore[arg-type]
    dist.destroy_process_group()
    record = read_run(tmp_path)
    assert (record["status"], record["attempts"][0]["to_step"]) == ("completed", 1)
    assert record["events"][0]["text"] == "of no kind"


def test_a_power_cut_leaves_an_old_or_a_new_file(tmp_path: Path) -> None:
    """And lines that were appended, once they are synced; a torn line is ended before the next."""
    top = tmp_path / "disk"
    top.mkdir()
    with Disk(top).watching() as disk:
        write_atomically(top / "a", "old")
        write_atomically(top / "a", "new")
        make_folder(top / "b" / "c")
        append_lines(top / "b" / "events.jsonl", "1\n")
        with open(top / "b" / "events.jsonl", "a") as file:
            file.write("2")
        append_lines(top / "b" / "events.jsonl", "3\n")
        before = disk.image(tmp_path / "before")
        sync_records(top / "b", 0)
        after = disk.image(tmp_path / "after")
    assert (before / "a").read_text() == "new"
    assert (before / "b" / "c").is_dir()
    assert not (before / "b" / "events.jsonl").exists()
    assert (after / "b" / "events.jsonl").read_text() == "1\n2\n3\n"
