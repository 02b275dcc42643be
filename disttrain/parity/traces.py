"""What a run left behind for a comparison: samples, losses, gradient norms and weights by step, and metrics.

Reads the files of :mod:`disttrain.callbacks.trace`, of the sample ledger and of the run's record. Weights are read
one step at a time. Nothing is unpickled (``weights_only``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.callbacks.ledger import read_ledger
from disttrain.callbacks.trace import FOLDER
from disttrain.runs import read_run


@dataclass(frozen=True)
class Trace:
    """One run, as its folder tells it.

    Attributes:
        name: of the layout.
        run_dir: the run's folder.
    """

    name: str
    run_dir: Path
    _steps: dict[int, dict[str, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> dict[int, dict[str, float]]:
        """``loss`` and ``grad_norm`` by step, from 1 on; of a step that was done twice, the later."""
        found: dict[int, dict[str, float]] = {}
        path = self.run_dir / FOLDER / "steps.jsonl"
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off by a kill
            found[line["step"]] = line
        return dict(sorted(found.items()))

    @cached_property
    def samples(self) -> dict[int, list[str]]:
        """The keys of every step's samples, in order, by the step's number from 1 on."""
        return {step + 1: keys for step, keys in read_ledger(self.run_dir / "ledger").items()}

    def weights(self, step: int) -> dict[str, Tensor]:
        """Parameters and buffers after a step, by name."""
        path = self.run_dir / FOLDER / f"weights-{step:06d}.pt"
        found: dict[str, Tensor] = torch.load(path, weights_only=True)
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the test, or of the last validation, by name."""
        result: dict[str, float] = read_run(self.run_dir).get("result", {})
        return result

    @property
    def batch_norms(self) -> list[str]:
        """Names of the module's batch norms."""
        return list(self._about().get("batch_norms", []))

    @property
    def is_task(self) -> bool:
        """Whether the module is a :class:`disttrain.Task`, which weighs its gradient."""
        return bool(self._about().get("is_task"))

    @property
    def drawn(self) -> list[str]:
        """Generators that training drew from though they are not keyed, over all ranks."""
        files = (self.run_dir / FOLDER).glob("rank-*.json")
        return sorted({name for path in files for name in json.loads(path.read_text())})

    def _about(self) -> dict[str, Any]:
        path = self.run_dir / FOLDER / "about.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found
