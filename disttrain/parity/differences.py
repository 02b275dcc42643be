"""Measure the distance between two runs: weights, losses, norms, metrics and samples.

Nothing is skipped: all names of both runs are compared. A name that only one run has is an infinite difference, and so
is a NaN or infinity that only one has. If both have the same one, they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from disttrain.parity.traces import Trace

BUFFER: Final = "buffer "


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return ``max|w - w'| / max|w|`` over all parameters; infinite if one is missing or non-finite in one run only."""
    names = {name for one in (ours, theirs) for name, value in one.items() if _is_weight(name, value)}
    scale = _scale(w for name, w in ours.items() if name in names)
    gap = largest(
        _gap(ours[name], theirs[name]) if _alike(ours.get(name), theirs.get(name)) else math.inf for name in names
    )
    return gap / scale if scale else gap


def first_unlike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str:
    """Return the first parameter or buffer beyond the tolerance, and its distance; with 0, any differing bit counts."""
    scale = _scale(w for name, w in ours.items() if _is_weight(name, w)) or 1.0
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        one, two = ours.get(name), theirs.get(name)
        if one is None or two is None or not _alike(one, two):
            return f"{name} is missing or has another shape or type"
        if _same_bits(one, two):
            continue
        if not one.is_floating_point():
            return f"{name} differs"
        off = _gap(one, two) / (scale if _is_weight(name, one) else _scale([one]) or 1.0)
        if not tolerance or not off <= tolerance:
            return f"{name} is off by {off:.1e}"
    return ""


def relative(one: float, two: float) -> float:
    """Return the difference of two numbers relative to the larger one."""
    if not math.isfinite(one) or not math.isfinite(two):
        return 0.0 if one == two or (math.isnan(one) and math.isnan(two)) else math.inf
    return 0.0 if one == two else abs(one - two) / max(abs(one), abs(two))


def metric_gaps(reference: Trace, other: Trace) -> dict[str, float]:
    """Return the distance of each metric: relative for values larger than 1, infinite if one run lacks it."""
    ours, theirs = reference.metrics, other.metrics
    gaps: dict[str, float] = {}
    for name in sorted({*ours, *theirs}):
        one, two = ours.get(name), theirs.get(name)
        if one is None or two is None:
            gaps[name] = math.inf
        else:
            # For a mean squared error in the thousands, the absolute difference would be mostly rounding.
            gaps[name] = min(relative(one, two), abs(one - two)) if math.isfinite(one - two) else relative(one, two)
    return gaps


def order_differs(reference: Trace, other: Trace) -> str:
    """Return the first step whose samples differ or are unknown in one run; empty if all are equal."""
    for step in sorted({*reference.steps, *other.steps, *reference.samples, *other.samples}):
        without = [trace.name for trace in (reference, other) if step in trace.steps and not trace.samples.get(step)]
        if without:
            return f"in step {step}, the samples: the ledger of {' and '.join(without)} lists none"
        ours, theirs = reference.samples.get(step), other.samples.get(step)
        if ours is not None and theirs is not None and ours != theirs:
            return f"in step {step}, the samples"
    return ""


def largest(gaps: Iterable[float]) -> float:
    """Return the largest distance, or 0 if there are none; NaN counts as infinite."""
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, two)))


def _alike(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and one.shape == two.shape and one.dtype == two.dtype


def _gap(one: Tensor, two: Tensor) -> float:
    """Return the largest difference of an element; NaN if one is not finite and the other is not the same."""
    if not one.numel():
        return 0.0
    one, two = one.double(), two.double()
    same = (one == two) | (one.isnan() & two.isnan())
    return float(torch.where(same, 0.0, (one - two).abs()).max())


def _scale(values: Iterable[Tensor]) -> float:
    """Return the largest finite absolute value."""
    return max((float(torch.where(w.isfinite(), w, 0).abs().max()) for w in values if w.numel()), default=0.0)


def _is_weight(name: str, value: Tensor) -> bool:
    return not name.startswith(BUFFER) and value.is_floating_point() and value.numel() > 0
