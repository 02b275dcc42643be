"""Lightning loggers that write a run's metrics to its run folder: ``metrics.csv`` and TensorBoard event files.

:class:`MetricsLog` is a thin wrapper of :mod:`disttrain.run.metrics_file`, which provides the guarantees: append-only,
every row flushed, a kill loses at most the row being written. Each call logs one row; calls for the same step are not
merged. Only rank 0 writes, without collectives, so no rank waits. Write errors, such as a full disk, are reported and
the rows dropped; logging never ends training.
"""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from disttrain.run.metrics_file import FILE_NAME, MetricsFile
from disttrain.system.files import check_held
from disttrain.system.terminal import tell


class MetricsLog(Logger):
    """Logs to ``<run_dir>/metrics.csv``.

    Args:
        run_dir: the run folder; created with the first row if missing.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._metrics_file = MetricsFile(self._run_dir / FILE_NAME)
        self._last_step = 0
        self._missing = 0  # rows dropped since the last successful write

    @property
    def name(self) -> str:
        """Empty: a run folder holds a single run."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a resumed run continues in its folder, so there are no versions."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._run_dir)

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return str(self._run_dir)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self._run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file on rank 0; on other ranks, an object that ignores all calls."""
        return self._metrics_file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: values by name. ``epoch``, which Lightning adds, goes to its own column; ``step`` is used if the
                argument is not given.
            step: optimizer step; by default the last one logged. Lightning's own rows count from 0: the row of the
                first step, and of a validation right after it, has step 0.
        """
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        named_step = values.pop("step", None)
        if step is None:
            step = self._last_step if named_step is None else int(named_step)
        self._last_step = step
        try:
            self._metrics_file.append(values, step=step, epoch=None if epoch is None else int(epoch))
        except OSError as error:  # e.g. a full disk: the checkpoints decide whether that ends the run
            if not self._missing:
                tell(
                    f"{self._metrics_file.path} cannot be written: {error.strerror}; its rows are skipped until it can"
                )
            self._missing += 1
            return
        if self._missing:
            tell(f"{self._metrics_file.path} can be written again; {self._missing} rows are missing")
            self._missing = 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` in the run folder has them all."""

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop rows of later steps, when a run resumes from an earlier checkpoint.

        Args:
            step: the last step to keep, as counted in the rows: for Lightning's own rows, one less than the
                checkpoint's ``global_step``.
        """
        self._metrics_file.truncate_after(step)
        self._last_step = step

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later row, such as that of a test after the fit, reopens it."""
        self._metrics_file.close()


class EventsLog(TensorBoardLogger):
    """Writes TensorBoard event files to ``<run_dir>/tensorboard``; on a write error, training continues without them.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(save_dir=run_dir, name="", version="tensorboard")
        self._lost = False
        self._former_hook: Callable[[threading.ExceptHookArgs], object] | None = None
        self._hook: Callable[[threading.ExceptHookArgs], object] | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass the values to the writer thread."""
        if not self._lost:
            with self._losing():
                check_held(Path(self.root_dir))  # TensorBoard would recreate a deleted run folder
                self._quieten()
                super().log_metrics(metrics, step)

    def _quieten(self) -> None:
        """Suppress the traceback Python prints for an error in TensorBoard's thread; :meth:`_losing` reports it."""
        if self._former_hook is not None:
            return
        former = self._former_hook = threading.excepthook

        def hook(told: threading.ExceptHookArgs) -> None:
            if type(told.thread).__name__ != "_AsyncWriterThread" or not issubclass(told.exc_type, OSError):
                former(told)

        self._hook = threading.excepthook = hook

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush all events."""
        with self._losing():
            super().finalize(status)
        if self._former_hook is not None and threading.excepthook is self._hook:
            threading.excepthook, self._former_hook = self._former_hook, None

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Report the first write error: TensorBoard's writer does not recover, and reraises it in every later call."""
        try:
            yield
        except (OSError, ValueError) as error:  # Lightning wraps any error of the writer in a ValueError
            first = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(first, OSError):
                raise
            if not self._lost:
                tell(f"stopped writing TensorBoard events to {self.log_dir}: {first.strerror}")
            self._lost = True
