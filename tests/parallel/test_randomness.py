"""Random numbers keyed by seed, step and micro batch, not by the rank that draws them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from disttrain.parallel.randomness import mix, seed_micro_batch

quick = settings(derandomize=True, deadline=None, max_examples=100)
CPU = torch.device("cpu")
words = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def generator_restored() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of Vigna's reference splitmix64.c for the states 0 and 1234567."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


def test_the_keys_are_frozen() -> None:
    """Another value would give a resumed run other dropout masks than the run it goes on with."""
    assert mix(0, 0, 0) == 0x238275BC38FCBE91
    assert mix(42, 1000, 7) == 0x1D246A902CF48C5F


@quick
@given(st.lists(st.tuples(words, words, words), min_size=2, max_size=20, unique=True))
def test_other_places_have_other_keys(places: list[tuple[int, int, int]]) -> None:
    keys = [mix(*place) for place in places]
    assert len(set(keys)) == len(keys), f"two of {places} share a key"
    assert all(0 <= key < 2**64 for key in keys)


def test_neighbouring_places_have_keys_without_a_pattern() -> None:
    keys = [mix(seed, step, micro) for seed in range(10) for step in range(50) for micro in range(20)]
    assert len(set(keys)) == 10_000
    for bit in range(64):
        ones = sum(key >> bit & 1 for key in keys)
        assert abs(ones - 5000) < 300, f"bit {bit} is set in {ones} of 10,000 keys"


def test_the_order_of_the_values_counts() -> None:
    assert len({mix(1, 2, 3), mix(3, 2, 1), mix(2, 1, 3), mix(1, 2), mix(0, 1, 2, 3)}) == 5


@quick
@given(words, st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 50))
def test_a_micro_batch_draws_the_same_masks_whatever_was_drawn_before(
    seed: int, step: int, micro: int, drawn: int
) -> None:
    dropout = nn.Dropout(0.5)
    seed_micro_batch(seed, step, micro, CPU)
    first = dropout(torch.ones(64))
    torch.rand(drawn)
    seed_micro_batch(seed, step, micro + 1, CPU)
    other = dropout(torch.ones(64))
    seed_micro_batch(seed, step, micro, CPU)
    assert torch.equal(dropout(torch.ones(64)), first)
    assert not torch.equal(other, first), "two micro batches share their masks"
