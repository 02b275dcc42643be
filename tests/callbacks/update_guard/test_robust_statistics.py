"""What counts as far above the usual, where values spread and where they do not."""

from __future__ import annotations

import math

import pytest
import torch

from disttrain.callbacks.update_guard.robust_statistics import Usual


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def after(losses: list[float], window: int = 16) -> Usual:
    """What is usual after steps of these losses, whose norms were all about 1."""
    usual, fine = Usual(window), torch.tensor(False)
    for number, loss in enumerate(losses):
        usual.add(scalar(1 + 0.1 * (number % 3)), scalar(loss), but=fine)
    return usual


@pytest.mark.parametrize(
    ("losses", "fine", "spike"),
    [
        ([1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.3, 0.7], 2.4, 10.0),
        ([1.0] * 8, 1.09, 1.2),  # no spread: a hundredth of the usual is a deviation
        ([1.0] * 6 + [0.9, 1.5], 1.6, 5.0),  # most are equal: the median deviation is zero
        ([0.0] * 6 + [3.0, 4.0], 5.0, 100.0),  # as of a loss with a margin
        ([0.0] * 8, 1e9, math.inf),  # nothing says how large one may be
        ([-5.0] * 8, -4.6, -4.4),
    ],
)
def test_a_spike_is_far_above_the_usual(losses: list[float], fine: float, spike: float) -> None:
    usual = after(losses)
    assert not bool(usual.is_spike(scalar(1.0), scalar(fine), deviations=10))
    assert math.isinf(spike) or bool(usual.is_spike(scalar(1.0), scalar(spike), deviations=10))
    assert bool(usual.is_spike(scalar(100.0), scalar(min(losses)), deviations=10)), "of the norm"


def test_what_is_usual_has_to_be_learned_and_is_saved() -> None:
    assert not bool(after([1.0] * 3).is_spike(scalar(1e9), scalar(1e9), deviations=10)), "less than a quarter is known"
    usual = after([1.0 + 0.01 * number for number in range(20)])  # more than the window
    again = Usual(16)
    again.load(usual.state())
    assert again.state() == usual.state()
    assert usual.state()["recent_losses"] == [1.0 + 0.01 * number for number in range(4, 20)]
    usual.add(scalar(7.0), scalar(7.0), but=torch.tensor(True))
    assert again.state() == usual.state(), "a step that was left out is not usual"
