"""Comparing what runs left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from disttrain.checkpoint.format.reader import committed, read_model


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The model of a run's newest checkpoint."""
    found, passed_over = committed(run_dir / "checkpoints")
    assert found, f"{run_dir} has no committed checkpoint; passed over: {passed_over}"
    return read_model(found[-1].path)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """``max|a - b| / max|a|`` over all tensors."""
    assert a.keys() == b.keys(), f"other tensors: {a.keys() ^ b.keys()}"
    largest = max(float(t.abs().max()) for t in a.values())
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a) / largest


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that are not equal bit by bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The weights of a run under way, its buffers with them, put together on every rank. A collective."""
    weights = trainer.strategy.lightning_module_state_dict()
    # The whole tensor of a single rank is a view of its part, which training goes on to change.
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in weights.items()}
