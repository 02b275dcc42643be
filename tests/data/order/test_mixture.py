"""Mixtures: exact quotas, per-source epochs, elasticity, and errors."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from disttrain import ShardedDataModule
from disttrain.data.order.mixture import Mixture, Portion
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.splits import SourceConfig
from disttrain.errors import ConfigError, DataError
from disttrain.parallel.config import divisors
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli
from tests.support.weights import differing, distance, final_weights

checked = settings(derandomize=True, deadline=None, max_examples=60)
portions = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.05, 1.0)), min_size=1, max_size=4
).map(lambda drawn: [Portion(str(i), tuple(sizes), weight) for i, (sizes, weight) in enumerate(drawn)])


def mixture(parts: list[Portion], batch: int, seed: int = 0) -> Mixture:
    total = sum(sum(part.shard_sizes) for part in parts)
    return Mixture(parts, OrderConfig(min(batch, total), seed=seed))


def counts(mixed: Mixture, ids: np.ndarray) -> dict[str, int]:
    """Samples of each source among some ids, counted one by one."""
    bounds = np.cumsum([0] + [sum(part.shard_sizes) for part in mixed.portions])
    return {
        part.name: int(((ids >= low) & (ids < high)).sum())
        for part, low, high in zip(mixed.portions, bounds[:-1], bounds[1:], strict=True)
    }


@checked
@given(portions, st.integers(1, 24))
def test_quotas_are_exact_in_every_period(parts: list[Portion], batch: int) -> None:
    mixed = mixture(parts, batch)
    steps = min(2 * mixed.period, 60)
    ids = np.concatenate([mixed.sample_ids(*divmod(step, mixed.steps_per_epoch)) for step in range(steps)])
    assert counts(mixed, ids) == mixed.counts_of(steps)
    assert mixed.counts_of(mixed.period) == {p.name: q for p, q in zip(parts, mixed.quotas.tolist(), strict=True)}
    exact = (
        np.array([part.weight for part in parts])
        / sum(part.weight for part in parts)
        * mixed.period
        * mixed.config.global_batch_size
    )
    assert np.abs(mixed.quotas - exact).max() < 1.0


@checked
@given(portions, st.sampled_from([6, 12, 16, 24]), st.integers(0, 5))
def test_ranks_and_random_access_give_the_same_order(parts: list[Portion], batch: int, epoch: int) -> None:
    mixed = mixture(parts, batch)
    size, steps = mixed.config.global_batch_size, min(mixed.steps_per_epoch, 9)
    whole = mixed.sample_ids(epoch, 0, steps)
    again = mixture(parts, batch)
    for step in reversed(range(steps)):
        np.testing.assert_array_equal(again.sample_ids(epoch, step)[0], whole[step])
    for ranks in divisors(size):
        each = size // ranks
        cut = [mixed.sample_ids(epoch, 0, steps, (r * each, (r + 1) * each)) for r in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(cut, axis=1), whole, err_msg=f"{ranks} ranks")


@checked
@given(portions, st.integers(1, 24), st.integers(1, 50), st.data())
def test_no_source_repeats_a_sample_within_an_epoch_of_its_own(
    parts: list[Portion], batch: int, window: int, data: st.DataObject
) -> None:
    """However often a source is gone through, and wherever its epochs begin in those of the run."""
    total = sum(sum(part.shard_sizes) for part in parts)
    mixed = Mixture(parts, OrderConfig(min(batch, total), seed=data.draw(st.integers(0, 99)), window=window))
    epochs = data.draw(st.integers(1, 4))
    ids = np.concatenate([mixed.sample_ids(e, 0, mixed.steps_per_epoch).ravel() for e in range(epochs)])
    start = 0
    for part in parts:
        size = sum(part.shard_sizes)
        drawn = ids[(ids >= start) & (ids < start + size)]
        # What one window does not hold is dealt out in rounds of up to 64: less than a round is left out.
        length = size if size <= window else size // min(size, 64) * min(size, 64)
        for first in range(0, len(drawn), length):
            own = drawn[first : first + length]
            assert len(np.unique(own)) == len(own), f"source {part.name}, epoch {first // length}: a sample twice"
        start += size


@checked
@given(portions, st.integers(1, 24), st.data())
def test_what_was_asked_before_changes_nothing(parts: list[Portion], batch: int, data: st.DataObject) -> None:
    used = mixture(parts, batch)
    size = used.config.global_batch_size
    places = st.tuples(st.integers(0, 3), st.integers(0, used.steps_per_epoch - 1), st.integers(0, size - 1))
    for epoch, step, low in data.draw(st.lists(places, min_size=1, max_size=8)):
        positions = (low, data.draw(st.integers(low + 1, size)))
        np.testing.assert_array_equal(
            used.sample_ids(epoch, step, 1, positions),
            mixture(parts, batch).sample_ids(epoch, step, 1, positions),
            f"positions {positions} of step {step} of epoch {epoch} depend on what was asked before",
        )


def test_a_billion_samples_resume_at_once_and_4096_ranks_partition_a_step() -> None:
    """A position is computed, not walked to: no array of a share of the samples is made. Measured at 40 ms."""
    parts = [Portion(name, (10_000,) * 50_000, weight) for name, weight in (("a", 3.0), ("b", 1.0))]
    draw = np.random.default_rng(0)
    mixed = Mixture(parts, OrderConfig(1024))
    tracemalloc.start()
    mixed.sample_ids(int(draw.integers(1, 99)), int(draw.integers(mixed.steps_per_epoch)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50e6, f"{peak_bytes:,} bytes for one position of 1,000,000,000 samples"

    mixed = Mixture(parts, OrderConfig(8192))
    step = mixed.steps_per_epoch // 2
    cut = [mixed.sample_ids(2, step, 1, (2 * rank, 2 * rank + 2)) for rank in range(4096)]
    whole = Mixture(parts, OrderConfig(8192)).sample_ids(2, step)
    np.testing.assert_array_equal(np.concatenate(cut, axis=1), whole)
    assert counts(mixed, whole) == {"a": 6144, "b": 2048}


def test_a_source_gives_each_sample_once_in_each_of_its_epochs() -> None:
    """A small source goes through many epochs while a large one is in its first; none repeats within one."""
    mixed = mixture([Portion("small", (20, 17), 0.5), Portion("large", (3000,), 0.5)], 32)
    steps = mixed.steps_per_epoch
    ids = mixed.sample_ids(0, 0, steps).ravel()
    small, large = ids[ids < 37], ids[ids >= 37]
    assert len(large) == len(np.unique(large))
    orders = [small[start : start + 37] for start in range(0, len(small) - 37, 37)]
    assert len(orders) > 30
    for number, order in enumerate(orders):
        assert len(np.unique(order)) == 37, f"epoch {number} of the small source repeats a sample"
    assert not np.array_equal(orders[0], orders[1]), "the small source came in the same order twice"
    assert mixed.epochs_of(steps)["small"] == pytest.approx(len(small) / 37)


def test_sources_are_spread_over_a_global_batch() -> None:
    mixed = mixture([Portion("a", (1000,), 0.75), Portion("b", (1000,), 0.25)], 64)
    assert mixed.period == 1
    is_b = mixed.sample_ids(0, 0)[0] >= 1000
    assert is_b.sum() == 16
    gaps = np.diff(np.flatnonzero(is_b))
    assert gaps.max() - gaps.min() <= 1, f"gaps between the samples of b: {gaps}"


def test_the_order_is_frozen() -> None:
    """A change of this hash changes every mixed run: MIXTURE_VERSION must be raised with it."""
    mixed = mixture([Portion("a", (40, 60), 2.0), Portion("b", (500,), 1.0)], 16, seed=3)
    ids = np.concatenate([mixed.sample_ids(0, 0, 20), mixed.sample_ids(1, 5, 5)])
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == "5ba1b7a614732d3e"


def test_a_source_larger_than_the_window_but_smaller_than_the_lanes_works() -> None:
    parts = [Portion("a", (53,), 1.0), Portion("b", (500,), 1.0)]
    mixed = Mixture(parts, OrderConfig(8, window=16))
    ids = mixed.sample_ids(0, 0, 12).ravel()
    small = ids[ids < 53]
    assert len(small) == 48
    assert len(np.unique(small)) == 48


def test_bad_portions_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight 0"):
        Portion("a", (3,), 0.0)
    with pytest.raises(DataError, match="holds no samples"):
        Portion("a", (0,), 1.0)
    with pytest.raises(ConfigError, match="'b' gives it no sample"):
        mixture([Portion("a", (100,), 1.0), Portion("b", (100,), 1e-9)], 4)
    with pytest.raises(DataError, match="fewer than one global batch"):
        Mixture([Portion("a", (3,), 1.0)], OrderConfig(8))


def module(*sources: SourceConfig) -> ShardedDataModule:
    return ShardedDataModule(
        train=list(sources),
        fields={"image": "image.npy", "label": "cls"},
        global_batch_size=16,
        micro_batch_size=8,
    )


def test_the_data_module_mixes_or_joins(digits: Path) -> None:
    one, two = str(digits / "train-000000.tar"), str(digits / "train-00000[12].tar")
    joined = module(SourceConfig(one), SourceConfig(two))
    joined.setup("fit")
    assert isinstance(joined.order, Order)
    assert joined.order.num_samples == len(joined.reader("train").index) == 315 + 315 + 314

    mixed = module(SourceConfig(one, 3.0, "one"), SourceConfig(two, 1.0))
    mixed.setup("fit")
    assert isinstance(mixed.order, Mixture)
    assert mixed.order.counts_of(1) == {"one": 12, "source 2": 4}
    batch = next(iter(mixed.train_dataloader()))
    assert batch["image"].shape == (8, 1, 8, 8)

    with pytest.raises(ConfigError, match="source 2 has no weight"):
        module(SourceConfig(one, 1.0), SourceConfig(two)).setup("fit")
    with pytest.raises(ConfigError, match="two sources have the same name"):
        module(SourceConfig(one, 1.0, "x"), SourceConfig(two, 1.0, "x")).setup("fit")


def test_without_weights_an_epoch_takes_every_sample_of_every_source_once(digits: Path) -> None:
    """944 samples are 59 global batches of 16."""
    sources = [SourceConfig(str(digits / f"train-00000{n}.tar"), name=f"source {n}") for n in (0, 1, 2)]
    joined = module(*sources)
    joined.setup("fit")
    assert joined.order is not None
    for epoch in (0, 1):
        ids = joined.order.sample_ids(epoch, 0, joined.steps_per_epoch)
        np.testing.assert_array_equal(np.sort(ids.ravel()), np.arange(944))
    loader = joined.train_dataloader()
    keys = [key for batch in loader for key in batch["__key__"]]
    index = joined.reader("train").index
    assert sorted(keys) == sorted(index.key(number) for number in range(944))


@pytest.mark.slow
def test_a_mixed_run_is_elastic_and_resumes(digits: Path, tmp_path: Path) -> None:
    sources = (
        f"[{{shards: '{digits}/train-000000.tar', weight: 0.6, name: old}},"
        f" {{shards: '{digits}/train-00000[123].tar', weight: 0.4, name: new}}]"
    )

    def fit(run_dir: Path, ranks: int, *more: str) -> list[int | None]:
        arguments = [
            *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
            *("--data.train", sources, f"--data.val={digits}/val.json", f"--data.test={digits}/test.json"),
            *("--data.global_batch_size", "64", "--data.micro_batch_size", "16", "--trainer.max_steps", "30"),
            *("--checkpoint.every_steps", "5", "--checkpoint.save", "sync", "--early_stopping.restore_best", "false"),
            *more,
        ]
        return run_cli(ranks, arguments, folder=run_dir.parent / f"{run_dir.name}-logs").codes

    kill = ("--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=23")
    assert fit(tmp_path / "whole", 1) == [0]
    assert fit(tmp_path / "killed", 1, *kill) == [-9]
    assert fit(tmp_path / "killed", 1) == [0]
    assert fit(tmp_path / "wide", 4) == [0, 0, 0, 0]
    whole = final_weights(tmp_path / "whole")
    assert not differing(whole, final_weights(tmp_path / "killed"))
    assert distance(whole, final_weights(tmp_path / "wide")) <= 1e-5
    recorded = read_run(tmp_path / "whole")["sources"]
    assert recorded["old"]["samples"] + recorded["new"]["samples"] == 30 * 64
    assert recorded["old"]["samples"] == pytest.approx(0.6 * 30 * 64, rel=0.01)
