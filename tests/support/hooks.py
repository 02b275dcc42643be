"""Transforms and collates that tests name in a configuration or send to worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from disttrain.data.loader.transforms import Sample
from disttrain.data.reader.bad_sample_policy import BadSampleError, FilteredSampleError


class AddNoise:
    """Adds a drawn number to ``x`` in training, nothing in evaluation."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        noise = 0.0 if random is None else self.scale * float(random.random())
        return {**sample, "x": sample["x"] + noise, "noise": noise}


def refuse_every_fifth(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Refuses samples whose number ends in 0 or 5."""
    number = int(sample["x"][0])
    if number % 5 == 0:
        raise BadSampleError(f"{number} is a multiple of five")
    return sample


def fail(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Has a bug."""
    raise ZeroDivisionError("a bug of one's own")


def die(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return sample


def with_process(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Says which process it ran in."""
    return {**sample, "process": os.getpid()}


def kinds(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Values of every kind that a batch may hold."""
    number = float(sample["x"][0])
    return {
        "half": torch.full((2,), number, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).T + number,
        "empty": torch.empty(0),
        "no boxes": torch.empty(0, 4),
        "text": f"number {number}",
        "nested": {"list": [number]},
        "array": np.full(2, number),
    }


def collate_sum(samples: Sequence[Sample]) -> dict[str, Any]:
    """One number a sample."""
    return {"total": torch.stack([sample["x"].sum() for sample in samples])}


class Stuck:
    """On rank 1, waits for ever in one of the training samples.

    Args:
        after: samples that pass before.
    """

    def __init__(self, after: int = 400) -> None:
        self.left = after

    def __call__(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        if random is not None and os.environ.get("RANK") == "1":
            self.left -= 1
            if self.left <= 0:
                threading.Event().wait()
        return sample


def without_dimensions(samples: Sequence[Sample]) -> dict[str, Any]:
    """A collate that gives a number without dimensions and an array without elements."""
    return {"total": torch.tensor(float(len(samples))), "none": torch.empty(2, 0)}


def weigh_and_filter(sample: Sample, random: np.random.Generator | None) -> Sample:
    """Leaves out every fifth sample by its key, and weighs the others by the rest of its number divided by three."""
    number = int(sample["__key__"].rpartition("-")[2])
    if number % 5 == 0:
        raise FilteredSampleError
    return {**sample, "weight": number % 3}
