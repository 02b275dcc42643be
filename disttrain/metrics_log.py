"""The Lightning logger that keeps a run's metrics in ``metrics.csv`` of its run folder.

A thin cover over :mod:`disttrain.metrics_file`, which holds the guarantees: append-only, each row flushed
as it is logged, nothing lost to a kill but the row being written. Each call logs one row; calls of the same
step are not merged. Only rank 0 writes, and no rank waits for it: there are no collectives here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from disttrain.metrics_file import FILE_NAME, MetricsFile


class MetricsLog(Logger):
    """Logs to ``<run_dir>/metrics.csv``.

    Args:
        run_dir: the run folder; it is made with the first row when it is missing.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._metrics_file = MetricsFile(self._run_dir / FILE_NAME)
        self._last_step = 0

    @property
    def name(self) -> str:
        """Empty: a run folder holds one run."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a resumed run goes on in its folder, so there are no versions."""
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
        """The file on rank 0; elsewhere an object that does nothing, whatever is called on it."""
        return self._metrics_file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: values by name. ``epoch``, which Lightning adds, goes to the column of that name;
                ``step`` serves where the argument is not given.
            step: the optimizer step; the last one logged where neither names one. Lightning's own rows count
                from 0: the row of the first step, and of a validation right after it, has step 0.
        """
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        named_step = values.pop("step", None)
        if step is None:
            step = self._last_step if named_step is None else int(named_step)
        self._last_step = step
        self._metrics_file.append(values, step=step, epoch=None if epoch is None else int(epoch))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` in the run folder holds them all."""

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps; called when a run resumes from an earlier checkpoint.

        Args:
            step: the last step to keep, counted as in the rows: for Lightning's own rows, one less than the
                checkpoint's ``global_step``.
        """
        self._metrics_file.truncate_after(step)
        self._last_step = step

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later row, such as that of a test after the fit, opens it again."""
        self._metrics_file.close()
