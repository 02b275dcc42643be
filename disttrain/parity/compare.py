"""Compare two runs of one recipe: identical bits, within a tolerance, or different, with the first difference and why.

The distance of weights is ``max|w - w'| / max|w|``: per parameter to name one, over all parameters for the verdict.
Losses and norms are compared relative to the larger value. The likely cause follows from what differs first: the
samples, the initial weights, the loss, the gradient, or only values without a gradient. Cost: one pass over the weights
of every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from disttrain.parity.causes import likely_causes
from disttrain.parity.differences import distance, first_unlike, largest, metric_gaps, order_differs, relative
from disttrain.parity.traces import Trace

SAME, CLOSE, DIFFERENT = "same to the bit", "within tolerance", "differs"
_NUMBERS: Final = ("loss", "grad_norm")


@dataclass(frozen=True)
class Comparison:
    """How a run compares with the reference.

    Attributes:
        name: its layout.
        verdict: ``SAME`` (every weight and buffer of every step), ``CLOSE`` or ``DIFFERENT``.
        weights: distance of the weights after the last step.
        loss: largest relative difference of a step's loss.
        grad_norm: largest relative difference of a step's gradient norm.
        metrics: largest difference of a metric; relative for values larger than 1.
        first: what first exceeded the tolerance, or the first differing bit if nothing did; empty if all bits are
            equal.
        causes: possible reasons, likeliest first; empty unless the runs differ.
        distances: distance of the weights after each step.
        tolerance: the tolerance that was applied.
        exact: whether a single different bit of a weight counted as a difference.
    """

    name: str
    verdict: str
    weights: float
    loss: float
    grad_norm: float
    metrics: float
    first: str
    causes: tuple[str, ...]
    distances: dict[int, float]
    tolerance: float
    exact: bool = False


def compare(reference: Trace, other: Trace, tolerance: float, *, exact: bool = False) -> Comparison:
    """Compare a run with the reference.

    Args:
        reference: the run that others are compared with.
        other: another run of the same recipe.
        tolerance: largest distance of weights, losses, norms and metrics that counts as rounding.
        exact: whether weights, gradient norms and a task's losses must match bit for bit; losses of other modules and
            metrics may still differ by rounding.

    Raises:
        ParityError: a file of a run is missing.
    """
    steps = sorted(set(reference.steps) & set(other.steps))
    loss, norm = (largest(_off(reference, other, step, name) for step in steps) for name in _NUMBERS)
    gaps = metric_gaps(reference, other)
    distances: dict[int, float] = {}
    first_bit = first_out = ""
    for step in [0, *steps]:
        ours, theirs = reference.weights(step), other.weights(step)
        distances[step] = distance(ours, theirs)
        if not first_bit and (named := first_unlike(ours, theirs, 0.0)):
            first_bit = f"{_after(step)}, {named}"
        if not first_out and (named := first_unlike(ours, theirs, tolerance)):
            first_out = f"{_after(step)}, {named}"
    first = (
        order_differs(reference, other)
        or _other_length(reference, other)
        or (first_bit if exact else first_out)
        or _first_number(reference, other, steps, tolerance, exact=exact)
        or _first_metric(gaps, tolerance)
    )
    return Comparison(
        name=other.name,
        verdict=DIFFERENT if first else CLOSE if first_bit else SAME,
        weights=distances[max(distances)],
        loss=loss,
        grad_norm=norm,
        metrics=largest(gaps.values()),
        first=first or first_bit,
        causes=tuple(likely_causes(reference, other, tolerance)) if first else (),
        distances=distances,
        tolerance=tolerance,
        exact=exact,
    )


def _off(reference: Trace, other: Trace, step: int, name: str) -> float:
    return relative(reference.steps[step][name], other.steps[step][name])


def _other_length(reference: Trace, other: Trace) -> str:
    if set(reference.steps) == set(other.steps):
        return ""
    return f"{other.name} ran {len(other.steps)} steps, {reference.name} {len(reference.steps)}"


def _first_number(reference: Trace, other: Trace, steps: list[int], tolerance: float, *, exact: bool) -> str:
    for step in steps:
        for name in _NUMBERS:
            off = _off(reference, other, step, name)
            has_bits = exact and (name == "grad_norm" or reference.is_task)
            if not off <= (0.0 if has_bits else tolerance):
                return f"in step {step}, the {name} is off by {off:.1e}"
    return ""


def _first_metric(gaps: dict[str, float], tolerance: float) -> str:
    for name, gap in gaps.items():
        if not gap <= tolerance:
            return f"only the metrics: {name} is off by {gap:.1e}"
    return ""


def _after(step: int) -> str:
    return f"after step {step}" if step else "before the first step"
