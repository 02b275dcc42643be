"""Read what a run recorded for a comparison: samples, losses, gradient norms and weights by step, and metrics.

Reads the files of :mod:`disttrain.callbacks.records.trace`, the sample ledger and the run record. Weights are read one
step at a time. Nothing is unpickled (``weights_only``). A missing file that the comparison needs is an error that names
the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.callbacks.records.trace import FOLDER
from disttrain.errors import DisttrainError
from disttrain.system.reading import read_json, read_json_lines, read_run


class ParityError(DisttrainError):
    """A run of a comparison failed or left no trace to compare."""


@dataclass(frozen=True)
class Trace:
    """One run, as read from its folder.

    Attributes:
        name: the layout's name.
        run_dir: the run's folder.
    """

    name: str
    run_dir: Path
    _steps: dict[int, dict[str, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> dict[int, dict[str, float]]:
        """``loss`` and ``grad_norm`` by step, from 1 on; for a step that ran twice, the later values.

        Raises:
            ParityError: no step was recorded.
        """
        found: dict[int, dict[str, float]] = {}
        path = self.run_dir / FOLDER / "steps.jsonl"
        for line in read_json_lines(path) if path.exists() else ():
            found[int(line["step"])] = {name: float(value) for name, value in line.items()}
        if not found:
            raise ParityError(f"layout {self.name} recorded no steps", hint=f"see the logs in {self.run_dir}")
        return dict(sorted(found.items()))

    @cached_property
    def samples(self) -> dict[int, list[str]]:
        """The keys of every step's samples, in order, by step number from 1 on."""
        return {step + 1: keys for step, keys in read_ledger(self.run_dir / "ledger").items()}

    def weights(self, step: int) -> dict[str, Tensor]:
        """Return parameters and buffers after a step, by name.

        Raises:
            ParityError: they were not written.
        """
        path = self.run_dir / FOLDER / f"weights-{step:06d}.pt"
        if not path.exists():
            raise ParityError(
                f"layout {self.name} recorded no weights for step {step}: {path} is missing",
                hint=f"run the comparison again; if that does not help, see the logs in {self.run_dir}",
            )
        found: dict[str, Tensor] = torch.load(path, weights_only=True)
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """The test metrics, or those of the last validation, by name."""
        result: dict[str, float] = read_run(self.run_dir).get("result", {})
        return result

    @property
    def batch_norms(self) -> list[str]:
        """Names of the module's batch norms."""
        return list(self._about().get("batch_norms", []))

    @property
    def is_task(self) -> bool:
        """Whether the module uses the training step of :class:`disttrain.Task`, which weights its gradient."""
        return bool(self._about().get("is_task"))

    @property
    def micro_batch_size(self) -> int | None:
        """Samples per training forward pass on one rank; None if the data is not disttrain's."""
        size = self._about().get("micro_batch_size")
        return None if size is None else int(size)

    @property
    def draws(self) -> bool:
        """Whether training draws from PyTorch's generators, as dropout does; they are keyed by micro batch."""
        return bool(self._about().get("draws"))

    @property
    def optimizers(self) -> list[str]:
        """Class names of the optimizers."""
        return list(self._about().get("optimizers", []))

    @property
    def was_killed(self) -> bool:
        """Whether rank 0 killed itself."""
        return (self.run_dir / FOLDER / "killed").exists()

    @property
    def resumed_from(self) -> int:
        """The latest step from which a checkpoint was resumed; 0 if none was."""
        return max((int(attempt["from_step"]) for attempt in read_run(self.run_dir).get("attempts", [])), default=0)

    @property
    def drawn(self) -> list[str]:
        """Unkeyed generators that training drew from, over all ranks."""
        files = (self.run_dir / FOLDER).glob("rank-*.json")
        return sorted({name for path in files for name in read_json(path)})

    def _about(self) -> dict[str, Any]:
        path = self.run_dir / FOLDER / "about.json"
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        return found
