"""Micro batches: hooks, padding, keyed randomness, and samples that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.data.decode.fields import Field
from disttrain.data.decode.rng import Draws
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import BAD, COUNT, ID, KEY, WEIGHT, Batch, BatchMaker
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError, DataError, DecodeError
from tests.support.hooks import AddNoise, collate_sum, fail, kinds, refuse_every_fifth
from tests.support.shards import npy, write_numbered, write_shard


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """40 samples whose ``x`` holds their number."""
    index = ShardIndex.open(write_numbered(tmp_path_factory.mktemp("shards"), [25, 15]))
    return Reader(index, {"x": Field("x.npy"), "label": Field("cls")})


def ragged(tmp_path: Path, lengths: Sequence[int], **field: Any) -> Reader:
    samples = [
        {"__key__": f"s{number}", "t.npy": npy(np.arange(length, dtype=np.int64))}
        for number, length in enumerate(lengths)
    ]
    return Reader(ShardIndex.open(write_shard(tmp_path / "ragged.tar", samples)), {"t": Field("t.npy", **field)})


def damaged(tmp_path: Path, bad: Sequence[int], total: int = 12) -> Reader:
    """Samples of which some do not decode, and every other bad one lacks its field instead."""
    samples: list[dict[str, Any]] = []
    for number in range(total):
        sample = {"__key__": f"s{number:02d}", "x.npy": npy(np.full(2, number, np.float32)), "cls": b"1"}
        if number in bad:
            which = list(bad).index(number)
            sample |= {"cls": b"none"} if which % 2 == 0 else {}
            if which % 2:
                del sample["cls"]
        samples.append(sample)
    index = ShardIndex.open(write_shard(tmp_path / "damaged.tar", samples), name="data.train")
    return Reader(index, {"x": Field("x.npy"), "label": Field("cls")})


def rows(*numbers: Sequence[int]) -> Any:
    return np.array(numbers, dtype=np.int64)


def plain(batch: Batch) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_a_transform_and_a_collate_change_what_a_batch_holds(numbered: Reader) -> None:
    (batch,) = BatchMaker(numbered, HooksConfig(AddNoise(), collate_sum)).make(rows([3, 39, 3]))
    assert plain(batch) == {
        "total": [9.0, 117.0, 9.0],
        KEY: ["train-00003", "train-00039", "train-00003"],
        ID: [3, 39, 3],
        WEIGHT: [1.0, 1.0, 1.0],
        COUNT: 3,
    }


def test_what_a_transform_gives_is_stacked_where_it_can_be(numbered: Reader) -> None:
    first, second = BatchMaker(numbered, HooksConfig(kinds)).make(rows([1, 2], [3, 4]))
    assert first["half"].dtype == torch.bfloat16
    assert first["turned"].shape == (2, 3, 2)
    assert second["array"].tolist() == [[3.0, 3.0], [4.0, 4.0]]
    assert second["text"] == ["number 3.0", "number 4.0"]
    assert second["nested"] == [{"list": [3.0]}, {"list": [4.0]}]


def test_draws_are_keyed_by_seed_epoch_and_sample_alone(numbered: Reader) -> None:
    maker = BatchMaker(numbered, HooksConfig(AddNoise()))

    def noise(ids: Any, seed: int = 1, epoch: int = 2) -> dict[int, float]:
        found = {}
        for batch in maker.make(ids, draws=Draws(seed, np.full(ids.size, epoch), ids.ravel())):
            found |= dict(zip(batch[ID].tolist(), batch["noise"].tolist(), strict=True))
        return found

    ids = rows(list(range(40)))
    whole = noise(ids)
    assert len(set(whole.values())) == 40, "two samples drew the same number"
    apart = noise(ids.reshape(8, 5)[::-1, ::-1])
    assert apart == whole, "draws depend on the batch"
    for other in (noise(ids, seed=2), noise(ids, epoch=3)):
        assert not set(other.values()) & set(whole.values()), "another seed or epoch draws the same numbers"
    (evaluated,) = maker.make(ids)
    assert evaluated["noise"].tolist() == [0.0] * 40, "something was drawn in evaluation"


def test_a_bug_in_a_transform_keeps_its_error_and_names_the_sample(numbered: Reader) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug of one's own") as caught:
        BatchMaker(numbered, HooksConfig(fail)).make(rows([7]))
    assert caught.value.__notes__ == ["in data.hooks.transform, of sample 'train-00007'"]


@pytest.mark.parametrize(
    ("hooks", "text"),
    [
        (HooksConfig(transform=lambda sample, random: None), "transform returned a NoneType"),  # type: ignore[arg-type,return-value]
        (HooksConfig(collate=lambda samples: [1]), "collate returned a list"),  # type: ignore[arg-type,return-value]
    ],
)
def test_a_hook_that_gives_no_dictionary_is_named(numbered: Reader, hooks: HooksConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=f"data.hooks.{text}"):
        BatchMaker(numbered, hooks).make(rows([7]))


def test_values_that_only_some_samples_have_are_named(numbered: Reader) -> None:
    def some(sample: dict[str, Any], random: Any) -> dict[str, Any]:
        return sample if int(sample["x"][0]) % 2 else {**sample, "even": 1}

    for ids in ([2, 3], [3, 2]):
        with pytest.raises(DataError, match="returned 'even' for some samples but not for others"):
            BatchMaker(numbered, HooksConfig(some)).make(rows(ids))


# Padding.


def test_lengths_that_differ_are_padded_a_micro_batch_at_a_time(tmp_path: Path) -> None:
    maker = BatchMaker(ragged(tmp_path, [2, 3, 0, 1, 4, 4], pad=-1.0))
    first, second, third = maker.make(rows([0, 1], [2, 3], [4, 5]))
    assert first["t"].tolist() == [[0, 1, -1], [0, 1, 2]]
    assert first["t_lengths"].tolist() == [2, 3]
    assert second["t"].tolist() == [[-1], [0]], "padded to the longest of another micro batch"
    assert second["t_lengths"].tolist() == [0, 1]
    assert third["t"].tolist() == [[0, 1, 2, 3]] * 2
    assert third["t_lengths"].tolist() == [4, 4]
    assert first["t"].dtype == torch.int64
    (alone,) = maker.make(rows([2, 3]))
    assert plain(alone) == plain(second), "a micro batch depends on what is read with it"


def test_lengths_that_differ_without_padding_are_listed_and_alike_ones_stacked(tmp_path: Path) -> None:
    apart, alike = BatchMaker(ragged(tmp_path, [2, 3, 4, 4])).make(rows([0, 1], [2, 3]))
    assert [value.tolist() for value in apart["t"]] == [[0, 1], [0, 1, 2]]
    assert alike["t"].tolist() == [[0, 1, 2, 3]] * 2


def test_what_cannot_be_padded_is_named(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a", "t.npy": npy(np.zeros((2, 3), np.float32))},
        {"__key__": "b", "t.npy": npy(np.zeros((2, 4), np.float32))},
    ]
    index = ShardIndex.open(write_shard(tmp_path / "odd.tar", samples))
    maker = BatchMaker(Reader(index, {"t": Field("t.npy", pad=0.0)}))
    with pytest.raises(DataError, match=r"field 't' has pad, but holds both a float32 tensor of shape \(2, 4\)"):
        maker.make(rows([0, 1]))


# Bad samples.


def test_a_bad_sample_is_an_error_unless_it_is_to_be_skipped(tmp_path: Path) -> None:
    reader = damaged(tmp_path, [4, 7])
    with pytest.raises(DecodeError, match=r"sample 's04', field 'label' \(cls\)") as caught:
        BatchMaker(reader).make(rows([0, 4]))
    assert caught.value.hint.endswith("or set data.on_bad_sample to skip")
    with pytest.raises(DataError, match="sample 's07' has no field 'label'"):
        BatchMaker(reader).make(rows([0, 7]))


def test_skipped_samples_move_right_with_weight_zero_and_the_next_ones_values(tmp_path: Path) -> None:
    maker = BatchMaker(damaged(tmp_path, [1, 4, 5, 11]), skip_bad=True)
    for attempt in range(2):  # the second time they are known
        first, second, third = maker.make(rows([0, 1, 2], [4, 3, 5], [11, 10, 9]))
        assert first[KEY] == ["s00", "s02", "s01"], attempt
        assert first[WEIGHT].tolist() == [1.0, 1.0, 0.0]
        assert first[COUNT] == 2
        assert first["x"][:, 0].tolist() == [0.0, 2.0, 2.0]
        assert second[KEY] == ["s03", "s04", "s05"]
        assert second["x"][:, 0].tolist() == [3.0, 6.0, 6.0]
        assert second[COUNT] == 1
        assert third["x"][:, 0].tolist() == [10.0, 9.0, 0.0], "after the last sample comes the first"
        assert [bad.key for batch in (first, second, third) for bad in batch[BAD]] == ["s01", "s04", "s05", "s11"]
        assert [bad.offset >= 0 for bad in second[BAD]] == [False, True]
    (clean,) = maker.make(rows([0, 2, 3]))
    assert BAD not in clean


def test_skipping_in_evaluation_keeps_padding_apart(tmp_path: Path) -> None:
    maker = BatchMaker(damaged(tmp_path, [0, 4]), skip_bad=True)
    first, second = maker.make(rows([3, 4, 5], [6, 0, 0]), np.array([3, 1]))
    assert (first[KEY], first[COUNT]) == (["s03", "s05", "s04"], 2)
    assert (second[KEY][0], second[COUNT], second[WEIGHT].tolist()) == ("s06", 1, [1.0, 0.0, 0.0])
    assert BAD not in second, "padding with a bad sample counts as a bad sample"


def test_a_micro_batch_may_be_bad_altogether(tmp_path: Path) -> None:
    (batch,) = BatchMaker(damaged(tmp_path, [4, 5]), skip_bad=True).make(rows([4, 5]))
    assert (batch[COUNT], batch[WEIGHT].tolist(), batch["x"][:, 0].tolist()) == (0, [0.0, 0.0], [6.0, 6.0])


def test_data_that_is_bad_altogether_is_an_error(tmp_path: Path) -> None:
    maker = BatchMaker(damaged(tmp_path, range(12)), skip_bad=True)
    with pytest.raises(DataError, match=r"data\.train: a thousand samples in a row are bad, such as shard"):
        maker.make(rows([4, 5]))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transform_may_refuse_samples(numbered: Reader, skip: bool) -> None:
    maker = BatchMaker(numbered, HooksConfig(refuse_every_fifth), skip_bad=skip)
    ids = rows([4, 5, 6], [39, 35, 0])
    if not skip:
        with pytest.raises(
            DataError, match=r"sample 'train-00005' was rejected by data\.hooks\.transform: 5 is a multi"
        ):
            maker.make(ids)
        return
    first, second = maker.make(ids)
    assert first["x"][:, 0].tolist() == [4.0, 6.0, 6.0]
    assert second["x"][:, 0].tolist() == [39.0, 36.0, 1.0]
    assert (first[COUNT], second[COUNT]) == (2, 1)
    assert [bad.key for bad in second[BAD]] == ["train-00035", "train-00000"]


def test_a_transform_that_refuses_everything_is_named(numbered: Reader) -> None:
    from disttrain.data.reader.bad_sample_policy import BadSampleError

    def never(sample: dict[str, Any], random: Any) -> dict[str, Any]:
        raise BadSampleError("no")

    with pytest.raises(ConfigError, match="rejects every sample"):
        BatchMaker(numbered, HooksConfig(never), skip_bad=True).make(rows([1]))
