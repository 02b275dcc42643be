"""Training jobs for the test's SLURM: digits, submitted by ``disttrain submit``, and callbacks that time them."""

from __future__ import annotations

import contextlib
import io
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.commands import submit
from tests.support.slurm import ROOT, Cluster

STEPS = 24  # an epoch of 19 steps, and a bit; checkpoints at 4, 8, ..., validations at 10 and 20


class WaitFor(Callback):
    """Waits before a step, in the first attempt that comes there, until a file is there.

    Args:
        step: optimizer steps done before.
        file: which; a path that is not absolute is one in the run's folder.
    """

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, Path(file)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait."""
        reached = Path(trainer.default_root_dir) / f"waits-{trainer.global_rank}"
        if trainer.global_step == self.step and not reached.exists():
            reached.touch()
            while not (reached.parent / self.file).exists():
                time.sleep(0.05)


def settings(run_dir: Path, data: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    """Settings of a short run, whose sums do not depend on the number of ranks."""
    return {
        **{f"data.{split}": f"{data}/{split}.json" for split in ("train", "val", "test")},
        "data.micro_batch_size": "16",
        "trainer.max_steps": str(STEPS),
        "trainer.validate_every_steps": "10",
        "checkpoint.every_steps": "4",
        "checkpoint.save": "sync",
        "trainer.parallel.reduction": "tree",
        "trainer.log_every_steps": "1",
        "trainer.progress_bar": "false",
        "trainer.run_dir": str(run_dir),
        "trainer.callbacks": "[disttrain.SampleLedger]",
        **(more or {}),
    }


def arguments(run_dir: Path, data: Path, *options: str, more: dict[str, str] | None = None) -> list[str]:
    """The command line of ``disttrain submit``."""
    given = [word for name, value in settings(run_dir, data, more).items() for word in ("--set", f"{name}={value}")]
    return ["--config", str(ROOT / "recipes" / "digits.yaml"), "--time", "10m", *given, *options]


def callbacks(*texts: str) -> dict[str, str]:
    """The setting of callbacks, besides the ledger of samples; each as YAML."""
    listed = [*texts, "disttrain.SampleLedger"]
    return {"trainer.callbacks": f"[{', '.join(listed)}]"}


def wait_for(step: int, file: Path | str) -> str:
    """A :class:`WaitFor`, as YAML."""
    return f"{{class_path: tests.support.slurm_jobs.WaitFor, init_args: {{step: {step}, file: {file}}}}}"


def slowly(seconds: float, rank: int | None = None) -> str:
    """A :class:`tests.support.callbacks.Slowly`, as YAML."""
    whose = "" if rank is None else f", rank: {rank}"
    return f"{{class_path: tests.support.callbacks.Slowly, init_args: {{seconds: {seconds}{whose}}}}}"


def queue_job(cluster: Cluster, run_dir: Path, data: Path, *options: str, more: dict[str, str] | None = None) -> str:
    """Submit a run; the job's number."""
    said = io.StringIO()
    with cluster.as_here(), contextlib.redirect_stdout(said):
        assert submit.main(arguments(run_dir, data, *options, more=more)) == 0
    match = re.search(r"submitted job (\d+)", said.getvalue())
    assert match is not None, said.getvalue()
    return match[1]


def log_of(run_dir: Path, job: str) -> Path:
    """The output of a job."""
    return run_dir / "submit" / f"{job}.log"
