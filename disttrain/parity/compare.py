"""Two runs of one recipe side by side: the same to the bit, within a tolerance, or different, where first and why.

Distances of weights are ``max|w - w'| / max|w|``, of each parameter by itself for naming it and over all of them for
the verdict; losses and norms are compared relative to the reference. The likely cause follows from what differs first:
the samples, the weights at the start, the loss, the gradient, or only what no gradient flows through. Cost: one pass
over the weights of every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from disttrain.parity.traces import Trace

BUFFER: Final = "buffer "
SAME, CLOSE, DIFFERENT = "same to the bit", "within tolerance", "differs"


@dataclass(frozen=True)
class Comparison:
    """How a run compares with the reference.

    Attributes:
        name: its layout.
        verdict: ``SAME``, ``CLOSE`` or ``DIFFERENT``.
        weights: distance of the weights after the last step.
        loss: largest relative difference of a step's loss.
        grad_norm: largest relative difference of a step's gradient norm.
        metrics: largest difference of a metric, relative to it where it is larger than 1.
        first: what left the tolerance first, or the last bit where nothing did; empty where all bits are equal.
        causes: what may be the reason, the likeliest first; only where the runs differ.
        distances: distance of the weights after each step.
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


def compare(reference: Trace, other: Trace, tolerance: float) -> Comparison:
    """Compare a run with the reference.

    Args:
        reference: the run that others are compared with.
        other: another run of the same recipe.
        tolerance: largest distance of weights, losses and norms that counts as rounding.
    """
    steps = sorted(set(reference.steps) & set(other.steps))
    loss = _largest(reference, other, steps, "loss")
    norm = _largest(reference, other, steps, "grad_norm")
    # Of a mean squared error of thousands the absolute difference would be all rounding.
    metrics = max(
        (
            abs(value - other.metrics.get(name, math.nan)) / max(1.0, abs(value))
            for name, value in reference.metrics.items()
        ),
        default=0.0,
    )
    distances: dict[int, float] = {}
    first_bit = first_out = ""
    for step in [0, *steps]:
        ours, theirs = reference.weights(step), other.weights(step)
        distances[step] = distance(ours, theirs)
        if not first_bit and (named := _first_unlike(ours, theirs, 0.0)):
            first_bit = f"{_after(step)}, {named}"
        if not first_out and (named := _first_unlike(ours, theirs, tolerance)):
            first_out = f"{_after(step)}, {named}"
    sequel = _order_differs(reference, other)
    if set(reference.steps) != set(other.steps):
        sequel = sequel or f"{other.name} did {len(other.steps)} steps, {reference.name} {len(reference.steps)}"
    out = [value for value in (distances[max(distances)], loss, norm, metrics) if not value <= tolerance]
    if sequel or first_out or out:
        causes = tuple(likely_causes(reference, other, tolerance))
        first = sequel or first_out or _first_number(reference, other, steps, tolerance)
        return Comparison(
            other.name, DIFFERENT, distances[max(distances)], loss, norm, metrics, first, causes, distances
        )
    verdict = CLOSE if first_bit else SAME
    return Comparison(other.name, verdict, distances[max(distances)], loss, norm, metrics, first_bit, (), distances)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """``max|w - w'| / max|w|`` over all parameters."""
    scale = max((float(w.abs().max()) for name, w in ours.items() if _is_weight(name, w)), default=0.0)
    gap = max((_gap(w, theirs[name]) for name, w in ours.items() if _is_weight(name, w)), default=0.0)
    return gap / scale if scale else gap


def likely_causes(reference: Trace, other: Trace, tolerance: float) -> list[str]:
    """Why two runs may differ, the likeliest first."""
    causes: list[str] = []
    if drawn := sorted({*reference.drawn, *other.drawn}):
        causes.append(
            f"unkeyed randomness: training draws from {', '.join(drawn)}; draw from PyTorch's default generator,"
            " which is keyed by step and micro batch, or in a transform from the generator that it is given"
        )
    if _order_differs(reference, other):
        causes.append("another order of samples: the training data does not come from disttrain's data module")
        return causes
    if distance(reference.weights(0), other.weights(0)) > 0:
        causes.append("other initial weights: the model draws them before the seed is set, or by rank")
        return causes
    step = min(set(reference.steps) & set(other.steps), default=None)
    if step is None:
        return causes
    ours, theirs = reference.steps[step], other.steps[step]
    if _relative(ours["loss"], theirs["loss"]) > max(tolerance, 1e-6):
        if not drawn:
            causes.append(
                "rank-dependent code or unkeyed randomness: the same weights and samples gave another loss in the first"
                " step"
            )
        if not reference.is_task:
            causes.append("a loss that is a mean over each micro batch: see the next cause")
    elif _relative(ours["grad_norm"], theirs["grad_norm"]) > max(tolerance, 1e-6):
        causes.append(
            "rank-dependent code in the backward pass or the optimizer's hooks: the first step's loss is the same, its"
            " gradient is not"
        )
    if not reference.is_task:
        causes.append(
            "a mean of means: the module is no disttrain.Task, so each micro batch counts alike whatever its weight"
        )
    if reference.batch_norms and not _only_rounding(reference, other, tolerance):
        causes.append(
            f"batch normalization ({', '.join(reference.batch_norms[:3])}): each rank's running statistics follow its"
            " own micro batches; use GroupNorm or LayerNorm, or synchronized batch norms"
        )
    if not causes:
        causes.append(
            "a kernel that is not deterministic, or rounding that the model amplifies (ReLU, max pooling) or that Adam"
            " scales up, where a gradient is nothing else (the bias of attention's keys)"
        )
    return causes


def _only_rounding(reference: Trace, other: Trace, tolerance: float) -> bool:
    last = max(set(reference.steps) & set(other.steps))
    return not _first_unlike(reference.weights(last), other.weights(last), tolerance)


def _first_unlike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str:
    """The first parameter or buffer that is further off than a tolerance, and by how much."""
    scale = max((float(w.abs().max()) for name, w in ours.items() if _is_weight(name, w)), default=1.0) or 1.0
    for name, value in ours.items():
        if name not in theirs or theirs[name].shape != value.shape:
            return f"{name} is missing or of another shape"
        if value.is_floating_point():
            own = scale if _is_weight(name, value) else float(value.abs().max()) or 1.0
            off = _gap(value, theirs[name]) / own
            unlike = not off <= tolerance if tolerance else not torch.equal(value, theirs[name])
        else:
            off, unlike = float("nan"), not torch.equal(value, theirs[name])
        if unlike:
            return f"{name} is off by {off:.1e}"
    return ""


def _first_number(reference: Trace, other: Trace, steps: list[int], tolerance: float) -> str:
    for step in steps:
        for name in ("loss", "grad_norm"):
            off = _relative(reference.steps[step][name], other.steps[step][name])
            if not off <= tolerance:
                return f"in step {step}, the {name} is off by {off:.1e}"
    return "only the metrics"


def _order_differs(reference: Trace, other: Trace) -> str:
    for step in sorted(set(reference.samples) & set(other.samples)):
        if reference.samples[step] != other.samples[step]:
            return f"in step {step}, the samples"
    return ""


def _largest(reference: Trace, other: Trace, steps: list[int], name: str) -> float:
    gaps = [_relative(reference.steps[step][name], other.steps[step][name]) for step in steps]
    return max(gaps, default=math.nan, key=lambda gap: math.inf if math.isnan(gap) else gap)


def _relative(one: float, two: float) -> float:
    if one == two or (math.isnan(one) and math.isnan(two)):
        return 0.0
    return abs(one - two) / max(abs(one), abs(two))


def _gap(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max()) if one.numel() else 0.0


def _is_weight(name: str, value: Tensor) -> bool:
    return not name.startswith(BUFFER) and value.is_floating_point() and value.numel() > 0


def _after(step: int) -> str:
    return f"after step {step}" if step else "before the first step"
