"""What values of a batch may be and be called: reserved names, weights of samples, labels, and filtered samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain import ClassificationTask, ShardedDataModule
from disttrain.data.decode.allowed_values import FINITE, LENGTHS, RESERVED, WEIGHTS, Allowed, classes
from disttrain.data.decode.field import Field
from disttrain.data.decode.rng import Draws
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.batches import BAD, COUNT, FILTERED, KEY, WEIGHT, BatchMaker
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig
from disttrain.data.loader.transforms import HooksConfig, Sample
from disttrain.data.reader.bad_sample_policy import BadSampleError, FilteredSampleError
from disttrain.data.reader.sample_reader import Reader
from disttrain.errors import ConfigError, DataError, DecodeError
from disttrain.models import MLP
from tests.support.shards import npy, write_shard

Random = np.random.Generator | None


def reader_of(folder: Path, fields: dict[str, Field], **columns: Sequence[Any]) -> Reader:
    """Samples ``s0``, ``s1``, ...: ``x.npy`` holds their number, and what is given comes beside it."""
    total = len(next(iter(columns.values())))
    samples = [
        {"__key__": f"s{number}", "x.npy": npy(np.full(2, number, np.float32))}
        | {name.replace("_", "."): values[number] for name, values in columns.items()}
        for number in range(total)
    ]
    index = ShardIndex.open(write_shard(folder / "shard.tar", samples), name="data.train")
    return Reader(index, {"x": Field("x.npy"), **fields})


def rows(*numbers: Sequence[int]) -> Any:
    return np.array(numbers, dtype=np.int64)


def labels(*texts: bytes) -> dict[str, Any]:
    return {"fields": {"label": Field("cls")}, "cls": texts}


# Names.


@pytest.mark.parametrize("name", RESERVED)
def test_names_that_disttrain_gives_itself_are_refused_wherever_they_come_from(tmp_path: Path, name: str) -> None:
    said = f"has '{name}', but disttrain reserves the names"
    with pytest.raises(ConfigError, match=f"data.fields {said}") as caught:
        ShardedDataModule(train="x.tar", fields={name: "x.npy"})
    assert "data.hooks.weight" in caught.value.hint
    with pytest.raises(ConfigError, match=f"data.fields {said}"):
        reader_of(tmp_path, {name: Field("cls")}, cls=[b"1"])
    reader = reader_of(tmp_path, **labels(b"1", b"2"))
    for hooks in (
        HooksConfig(transform=lambda sample, random: {**sample, name: 0.5}),
        HooksConfig(collate=lambda samples: {name: torch.zeros(len(samples))}),
    ):
        with pytest.raises(ConfigError, match=f"{name}|other values of __key__|returned the key"):
            BatchMaker(reader, hooks).make(rows([0, 1]))


def test_a_field_of_the_first_shard_may_not_have_such_a_name_either(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "b.__weight__": npy(1.0), "cls": b"1"}])
    with pytest.raises(ConfigError, match="__weight__"):
        Reader(ShardIndex.open(str(tmp_path / "a.tar")), {"__weight__": Field("b.__weight__", decoder="npy")})


def test_the_lengths_of_a_padded_field_are_its_own(tmp_path: Path) -> None:
    columns = {"b_npy": [npy(np.arange(n)) for n in (1, 2)], "cls": [b"1", b"2"]}
    both = {"b": Field("b.npy", pad=0), "b" + LENGTHS: Field("cls")}
    with pytest.raises(ConfigError, match=r"data\.fields has 'b_lengths', the name reserved for the lengths"):
        reader_of(tmp_path, both, **columns)
    reader = reader_of(tmp_path, {"b": Field("b.npy", pad=0)}, **columns)
    hooks = HooksConfig(lambda sample, random: {**sample, "b" + LENGTHS: 7})
    with pytest.raises(ConfigError, match=r"the return value of data\.hooks.transform has 'b_lengths'"):
        BatchMaker(reader, hooks).make(rows([0, 1]))


def test_a_key_stays_a_samples_own(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(b"1", b"2"))
    with pytest.raises(ConfigError, match="returned the key 'other' for sample 's0'"):
        BatchMaker(reader, HooksConfig(lambda sample, random: {**sample, KEY: "other"})).make(rows([0, 1]))
    with pytest.raises(ConfigError, match="collate returned values of __key__"):
        BatchMaker(reader, HooksConfig(collate=lambda samples: {KEY: ["a", "b"]})).make(rows([0, 1]))
    (batch,) = BatchMaker(reader, HooksConfig(collate=lambda samples: {KEY: [s[KEY] for s in samples]})).make(
        rows([1, 0])
    )
    assert batch[KEY] == ["s1", "s0"]


# Numbers.


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (classes(3), [0, 2, torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8), 0.5, None, "text"], [3, -1, 10**30]),
        (FINITE, [1.0, -1e300, 3, torch.tensor([1.0]), "text"], [math.nan, -math.inf, np.array([1.0, np.inf])]),
        (WEIGHTS, [0, 0.5, torch.tensor([2.0]), np.float64(3)], [-0.1, math.nan, 1e39, "1", None, True, [1.0]]),
        (WEIGHTS, [torch.tensor(1.0, dtype=torch.bfloat16)], [torch.ones(2), np.ones((1, 2))]),
        (FINITE, [torch.ones(2).to(torch.float8_e5m2), torch.eye(2).to_sparse()], [(torch.eye(2) / 0).to_sparse()]),
    ],
)
def test_numbers_are_allowed_or_not(allowed: Allowed, good: list[Any], bad: list[Any]) -> None:
    assert allowed.faults(good) == {}
    found = allowed.faults([*good, *bad])
    assert sorted(found) == list(range(len(good), len(good) + len(bad))), found
    assert all(allowed.what in text for text in found.values()), found


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0, 3)])
def test_a_tensor_of_many_values_is_seen_value_by_value(shape: tuple[int, ...]) -> None:
    values = torch.zeros(5, *shape, dtype=torch.int64)
    assert classes(4).faults(values) == FINITE.faults(values.double()) == {}
    assert classes(4).faults(values[:0]) == {}
    if values.numel():
        values[3] = 4
        assert classes(4).faults(values) == {3: "4 is not one of the 4 classes 0 to 3"}


# Labels.


@pytest.mark.parametrize("text", [b"10", b"-1", b"99", b"1_0", b"+1", b"1.0", "\u0661".encode(), b"1 2", b"", b"0x1"])
def test_a_label_outside_the_classes_is_named_with_its_shard_or_skipped(tmp_path: Path, text: bytes) -> None:
    reader = reader_of(tmp_path, **labels(b"1", text, b"9", b" 3\n"))
    with pytest.raises(DecodeError, match=r"shard .*shard.tar at byte \d+: sample 's1', field 'label' \(cls\)"):
        BatchMaker(reader, allowed={"label": classes(10)}).make(rows([0, 1, 2, 3]))
    (batch,) = BatchMaker(reader, allowed={"label": classes(10)}, skip_bad=True).make(rows([0, 1, 2, 3]))
    assert batch["label"].tolist() == [1, 9, 3, 9]
    assert (batch[WEIGHT].tolist(), batch[COUNT], [bad.key for bad in batch[BAD]]) == ([1, 1, 1, 0], 3, ["s1"])


def test_what_an_earlier_task_allowed_is_of_no_matter_to_the_next(tmp_path: Path) -> None:
    for skip_bad in (False, True):
        reader = reader_of(tmp_path, {"label": Field("cls", classes=10)}, cls=[b"1", b"5", b"8", b"10"])
        first = BatchMaker(reader, allowed={"label": classes(5)}, skip_bad=skip_bad)
        if skip_bad:
            assert first.make(rows([0, 1, 2]))[0][COUNT] == 1
        else:
            with pytest.raises(DecodeError, match="5 is not one of the 5 classes"):
                first.make(rows([0, 1, 2]))
        (batch,) = BatchMaker(reader, allowed={"label": classes(9)}, skip_bad=skip_bad).make(rows([0, 1, 2]))
        assert (batch["label"].tolist(), BAD in batch) == ([1, 5, 8], False)
        BatchMaker(reader, skip_bad=skip_bad)
        with pytest.raises(DecodeError, match="10 is not one of the 10 classes"):
            reader.read(rows([3]).ravel())


def test_a_field_may_declare_its_classes(tmp_path: Path) -> None:
    field = Field("cls", classes=2)
    with pytest.raises(DecodeError, match=r"field 'label' .*: 2 is not one of the 2 classes 0 to 1"):
        reader_of(tmp_path, {"label": field}, cls=[b"1", b"2"]).read(rows(0, 1).ravel())
    array = Field("m.npy", classes=3)
    columns = {"m_npy": [npy(np.zeros((2, 2), np.uint8)), npy(np.full((2, 2), 255, np.uint8))]}
    with pytest.raises(DecodeError, match="255 is not one of the 3 classes"):
        reader_of(tmp_path, {"mask": array}, **columns).read(rows(0, 1).ravel())
    for wrong in ({"ext": "txt", "classes": 2}, {"ext": "cls", "classes": -1}):
        with pytest.raises(ConfigError, match="classes"):
            Field(**wrong)


def test_a_transform_may_map_labels_into_the_classes_but_not_out_of_them(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(b"10", b"21", b"39"))

    def tens(sample: Sample, random: Random) -> Sample:
        return {**sample, "label": sample["label"] // 10}

    (batch,) = BatchMaker(reader, HooksConfig(tens), allowed={"label": classes(4)}).make(rows([0, 1, 2]))
    assert batch["label"].tolist() == [1, 2, 3]
    for huge in (2**70, np.uint64(2**63 + 1)):
        hooks = HooksConfig(lambda sample, random: {"label": huge if sample["__key__"] == "s1" else type(huge)(1)})  # noqa: B023
        with pytest.raises(
            DataError, match=rf"sample 's1' was rejected .* it returned 'label': {huge} is not one of the 4"
        ):
            BatchMaker(reader, hooks, allowed={"label": classes(4)}).make(rows([0, 1, 2]))
    with pytest.raises(
        DataError, match=r"sample 's2' was rejected .*: it returned 'label': 3 is not one of the 3 classes"
    ):
        BatchMaker(reader, HooksConfig(tens), allowed={"label": classes(3)}).make(rows([0, 1, 2]))


def test_the_task_says_which_classes_there_are(tmp_path: Path) -> None:
    reader_of(tmp_path, **labels(b"0", b"1", b"2", b"7"))
    task = ClassificationTask(MLP(2, hidden=[2], out_features=3), num_classes=3, input="x")
    assert task.allowed_values() == {"label": classes(3)}


# Weights.


def test_weights_come_from_a_field(tmp_path: Path) -> None:
    texts = [b"0.5", b"2", b"0", b"3.25"]
    fields = {"w": Field("w.json"), "v": Field("v.npy")}
    arrays = [npy(np.array([value], np.float64)) for value in (1, 2, 3, 4)]
    reader = reader_of(tmp_path, fields, w_json=texts, v_npy=arrays)
    first, second = BatchMaker(reader, HooksConfig(weight="w")).make(rows([0, 1], [3, 2]), np.array([2, 1]))
    assert (first[WEIGHT].tolist(), first[WEIGHT].dtype, first["w"]) == ([0.5, 2.0], torch.float32, [0.5, 2])
    assert second[WEIGHT].tolist() == [3.25, 0.0], "padding has a weight"
    (other,) = BatchMaker(reader, HooksConfig(weight="v")).make(rows([0, 1, 3]))
    assert other[WEIGHT].tolist() == [1.0, 2.0, 4.0]
    (collated,) = BatchMaker(reader, HooksConfig(collate=lambda s: {"n": torch.ones(len(s))}, weight="v")).make(
        rows([0, 3])
    )
    assert collated[WEIGHT].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("text", [b"NaN", b"-1", b"Infinity", b'"1"', b"null", b"[1, 2]", b"true", b"1e39"])
def test_a_bad_weight_makes_a_bad_sample(tmp_path: Path, text: bytes) -> None:
    reader = reader_of(tmp_path, {"w": Field("w.json")}, w_json=[b"1", text, b"3"])
    with pytest.raises(DecodeError, match=r"sample 's1', field 'w' \(w.json\): .* is not a weight"):
        BatchMaker(reader, HooksConfig(weight="w")).make(rows([0, 1, 2]))
    (batch,) = BatchMaker(reader, HooksConfig(weight="w"), skip_bad=True).make(rows([0, 1, 2]))
    assert batch[WEIGHT].tolist() == [1.0, 3.0, 0.0]
    assert [bad.key for bad in batch[BAD]] == ["s1"]


def test_weights_come_from_a_transform(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(b"0", b"1", b"2", b"3"))

    def weigh(values: Sequence[Any]) -> Callable[[Sample, Random], Sample]:
        return lambda sample, random: {**sample, "w": values[int(sample["label"])]}

    (batch,) = BatchMaker(reader, HooksConfig(weigh([1, 0.5, 2.0, torch.tensor(4.0)]), weight="w")).make(
        rows([3, 2, 1, 0])
    )
    assert batch[WEIGHT].tolist() == [4.0, 2.0, 0.5, 1.0]
    wrong = HooksConfig(weigh([1, 1, math.nan, 1]), weight="w")
    with pytest.raises(DataError, match=r"sample 's2' was rejected .*: it returned 'w': nan is not a weight"):
        BatchMaker(reader, wrong).make(rows([0, 1, 2, 3]))
    (batch,) = BatchMaker(reader, wrong, skip_bad=True).make(rows([0, 1, 2, 3]))
    assert (batch[KEY], batch[WEIGHT].tolist()) == (["s0", "s1", "s3", "s2"], [1, 1, 1, 0])
    with pytest.raises(ConfigError, match=r"data\.hooks.weight is 'u', which data\.hooks.transform does not return"):
        BatchMaker(reader, HooksConfig(weigh([1] * 4), weight="u")).make(rows([0]))
    with pytest.raises(ConfigError, match=r"data\.hooks.weight is 'lable', which is not one") as caught:
        BatchMaker(reader, HooksConfig(weight="lable"))
    assert "label" in caught.value.hint


# Samples that are not wanted.


def only_even(sample: Sample, random: Random) -> Sample:
    if int(sample["label"]) % 2:
        raise FilteredSampleError
    return sample


@pytest.mark.parametrize("skip_bad", [False, True])
def test_filtered_samples_weigh_nothing_and_are_not_bad(tmp_path: Path, skip_bad: bool) -> None:
    reader = reader_of(tmp_path, **labels(*(str(number).encode() for number in range(8))))
    maker = BatchMaker(reader, HooksConfig(only_even), skip_bad=skip_bad)
    first, second, third, fourth = maker.make(rows([1, 0, 3, 2], [4, 5, 6, 7], [1, 3, 5, 7], [4, 2, 1, 0]), COUNTS)
    assert (first[KEY], first["label"].tolist()) == (["s0", "s2", "s1", "s3"], [0, 2, 0, 0])
    assert (first[WEIGHT].tolist(), first[COUNT], first[FILTERED]) == ([1, 1, 0, 0], 2, 2)
    assert (second["label"].tolist(), second[COUNT], second[FILTERED]) == ([4, 6, 4, 4], 2, 2)
    assert (third[KEY], third["label"].tolist()) == (["s1", "s3", "s5", "s7"], [0, 0, 0, 0])
    assert (third[WEIGHT].tolist(), third[COUNT], third[FILTERED]) == ([0, 0, 0, 0], 0, 4)
    assert (fourth[WEIGHT].tolist(), fourth[COUNT]) == ([1, 1, 0, 0], 2)
    assert FILTERED not in fourth, "padding is counted"
    assert not any(BAD in batch for batch in (first, second, third, fourth))


COUNTS = np.array([4, 4, 4, 2])


def test_bad_and_filtered_samples_are_kept_apart(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(b"0", b"none", b"1", b"2", b"3"))

    def some(sample: Sample, random: Random) -> Sample:
        if int(sample["label"]) == 2:
            raise BadSampleError("two")
        return only_even(sample, random)

    (batch,) = BatchMaker(reader, HooksConfig(some), skip_bad=True).make(rows([0, 1, 2, 3, 4]))
    assert (batch[KEY], batch[COUNT], batch[FILTERED]) == (["s0", "s1", "s2", "s3", "s4"], 1, 2)
    assert [bad.key for bad in batch[BAD]] == ["s1", "s3"]
    assert batch["label"].tolist() == [0] * 5


def test_micro_batches_of_which_nothing_is_left_share_a_sample_that_is_looked_for_once(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(*(str(n // 10).encode() for n in range(100))))
    calls: list[str] = []

    def one_class(sample: Sample, random: Random) -> Sample:
        calls.append(sample["__key__"])
        if int(sample["label"]) != wanted:
            raise FilteredSampleError
        return {"label": sample["label"], "drawn": 0.0 if random is None else random.random()}

    ids = np.arange(32, 64).reshape(2, 16)
    for wanted, draws in ((0, None), (0, Draws(7, np.full(32, 3), ids.ravel())), (9, None)):
        calls.clear()
        maker = BatchMaker(reader, HooksConfig(one_class))
        first, second, third = [*maker.make(ids, draws=draws), *maker.make(ids[:1], draws=draws)]
        assert len(calls) < 2 * 100
        assert calls[-1] == f"s{10 * wanted}", "it was looked for again"
        for batch in (first, second, third):
            assert (batch[COUNT], float(batch[WEIGHT].sum()), set(batch["label"].tolist())) == (0, 0, {wanted})
        # Another rank or worker, which reads other samples in another epoch, takes the same one.
        elsewhere = None if draws is None else Draws(7, np.full(1, 5), np.array([70]))
        (other,) = BatchMaker(reader, HooksConfig(one_class)).make(rows([70]), draws=elsewhere)
        assert other["drawn"][0] == first["drawn"][0] == third["drawn"][-1]


def test_the_last_micro_batch_of_an_evaluation_may_be_filtered(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(*(b"%d" % n for n in range(9))))

    def fresh(sample: Sample, random: Random) -> Sample:
        if int(sample["label"]) == 8:
            raise FilteredSampleError
        return {"label": sample["label"]}

    *_, last = EvaluationLoader(
        BatchMaker(reader, HooksConfig(fresh)), micro_batch_size=4, config=LoaderConfig(threads=0)
    )
    assert (last[COUNT], last[FILTERED], last[KEY][0], last[WEIGHT].tolist()) == (0, 1, "s8", [0] * 4)


def test_a_transform_that_filters_everything_or_forgets_its_return_is_named(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, **labels(b"1", b"3"))
    with pytest.raises(ConfigError, match="rejects every sample"):
        BatchMaker(reader, HooksConfig(only_even)).make(rows([0, 1]))
    (tmp_path / "bad").mkdir()
    odd = reader_of(tmp_path / "bad", **labels(b"1", b"3", b"5", b"none", b"7", b"9", b"1", b"3"))
    with pytest.raises(ConfigError, match="rejects every sample"):
        BatchMaker(odd, HooksConfig(only_even), skip_bad=True).make(rows([3, 4]))
    with pytest.raises(ConfigError, match="returned a NoneType") as caught:
        BatchMaker(reader, HooksConfig(lambda sample, random: None)).make(rows([0, 1]))  # type: ignore[arg-type,return-value]
    assert "FilteredSampleError" in caught.value.hint
