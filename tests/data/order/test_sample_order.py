"""The order: exactly once, the same for every number of ranks, and reached at any position without a replay."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from disttrain.data.order.sample_order import DEFAULT_WINDOW, ORDER_VERSION, Order, OrderConfig, evaluation_ids
from disttrain.errors import ConfigError, DataError
from disttrain.parallel.config import divisors

quick = settings(derandomize=True, deadline=None, max_examples=80)
Ids = NDArray[np.int64]
Setting = tuple[list[int], OrderConfig]


@st.composite
def setups(draw: st.DrawFn) -> Setting:
    """Sizes of shards (some may be empty) and a configuration that fits them."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10).filter(any))
    batch = draw(st.integers(1, sum(sizes)))
    lanes = draw(st.sampled_from([0, *divisors(batch)]))
    return sizes, OrderConfig(batch, seed=draw(st.integers(0, 2**63 - 1)), lanes=lanes, window=draw(st.integers(1, 50)))


def whole_epoch(order: Order, epoch: int) -> Ids:
    return order.sample_ids(epoch, 0, order.steps_per_epoch)


def left_out(order: Order, epoch: int) -> set[int]:
    return set(range(order.num_samples)) - set(whole_epoch(order, epoch).ravel().tolist())


@quick
@given(setups(), st.integers(0, 2**40))
def test_an_epoch_delivers_no_sample_twice_and_leaves_out_less_than_a_batch(setup: Setting, epoch: int) -> None:
    sizes, config = setup
    order = Order(sizes, config)
    ids = whole_epoch(order, epoch)
    total, batch = sum(sizes), config.global_batch_size
    assert ids.shape == (total // batch, batch)
    assert ids.dtype == np.int64
    values, counts = np.unique(ids, return_counts=True)
    assert counts.max() == 1, f"samples {values[counts > 1]} come more than once"
    assert (values[0] >= 0, values[-1] < total) == (True, True), f"ids {values[0]}..{values[-1]} of {total} samples"
    assert total - len(values) < batch, f"{total - len(values)} samples are left out of a global batch of {batch}"


@quick
@given(setups(), st.integers(0, 5), st.data())
def test_every_number_of_ranks_reads_the_same_global_batches(setup: Setting, epoch: int, data: st.DataObject) -> None:
    sizes, config = setup
    batch = config.global_batch_size
    expected = whole_epoch(Order(sizes, config), epoch)
    steps = len(expected)
    for ranks in divisors(batch):
        share = batch // ranks
        first = data.draw(st.integers(0, steps - 1))
        parts = [
            Order(sizes, config).sample_ids(epoch, first, steps - first, (rank * share, (rank + 1) * share))
            for rank in range(ranks)
        ]
        np.testing.assert_array_equal(
            np.concatenate(parts, axis=1), expected[first:], f"{ranks} ranks read other global batches from {first} on"
        )


@quick
@given(setups(), st.integers(0, 5), st.data())
def test_any_cut_of_steps_and_positions_is_a_part_of_the_epoch(setup: Setting, epoch: int, data: st.DataObject) -> None:
    sizes, config = setup
    order = Order(sizes, config)
    expected = whole_epoch(Order(sizes, config), epoch)
    step = 0
    while step < len(expected):
        count = data.draw(st.integers(1, len(expected) - step))
        low = data.draw(st.integers(0, config.global_batch_size - 1))
        high = data.draw(st.integers(low + 1, config.global_batch_size))
        np.testing.assert_array_equal(
            order.sample_ids(epoch, step, count, (low, high)),
            expected[step : step + count, low:high],
            f"steps {step}..{step + count}, positions {low}..{high}",
        )
        step += count


@quick
@given(setups(), st.data())
def test_what_was_asked_before_changes_nothing(setup: Setting, data: st.DataObject) -> None:
    sizes, config = setup
    used = Order(sizes, config)
    batch = config.global_batch_size
    places = st.tuples(st.integers(0, 3), st.integers(0, used.steps_per_epoch - 1))
    ranges = st.tuples(st.integers(0, batch - 1), st.integers(1, batch)).filter(lambda r: r[0] < r[1])
    for (epoch, step), positions in data.draw(st.lists(st.tuples(places, ranges), min_size=1, max_size=12)):
        np.testing.assert_array_equal(
            used.sample_ids(epoch, step, 1, positions),
            Order(sizes, config).sample_ids(epoch, step, 1, positions),
            f"positions {positions} of step {step} of epoch {epoch} depend on what was asked before",
        )


@quick
@given(setups(), st.integers(0, 3))
def test_shuffling_moves_samples_inside_the_windows_of_a_lane_only(setup: Setting, epoch: int) -> None:
    sizes, config = setup
    batch, lanes, window = config.global_batch_size, config.num_lanes, config.window
    shuffled = whole_epoch(Order(sizes, config), epoch)
    plain = whole_epoch(Order(sizes, replace(config, window=1)), epoch)

    def by_lane(ids: Ids) -> Ids:
        steps = len(ids)
        return ids.reshape(steps, lanes, batch // lanes).transpose(1, 0, 2).reshape(lanes, -1)

    for lane, (ours, unshuffled) in enumerate(zip(by_lane(shuffled), by_lane(plain), strict=True)):
        for start in range(0, len(ours), window):
            here = slice(start, start + window)
            assert sorted(ours[here]) == sorted(unshuffled[here]), f"lane {lane}, window at {start}: other samples"
    # Without the shuffle, lanes laid end to end are whole shards, one after the other, rotated.
    sequence = by_lane(plain).ravel()
    starts = np.cumsum([0, *sizes])
    breaks = np.flatnonzero(np.diff(sequence) != 1)
    for at in breaks.tolist():
        ends, begins = sequence[at] + 1, sequence[at + 1]
        assert ends in starts, f"the sequence leaves a shard before its end, after sample {sequence[at]}"
        assert begins in starts, f"the sequence enters a shard at sample {begins}"


@quick
@given(st.integers(2, 60), st.data())
def test_over_one_shard_every_sample_is_left_out_equally_often(total: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, total))
    order = Order([total], OrderConfig(batch, seed=data.draw(st.integers(0, 99)), window=data.draw(st.integers(1, 9))))
    absences = np.zeros(total, dtype=np.int64)
    for epoch in range(total):
        absences[list(left_out(order, epoch))] += 1
    remainder = total % batch
    assert absences.tolist() == [remainder] * total, f"N = {total}, G = {batch}: left out {absences} times"


@quick
@given(st.integers(2, 500), st.integers(0, 2**62), st.data())
def test_epochs_in_a_row_leave_out_different_remainders(total: int, seed: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(2, total).filter(lambda g: total % g != 0) if total > 2 else st.just(2))
    order = Order([total], OrderConfig(batch, seed=seed))
    if total % batch:
        first = data.draw(st.integers(0, 1000))
        assert left_out(order, first) != left_out(order, first + 1), f"epochs {first} and {first + 1}"


@quick
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(0, 2**62), st.data())
def test_over_several_shards_the_remainder_is_drawn_anew(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Not by a rule as over one shard: two epochs may agree, where little is left out of little. Many never do."""
    total = sum(sizes)
    divisible = [g for g in range(2, total) if total % g]
    if total >= 12 and divisible:
        order = Order(sizes, OrderConfig(data.draw(st.sampled_from(divisible)), seed=seed))
        remainders = {frozenset(left_out(order, epoch)) for epoch in range(12)}
        assert len(remainders) > 3, f"{len(remainders)} remainders in 12 epochs"


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {seed: Order([100] * 5, OrderConfig(20, seed=seed)) for seed in (0, 1, 2**63 - 1)}
    seen = {whole_epoch(order, epoch).tobytes() for order in orders.values() for epoch in (0, 1, 2, 2**40)}
    assert len(seen) == 12


def test_every_place_of_an_epoch_is_equally_likely() -> None:
    """Where a sample comes is uniform over epochs: chi-squared over 12 places, at 1 in 10,000 (11 degrees: 37.4)."""
    order = Order([3, 4, 5], OrderConfig(1, seed=7))
    epochs = 2400
    places = np.array([np.argsort(whole_epoch(order, epoch).ravel()) for epoch in range(epochs)])
    for sample in range(12):
        counts = np.bincount(places[:, sample], minlength=12)
        statistic = float(((counts - epochs / 12) ** 2 / (epochs / 12)).sum())
        assert statistic < 37.4, f"sample {sample} comes at the 12 places {counts} times"


@pytest.mark.parametrize(
    ("sizes", "config", "epoch", "expected"),
    [
        ([10], OrderConfig(2), 0, "80a49b05b53b2cf9"),
        ([1000] * 10, OrderConfig(64), 0, "6eb2410b395c8399"),
        ([1000] * 10, OrderConfig(64), 3, "be6a4cd3ffe8070f"),
        ([7, 0, 300, 41, 5], OrderConfig(12, seed=2**63 - 1, lanes=4, window=10), 1, "a18f6afcc05c05ef"),
        ([50_000, 20_000], OrderConfig(1000, seed=42, lanes=1), 2, "2f234c1ad2041c41"),
        (list(range(1, 200)), OrderConfig(96, seed=5, window=1), 0, "d49ca3e11419633f"),
    ],
)
def test_the_order_is_frozen(sizes: list[int], config: OrderConfig, epoch: int, expected: str) -> None:
    """The same configuration gives the same order for ever, whatever the version of NumPy or disttrain.

    A change of these hashes must raise ``ORDER_VERSION``: checkpoints of older versions are then refused.
    """
    assert ORDER_VERSION == 1
    found = hashlib.sha256(whole_epoch(Order(sizes, config), epoch).astype("<i8").tobytes()).hexdigest()[:16]
    assert found == expected, f"another order of {config} in epoch {epoch}: {found}"


def test_a_billion_samples_in_memory_of_the_shards_alone() -> None:
    shards = 100_000
    tracemalloc.start()
    try:
        order = Order(np.full(shards, 10_000), OrderConfig(1024, seed=1))
        steps = (0, 1, order.steps_per_epoch // 2, order.steps_per_epoch - 1)
        seen = [order.sample_ids(5, step, 1, (256, 512)) for step in steps]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    lanes = 256 // (1024 // 64)
    allowed = 100 * shards + 6 * 8 * lanes * DEFAULT_WINDOW  # a few numbers a shard, a few windows of the lanes read
    assert peak < allowed, f"{peak / 2**20:.1f} MiB, allowed {allowed / 2**20:.1f} MiB"
    values = np.concatenate(seen).ravel()
    assert len(np.unique(values)) == len(values), "a sample comes twice"
    assert (values.min() >= 0, values.max() < 10**9) == (True, True), "an id is out of range"
    assert len(np.unique(values // 10_000)) > 30, "batches draw from few shards"


@pytest.mark.parametrize("num_shards", [20, 100_000])
def test_4096_ranks_partition_a_step(num_shards: int) -> None:
    sizes, config = np.full(num_shards, 10_000), OrderConfig(8192, seed=3)
    order = Order(sizes, config)
    last = order.steps_per_epoch - 1
    parts = [order.sample_ids(1, last, 1, (2 * rank, 2 * rank + 2)) for rank in range(4096)]
    whole = Order(sizes, config).sample_ids(1, last)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert len(np.unique(whole)) == 8192, "a sample comes twice"
    for rank in (0, 1234, 4095):  # as a process of its own would ask
        mine = Order(sizes, config).sample_ids(1, last, 1, (2 * rank, 2 * rank + 2))
        np.testing.assert_array_equal(mine, parts[rank], f"rank {rank}")


def test_a_rank_touches_only_the_shards_of_its_lanes() -> None:
    order = Order([1000] * 256, OrderConfig(512, seed=3))
    rank_ids = order.sample_ids(0, 0, order.steps_per_epoch, (0, 64))
    touched = len(np.unique(rank_ids // 1000))
    assert touched <= 256 // 8 + 2, f"one of 8 ranks touches {touched} of 256 shards"


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (64, 64), (96, 48), (65, 13), (127, 1), (1024, 64), (130, 26)])
def test_lanes_are_the_largest_divisor_up_to_64(batch: int, lanes: int) -> None:
    assert OrderConfig(batch).num_lanes == lanes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_batch_size": 0}, ["global_batch_size is 0", "at least 1"]),
        ({"global_batch_size": 8, "seed": -1}, ["seed is -1", "2**63 - 1"]),
        ({"global_batch_size": 8, "seed": 2**63}, [f"seed is {2**63}"]),
        ({"global_batch_size": 8, "window": 0}, ["window is 0", "1 disables shuffling"]),
        ({"global_batch_size": 8, "lanes": 3}, ["lanes is 3", "global_batch_size 8", "divisor"]),
        ({"global_batch_size": 8, "lanes": -1}, ["lanes is -1"]),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        OrderConfig(**arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, 4]])
def test_fewer_samples_than_a_global_batch_are_refused(sizes: list[int]) -> None:
    with pytest.raises(DataError, match=f"holds {sum(sizes)} samples, fewer than one global batch of 8"):
        Order(sizes, OrderConfig(8))


@pytest.mark.parametrize(
    ("first", "count", "positions"),
    [(-1, 1, None), (0, 6, None), (5, 1, None), (0, 1, (0, 9)), (0, 1, (-1, 3)), (0, 1, (4, 4)), (0, 1, (5, 4))],
)
def test_what_is_outside_of_an_epoch_is_refused(first: int, count: int, positions: tuple[int, int] | None) -> None:
    with pytest.raises(IndexError):
        Order([40], OrderConfig(8)).sample_ids(0, first, count, positions)


def test_equal_fingerprints_mean_equal_orders() -> None:
    config = OrderConfig(8, seed=1, lanes=0, window=100)
    base = Order([20, 30], config).fingerprint()
    assert base == Order(np.array([20, 30], dtype=np.int32), replace(config, lanes=8)).fingerprint()
    others = {
        "seed": Order([20, 30], replace(config, seed=2)),
        "global_batch_size": Order([20, 30], replace(config, global_batch_size=16, lanes=8)),
        "lanes": Order([20, 30], replace(config, lanes=4)),
        "window": Order([20, 30], replace(config, window=99)),
        "shards": Order([30, 20], config),
    }
    for name, order in others.items():
        different = [key for key, value in order.fingerprint().items() if value != base[key]]
        assert different == [name], f"another {name} changes {different} of the fingerprint"
    assert Order([20, 31], config).fingerprint()["num_samples"] == 51


@settings(quick, max_examples=150)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 24))
def test_evaluation_delivers_every_sample_once_over_all_ranks(total: int, micro: int, ranks: int) -> None:
    shares = [evaluation_ids(total, micro, ranks, rank) for rank in range(ranks)]
    lengths = {len(ids) for ids, _ in shares}
    assert len(lengths) == 1, f"ranks run {lengths} micro batches"
    assert all(ids.shape == (len(counts), micro) for ids, counts in shares)
    rows = [row[:count] for ids, counts in shares for row, count in zip(ids, counts.tolist(), strict=True)]
    real = np.concatenate(rows)
    np.testing.assert_array_equal(real, np.arange(total), "not every sample once, in order")
    padding = [row[count:] for ids, counts in shares for row, count in zip(ids, counts.tolist(), strict=True)]
    assert not np.concatenate(padding).any(), "padding is not sample 0"
    alone, alone_counts = evaluation_ids(total, micro, 1, 0)
    expected = [row[:count].tolist() for row, count in zip(alone, alone_counts.tolist(), strict=True)]
    assert [row.tolist() for row in rows if len(row)] == expected, f"{ranks} ranks mix other micro batches than one"


@pytest.mark.parametrize(("total", "ranks"), [(1, 1), (1, 7), (3, 8)])
def test_ranks_without_samples_of_their_own_run_padding(total: int, ranks: int) -> None:
    counts = [evaluation_ids(total, 1, ranks, rank)[1].tolist() for rank in range(ranks)]
    assert counts == [[1]] * total + [[0]] * (ranks - total)


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        evaluation_ids(0, 4, 1, 0)
