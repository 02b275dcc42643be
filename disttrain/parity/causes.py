"""Find likely causes of a difference between two runs of one recipe.

The traces record unkeyed random draws, micro batch sizes, batch norms and whether the module is a
:class:`disttrain.Task`. Everything else is inferred from the samples, the initial weights, and the first step's loss
and gradient norm.
"""

from __future__ import annotations

from disttrain.parity.differences import distance, first_unlike, order_differs, relative
from disttrain.parity.traces import Trace


def likely_causes(reference: Trace, other: Trace, tolerance: float) -> list[str]:
    """Return the possible causes of a difference between two runs, likeliest first.

    Args:
        reference: the run that others are compared with.
        other: a run that differs from it.
        tolerance: the largest distance that counts as rounding.
    """
    drawn = sorted({*reference.drawn, *other.drawn})
    causes = [
        f"unkeyed randomness: training draws from {', '.join(drawn)}; draw from PyTorch's default generator,"
        " which is keyed by step and micro batch, or, in a transform, from the generator passed to it"
    ][: len(drawn)]
    if order_differs(reference, other):
        return [*causes, "a different sample order: the training data does not come from disttrain's data module"]
    if distance(reference.weights(0), other.weights(0)) > 0:
        return [
            *causes,
            "different initial weights: the model draws them before the seed is set, or depending on the rank",
        ]
    step = min(set(reference.steps) & set(other.steps), default=None)
    if step is None:
        return causes
    if reference.micro_batch_size != other.micro_batch_size:
        # Known effects of the micro batch size come first; a guess never precedes a known cause.
        known = _of_the_size(reference, other)
        return [*known, *causes] if known else causes or [_of_neighbours(reference, other)]
    ours, theirs = reference.steps[step], other.steps[step]
    bound = max(tolerance, 1e-6)
    if relative(ours["loss"], theirs["loss"]) > bound:
        if not drawn:
            causes.append(
                "rank-dependent code or unkeyed randomness: the same weights and samples gave a different loss in the"
                " first step"
            )
    elif relative(ours["grad_norm"], theirs["grad_norm"]) > bound:
        causes.append(
            "rank-dependent code in the backward pass or the optimizer's hooks: the first step's loss is the same, but"
            " its gradient is not"
        )
    if reference.batch_norms and not _only_rounding(reference, other, tolerance):
        causes.append(
            f"batch normalization ({_names(reference)}): each rank's running statistics follow its own micro batches;"
            " use GroupNorm or LayerNorm, or synchronized batch norms"
        )
    if not causes:
        causes.append(
            "a nondeterministic kernel, or rounding that is amplified by the model (ReLU, max pooling) or by Adam, if a"
            " gradient is nothing but rounding (the bias of attention's keys)"
        )
    return causes


def _of_the_size(reference: Trace, other: Trace) -> list[str]:
    """Return what depends on the micro batch size in this module."""
    followers = ["dropout masks"] * (reference.draws or other.draws)
    followers += [f"batch norms ({_names(reference)})"] * bool(reference.batch_norms)
    causes = []
    if followers:
        causes.append(
            f"{_sizes(reference, other)}: {' and '.join(followers)} depend on it; compare layouts of the same size, or"
            " switch them off"
        )
    if not reference.is_task:
        causes.append(
            "a mean of means: the module does not leave its loss to disttrain.Task, so every micro batch counts"
            f" equally, whatever its weight; here with {_sizes(reference, other)}"
        )
    return causes


def _of_neighbours(reference: Trace, other: Trace) -> str:
    return (
        f"{_sizes(reference, other)}: the result of a sample depends on the rest of its micro batch (a contrastive"
        " loss, a norm over the batch)"
    )


def _sizes(reference: Trace, other: Trace) -> str:
    return f"another micro batch size ({other.micro_batch_size} instead of {reference.micro_batch_size})"


def _names(reference: Trace) -> str:
    return ", ".join(reference.batch_norms[:3])


def _only_rounding(reference: Trace, other: Trace, tolerance: float) -> bool:
    last = max(set(reference.steps) & set(other.steps))
    return not first_unlike(reference.weights(last), other.weights(last), tolerance)
