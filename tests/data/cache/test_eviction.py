"""Plans: what a step reads is in the plan for that step, and what other processes need is known."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from disttrain.data.cache.eviction import FAR, Plan, Plans, remove_if_dead
from disttrain.data.order.mixture import Mixture, Portion
from disttrain.data.order.sample_order import Needs, Order, OrderConfig

quick = settings(derandomize=True, deadline=None, max_examples=60)


def assert_covered(order: Order | Mixture, sizes: list[int], epoch: int, positions: tuple[int, int]) -> None:
    """Every shard that a step reads is needed in that step, and nothing is needed that no step reads near."""
    starts = np.concatenate(([0], np.cumsum(sizes)))
    needs = order.shard_needs(epoch, positions)
    assert (needs.first >= 0).all()
    assert (needs.first <= needs.last).all()
    assert (np.array(sizes)[needs.shards] > 0).all()
    for step in range(order.steps_per_epoch):
        ids = order.sample_ids(epoch, step, 1, positions)
        read = set((np.searchsorted(starts, ids.ravel(), side="right") - 1).tolist())
        needed = set(needs.shards[(needs.first <= step) & (step <= needs.last)].tolist())
        assert read <= needed, f"step {step} reads {read - needed} unplanned"


@quick
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 24),
    st.sampled_from([1, 5, 16, 1000]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
    st.sampled_from([(0, 8), (0, 4), (4, 8), (6, 8), (3, 5)]),
)
def test_an_orders_needs_cover_its_reads(
    sizes: list[int], window: int, lanes: int, epoch: int, positions: tuple[int, int]
) -> None:
    order = Order(sizes, OrderConfig(8, seed=3, lanes=lanes, window=window))
    assert_covered(order, sizes, epoch, positions)


@quick
@given(st.floats(0.05, 20), st.integers(0, 2), st.sampled_from([50, 1000]))
def test_a_mixtures_needs_cover_its_reads(weight: float, epoch: int, window: int) -> None:
    sizes = [[30, 0, 70], [7], [25, 16, 60, 2]]
    portions = [
        Portion(f"{n}", tuple(own), w) for n, (own, w) in enumerate(zip(sizes, (1.0, weight, 2.0), strict=True))
    ]
    order = Mixture(portions, OrderConfig(8, seed=3, window=window))
    assert_covered(order, [size for own in sizes for size in own], epoch, (2, 6))


def test_a_rank_needs_few_shards_at_a_time() -> None:
    sizes = [100] * 64
    needs = Order(sizes, OrderConfig(8, lanes=8, window=100)).shard_needs(0, (0, 2))
    assert len(set(needs.shards.tolist())) <= 20, "more than the shards of two of eight lanes"
    at_once = [int(((needs.first <= step) & (step <= needs.last)).sum()) for step in range(800)]
    assert max(at_once) <= 6


def needs_of(*rows: tuple[int, int, int]) -> Needs:
    return Needs(*np.array(rows, dtype=np.int64).T)


def test_the_nearest_need_of_all_processes_counts(tmp_path: Path) -> None:
    names = [letter * 32 for letter in "abcd"]
    one = Plan(tmp_path, names, needs_of((0, 0, 9), (1, 10, 19), (1, 40, 49), (2, 30, 39)), 5)
    other = Plan(tmp_path, names, needs_of((2, 8, 9)), 0)
    plans = Plans(tmp_path)
    assert plans.steps_until(names).tolist() == [0, 5, 8, np.inf]
    one.stand_at(25)
    other.stand_at(10)
    assert plans.steps_until(names).tolist() == [np.inf, 15, 5, np.inf]
    one.close()
    assert plans.steps_until(names).tolist() == [np.inf] * 4
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_process_that_is_gone_does_not_count(tmp_path: Path) -> None:
    plan = Plan(tmp_path, ["a" * 32], needs_of((0, 0, 9)), 0)
    os.close(plan._fd)  # what the kernel does for it
    assert Plans(tmp_path).steps_until(["a" * 32]).tolist() == [np.inf]
    assert list(tmp_path.iterdir()) == []


def test_what_will_be_needed_some_time(tmp_path: Path) -> None:
    names = [letter * 32 for letter in "abc"]
    plans = [Plan(tmp_path, names, needs_of((0, 10**12, 10**12)), 0), Plan(tmp_path, names, needs_of((1, FAR, FAR)), 0)]
    planned, some_time, never = Plans(tmp_path).steps_until(names).tolist()
    assert planned < some_time < never == np.inf
    for plan in plans:
        plan.close()


@quick
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 9)), max_size=12), max_size=3),
    st.lists(st.integers(0, 30), min_size=3, max_size=3),
    st.integers(0, 20),
)
def test_plans_by_brute_force(rows: list[list[tuple[int, int, int]]], stands: list[int], steps: int) -> None:
    names, sizes = [letter * 32 for letter in "fbdace"], [1, 2, 4, 8, 16, 32]
    until = [np.inf] * 6
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for own, now in zip(rows, stands, strict=False):
            needs = Needs(
                *np.array([(s, first, first + long) for s, first, long in own], dtype=np.int64).reshape(-1, 3).T
            )
            made.append(Plan(Path(folder), names, needs, now, sizes))
            for shard, first, long in own:
                if first + long >= now:
                    until[shard] = min(until[shard], max(0, first - now))
        plans = Plans(Path(folder))
        assert plans.steps_until(names).tolist() == until
        needed = sum(size for size, when in zip(sizes, until, strict=True) if when < steps)
        assert plans.need_more(needed - 1, steps) or not needed
        assert not plans.need_more(needed, steps)
        for plan in made:
            plan.close()


@pytest.mark.parametrize("count", [0, 1])
def test_small_plans(tmp_path: Path, count: int) -> None:
    needs = Needs(*(np.zeros(count, dtype=np.int64) for _ in range(3)))
    plan = Plan(tmp_path, ["a" * 32], needs, 0)
    with open(plan.path) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert Plans(tmp_path).steps_until([]).tolist() == []
    plan.close()


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    needs = Needs(*np.zeros((3, 1000), dtype=np.int64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that it is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            Plan(tmp_path, ["a"], needs, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)
    assert os.listdir(tmp_path) == []
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [path for path in open_files if path.startswith(str(tmp_path))], "a descriptor stayed open"


def test_what_is_another_users_is_left_alone() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)  # as a shared folder is: all may write, none may remove another's files
        closed, sticky = Path(folder, "closed.plan"), Path(folder, "sticky.plan")
        for path in (closed, sticky):
            path.write_bytes(bytes(8))
        closed.chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            assert not remove_if_dead(closed), "a file that may not be opened was thought dead"
            Plans(Path(folder)).steps_until(["a" * 32])
        finally:
            if is_root:
                os.seteuid(0)
        assert closed.exists()
        assert not is_root or sticky.exists(), "not this user's to remove"
