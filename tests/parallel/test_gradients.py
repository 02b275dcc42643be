"""Gradients that are not sharded: their norm, scaling and clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from disttrain.parallel import gradients
from disttrain.parallel.gradients import (
    clip_gradient_norm,
    clip_gradient_value,
    gradient_norm,
    local_gradients,
    ordered_gradient_norm,
    scale_gradients,
)

quick = settings(derandomize=True, deadline=None, max_examples=60)
TYPES = (torch.float32, torch.float64, torch.bfloat16)


def parameters(*grads: torch.Tensor | None) -> list[nn.Parameter]:
    out = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(3) if grad is None else torch.zeros_like(grad))
        parameter.grad = None if grad is None else grad.clone()
        out.append(parameter)
    return out


def grads_of(seed: int, shapes: list[tuple[int, ...]], types: list[torch.dtype]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(types[i % len(types)]) for i, shape in enumerate(shapes)]


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6)
types = st.lists(st.sampled_from(TYPES), min_size=1, max_size=3)


@quick
@given(st.integers(0, 999), shapes, types)
def test_the_norm_is_that_of_all_gradients_in_double(
    seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype]
) -> None:
    grads = grads_of(seed, sizes, kinds)
    expected = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))
    norm = gradient_norm(parameters(*grads, None))
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    assert float(norm) == pytest.approx(expected, rel=1e-12)


def test_the_norm_of_large_and_small_gradients_neither_overflows_nor_vanishes() -> None:
    assert float(gradient_norm(parameters(torch.tensor([3e30, 4e30])))) == pytest.approx(5e30, rel=1e-6)
    assert float(gradient_norm(parameters(torch.tensor([3e-30, 4e-30])))) == pytest.approx(5e-30, rel=1e-6)


def test_the_norm_is_that_of_torch() -> None:
    grads = grads_of(0, [(30, 20), (20,), (7, 3, 2)], [torch.float32])
    theirs = nn.utils.get_total_norm(grads)
    assert float(gradient_norm(parameters(*grads))) == pytest.approx(float(theirs), rel=1e-6)


@quick
@given(st.integers(0, 999), shapes, types)
def test_the_ordered_norm_is_the_norm(seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype]) -> None:
    grads = parameters(*grads_of(seed, sizes, kinds), None)
    norm = ordered_gradient_norm(grads)
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    assert float(norm) == pytest.approx(float(gradient_norm(grads)), rel=1e-12)


@quick
@given(st.integers(0, 999), st.integers(1, 40), st.integers(0, 70), st.integers(1, 7), st.integers(1, 500))
def test_the_ordered_norm_sums_rows_alike_wherever_they_lie(
    seed: int, num_rows: int, width: int, ranks: int, at_a_time: int
) -> None:
    grad = grads_of(seed, [(num_rows, width)], [torch.float32])[0]
    share = -(-num_rows // ranks)
    with pytest.MonkeyPatch.context() as patch:
        whole = gradients._own_rows(grad, 0, num_rows)
        patch.setitem(gradients._ROWS_ELEMENTS, "cpu", at_a_time)
        parts = [gradients._own_rows(grad, rank, share) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts)[:num_rows], whole)
    np.testing.assert_allclose(whole, (grad.double() ** 2).sum(1), rtol=1e-12)


def test_the_ordered_norm_changes_no_gradient() -> None:
    double = parameters(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert float(ordered_gradient_norm(double)) == 5
    assert double[0].grad is not None
    assert double[0].grad.tolist() == [[3, 4]]


def test_without_gradients_the_norm_is_zero_and_nothing_happens() -> None:
    for nothing in ([], parameters(None, None)):
        assert float(gradient_norm(nothing)) == float(ordered_gradient_norm(nothing)) == 0
        assert float(clip_gradient_norm(nothing, 1.0)) == 0
        scale_gradients(nothing, torch.tensor(2.0))
        assert local_gradients(nothing) == []


def test_local_gradients_share_memory() -> None:
    (parameter,) = parameters(torch.ones(3))
    local_gradients([parameter])[0].mul_(2)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2, 2, 2]


@quick
@given(st.integers(0, 999), shapes, types, st.floats(-4, 4))
def test_scaling_rounds_once(seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype], factor: float) -> None:
    grads = grads_of(seed, sizes, kinds)
    scaled = parameters(*grads, None)
    scale_gradients(scaled, torch.tensor(factor, dtype=torch.float64))
    for parameter, grad in zip(scaled, grads, strict=False):
        wide = torch.promote_types(grad.dtype, torch.float32)  # half precision is multiplied in float32
        expected = (grad.to(wide) * torch.tensor(factor, dtype=wide)).to(grad.dtype)
        assert parameter.grad is not None
        assert parameter.grad.dtype == grad.dtype
        assert torch.equal(parameter.grad, expected), f"{grad.dtype}: {parameter.grad} instead of {expected}"


@quick
@given(st.integers(0, 999), shapes, types, st.floats(1e-3, 0.999))
def test_clipping_brings_the_norm_to_the_bound_and_keeps_the_direction(
    seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype], share: float
) -> None:
    grads = grads_of(seed, sizes, kinds)
    before = float(gradient_norm(parameters(*grads)))
    clipped = parameters(*grads)
    told = clip_gradient_norm(clipped, share * before)
    assert float(told) == before, "the norm before clipping is told"
    after = float(gradient_norm(clipped))
    rounding = 2**-7 if torch.bfloat16 in kinds else 1e-6
    assert after == pytest.approx(share * before, rel=rounding)
    for parameter, grad in zip(clipped, grads, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.double(), grad.double() * share, rtol=2 * rounding, atol=1e-30)


@quick
@given(st.integers(0, 999), shapes, types, st.floats(1, 1e6), st.floats(1e-8, 1e3))
def test_clipping_within_the_bound_changes_no_bit(
    seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype], slack: float, scale: float
) -> None:
    grads = [grad * scale for grad in grads_of(seed, sizes, kinds)]
    norm = float(gradient_norm(parameters(*grads)))
    clipped = parameters(*grads)
    clip_gradient_norm(clipped, norm * slack)  # a slack of 1 is the bound itself
    for parameter, grad in zip(clipped, grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad), f"norm {norm}, bound {norm * slack}: {parameter.grad - grad}"


def test_clipping_half_precision_comes_to_the_bound_itself() -> None:
    """A factor that is rounded to bfloat16 is up to 0.4% off, for all elements alike."""
    grads = parameters(
        torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.ones((), dtype=torch.bfloat16),
    )
    for bound in (300.0, 211.0, 97.3):
        clip_gradient_norm(grads, bound)
        assert float(gradient_norm(grads)) == pytest.approx(bound, rel=1e-4)


def test_clipping_zeros_leaves_zeros() -> None:
    clipped = parameters(torch.zeros(4))
    assert float(clip_gradient_norm(clipped, 1.0)) == 0
    assert clipped[0].grad is not None
    assert clipped[0].grad.tolist() == [0] * 4


def test_clipping_what_is_not_a_number_keeps_it_visible() -> None:
    clipped = parameters(torch.tensor([1.0, math.nan]), torch.ones(2))
    assert math.isnan(float(clip_gradient_norm(clipped, 1.0)))
    assert clipped[0].grad is not None
    assert math.isnan(float(clipped[0].grad[1])), "a gradient that is no number was hidden"


def test_parameters_may_come_from_a_generator() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = clip_gradient_norm(model.parameters(), 0.5)
    assert float(norm) == pytest.approx(math.sqrt(8))
    assert float(gradient_norm(model.parameters())) == pytest.approx(0.5)


@quick
@given(st.integers(0, 999), shapes, types, st.floats(1e-3, 2))
def test_clipping_by_value_clamps_each_element_and_tells_the_norm_before(
    seed: int, sizes: list[tuple[int, ...]], kinds: list[torch.dtype], bound: float
) -> None:
    grads = grads_of(seed, sizes, kinds)
    clipped = parameters(*grads, None)
    assert float(clip_gradient_value(clipped, bound)) == float(gradient_norm(parameters(*grads)))
    for parameter, grad in zip(clipped, grads, strict=False):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad.clamp(-bound, bound)), f"{grad.dtype}, bound {bound}"


def test_clipping_by_value_keeps_what_is_not_a_number_visible() -> None:
    clipped = parameters(torch.tensor([1.0, math.nan, math.inf]), torch.ones(2))
    assert math.isnan(float(clip_gradient_value(clipped, 0.5)))
    assert clipped[0].grad is not None
    assert clipped[0].grad.isnan().tolist() == [False, True, False]
    assert float(clip_gradient_value([], 1.0)) == 0
