"""Where predictions go and as what: the options, what they refuse, and the three formats."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from pyarrow import parquet

from disttrain import ShardedDataModule, Trainer
from disttrain.callbacks.predictions.callback import PredictionWriter
from disttrain.callbacks.predictions.files import SAMPLES_PER_FILE, Output, Workshop, write_piece
from disttrain.callbacks.predictions.formats import Columns, Format, FormatName, JsonLines, Parquet, Tar, make_format
from disttrain.errors import ConfigError, DataError
from tests.support.features import write_features
from tests.support.predictions import FIELDS
from tests.support.shards import tar_samples

RUN, HERE = Path("runs/run"), Path.cwd()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Output(RUN / "predictions.jsonl", "jsonl")),
        ({"format": "jsonl"}, Output(RUN / "predictions.jsonl", "jsonl")),
        ({"samples_per_file": 7}, Output(RUN / "predictions", "jsonl", 7)),
        ({"format": "tar"}, Output(RUN / "predictions", "tar", SAMPLES_PER_FILE)),
        ({"format": "parquet", "samples_per_file": 7}, Output(RUN / "predictions", "parquet", 7)),
        ({"path": "a/b.jsonl"}, Output(HERE / "a/b.jsonl", "jsonl")),
        ({"path": "b.parquet", "format": "parquet"}, Output(HERE / "b.parquet", "parquet")),
        ({"path": "b.TAR", "overwrite": True}, Output(HERE / "b.TAR", "tar", 0, True)),
        ({"path": "a/b", "format": "tar"}, Output(HERE / "a/b", "tar", SAMPLES_PER_FILE)),
        ({"path": "b.v2", "format": "jsonl", "samples_per_file": 1}, Output(HERE / "b.v2", "jsonl", 1)),
    ],
)
def test_what_the_options_mean(options: dict[str, Any], expected: Output) -> None:
    assert Output.choose(RUN, **options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "b"}, ["--output b does not say", "--format for a folder"]),
        ({"path": "b.csv"}, ["--output b.csv does not say", ".jsonl, .parquet or .tar"]),
        ({"path": "b.tar", "format": "jsonl"}, ["b.tar is a tar file, but --format is jsonl"]),
        ({"path": "b.tar", "samples_per_file": 3}, ["b.tar is one file", f"--output {HERE / 'b'} --format tar"]),
        ({"samples_per_file": 0}, ["--samples_per_file is 0", "at least 1"]),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Output.choose(RUN, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"


def test_a_sample_has_its_file() -> None:
    many, one = Output(Path("p"), "tar", 10), Output(Path("p.tar"), "tar")
    assert [many.file_of(number) for number in (0, 9, 10, 99)] == [0, 0, 1, 9]
    assert [one.file_of(number) for number in (0, 10**9)] == [0, 0]
    assert (many.file_name(12), one.file_name(0)) == ("predictions-000012.tar", "p.tar")


@pytest.mark.parametrize(
    ("held", "output", "words"),
    [
        (["p.jsonl"], Output(Path("p.jsonl"), "jsonl"), "predictions exist: .*--overwrite"),
        (["p.jsonl"], Output(Path("p.jsonl"), "jsonl", overwrite=True), ""),
        (["p.tar/x"], Output(Path("p.tar"), "tar"), "is a folder, not a file"),
        (["p"], Output(Path("p"), "tar", 5, overwrite=True), "is a file, not a folder"),
        (["p/"], Output(Path("p"), "tar", 5), ""),
        (["p/predictions-000000.tar", "p/predictions.json"], Output(Path("p"), "tar", 5), "predictions exist"),
        (["p/predictions-000000.tar", "p/predictions-000000.idx"], Output(Path("p"), "tar", 5, True), ""),
        (["p/predictions-000000.tar", "p/run.json"], Output(Path("p"), "tar", 5, True), "other things.*run.json"),
        (["p/run.json"], Output(Path("p"), "tar", 5), "other things .*run.json"),
        ([], Output(Path("p"), "tar", 5), ""),
    ],
)
def test_what_exists_is_refused(tmp_path: Path, held: list[str], output: Output, words: str) -> None:
    for name in held:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("old")
    there = Output(tmp_path / output.path, output.format, output.samples_per_file, output.overwrite)
    if words:
        with pytest.raises(ConfigError, match=f"(?s){words}"):
            there.check()
    else:
        there.check()


def test_a_workshop_removes_what_was_left_and_replaces_what_may_be(tmp_path: Path) -> None:
    output = Output(tmp_path / "p[1]", "jsonl", 2, overwrite=True)
    stale = Workshop(output, "stale")
    stale.open()
    shop = Workshop(output, "now")
    with pytest.raises(DataError, match="all nodes share"):
        shop.check()
    shop.open()
    shop.check()
    with pytest.raises(DataError, match="all nodes share"):
        stale.check()
    for rank, pieces in enumerate(([b"one", b""], [b"two"])):
        with shop.part(3, rank) as file:
            for piece in pieces:
                write_piece(file, piece)
    assert list(shop.pieces(3, [0, 1])) == [b"one", b"", b"two"]
    shop.file(3).write_bytes(b"new")
    output.path.mkdir()
    (output.path / "predictions-000009.jsonl").write_bytes(b"old")
    shop.publish([])
    assert [path.name for path in tmp_path.rglob("*")] == ["p[1]", "predictions-000003.jsonl"]


def join(format: Format, *parts: tuple[Sequence[str], Columns], path: Path) -> Path:
    """One file of some samples."""
    pieces = [format.piece(keys, columns) for keys, columns in parts]
    format.settle([format.summary()])
    format.join(iter(pieces), sum(len(keys) for keys, _ in parts), path)
    return path


def test_json_lines_hold_what_json_has(tmp_path: Path) -> None:
    columns = {
        "n": np.array([1, -2]),
        "x": np.array([[0.5, np.inf], [2, 3]]),
        "mixed": [None, {"t": torch.tensor([1, 2], dtype=torch.bfloat16), "a": [np.float32(1)]}],
    }
    lines = join(JsonLines(), (["a", 'b"é'], columns), path=tmp_path / "x.jsonl").read_text().splitlines()
    assert lines[0] == '{"key": "a", "n": 1, "x": [0.5, "Infinity"], "mixed": null}'
    assert json.loads(lines[1]) == {"key": 'b"é', "n": -2, "x": [2, 3], "mixed": {"t": [1, 2], "a": [1]}}


def test_a_parquet_column_has_one_type_over_all_files(tmp_path: Path) -> None:
    """What one batch leaves open (None, an empty list, whole numbers, a missing output) others settle."""
    first: Columns = {"a": [None, None], "b": [1, 2], "c": [[], []], "d": np.zeros((2, 0, 3), dtype=np.int8)}
    second: Columns = {"a": ["text"], "b": [0.5], "c": [[1]], "e": [torch.ones(2, 1, dtype=torch.uint8)]}
    format = Parquet()
    pieces = [format.piece(["k0", "k1"], first), format.piece(["k2"], second)]
    alone = Parquet()
    alone.settle([b"", format.summary()])
    for number, (piece, rows) in enumerate(zip(pieces, (2, 1), strict=True)):
        alone.join(iter([piece]), rows, tmp_path / f"{number}.parquet")
    tables = [parquet.read_table(tmp_path / f"{number}.parquet") for number in (0, 1)]
    assert tables[0].schema == tables[1].schema
    assert [str(field.type) for field in tables[0].schema] == [
        "string",
        "string",
        "double",
        "list<element: int64>",
        "list<element: list<element: int8>>",
        "list<element: list<element: uint8>>",
    ]
    assert tables[0].to_pylist()[1] == {"key": "k1", "a": None, "b": 2, "c": [], "d": [], "e": None}
    assert tables[1].to_pylist() == [{"key": "k2", "a": "text", "b": 0.5, "c": [1], "d": None, "e": [[1], [1]]}]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([torch.tensor([1]), torch.tensor([0.5])], "list<element: double>", [[1.0], [0.5]]),
        ([torch.tensor([1.5]), torch.tensor([0.1], dtype=torch.float64)], "list<element: double>", [[1.5], [0.1]]),
        ([np.float32(1), 0.1], "double", [1.0, 0.1]),
        ([np.int8(1), None, 300], "int64", [1, None, 300]),
    ],
)
def test_parquet_rounds_nothing_where_types_are_mixed(
    tmp_path: Path, values: list[Any], kind: str, expected: list[Any]
) -> None:
    keys = [f"{number}" for number in range(len(values))]
    table = parquet.read_table(join(Parquet(), (keys, {"x": values}), path=tmp_path / "x.parquet"))
    assert (str(table.schema.field("x").type), table["x"].to_pylist()) == (kind, expected)


def test_parquet_refuses_numbers_that_the_type_of_all_batches_would_round(tmp_path: Path) -> None:
    parts = [(["a"], {"x": np.array([2**53 + 1])}), (["b"], {"x": np.array([0.5])})]
    with pytest.raises(DataError, match=r"changes its type between batches.* 9007199254740993"):
        join(Parquet(), *parts, path=tmp_path / "x.parquet")


def test_parquet_row_groups_end_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.callbacks.predictions.formats._GROUP_ROWS", 4)
    parts = [([f"{start + row}" for row in range(3)], {"x": np.arange(3) + start}) for start in range(0, 15, 3)]
    path = join(Parquet(), *parts, path=tmp_path / "x.parquet")
    file = parquet.ParquetFile(path)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [6, 6, 3]
    assert parquet.read_table(path)["x"].to_pylist() == list(range(15))


def test_a_tar_has_a_file_an_output(tmp_path: Path) -> None:
    columns = {
        "x": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "n": torch.tensor([4, 5]).numpy(),
        "text": ["é", None],
        "raw": [b"\0", b""],
        "more": [{"a": [1]}, 2.5],
        "rows": [torch.zeros(2, 2).T, torch.zeros(1)],
    }
    shard = join(Tar(), (["a", "sub/b"], columns), path=tmp_path / "x.tar")
    (a, first), (b, second) = tar_samples([str(shard)])
    assert (a, b) == ("a", "sub/b")
    assert {name: content for name, content in first.items() if not name.endswith("npy")} == {
        "text.txt": "é".encode(),
        "raw.bin": b"\0",
        "more.json": b'{"a": [1]}',
    }
    assert second["text.json"] == b"null"
    assert second["more.json"] == b"2.5"
    arrays = {name: np.load(io.BytesIO(content)) for name, content in first.items() if name.endswith("npy")}
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "x.npy": ("float32", (3,)),
        "n.npy": ("int64", ()),
        "rows.npy": ("float32", (2, 2)),
    }
    assert not np.isfortran(arrays["rows.npy"])


def test_keys_that_occur_again_in_a_tar_get_numbers(tmp_path: Path) -> None:
    format = Tar()
    keys = ["a", "a-2", "a", "b", "a", "a-2"]
    path = join(format, (keys, {"n": list(range(6))}), path=tmp_path / "x.tar")
    assert [key for key, _ in tar_samples([str(path)])] == ["a", "a-2", "a-3", "b", "a-4", "a-2-2"]
    assert format.renamed == 3


class Other:
    """What no format knows."""


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("jsonl", {"z": np.array([1j])}, "output 'z' cannot be written to JSON: complex"),
        ("jsonl", {"z": [Other()]}, "output 'z' cannot be written to JSON: Other"),
        ("jsonl", {"key": [1]}, "an output is called 'key'"),
        ("parquet", {"z": np.array([1j])}, "output 'z' cannot be written to Parquet"),
        ("parquet", {"z": [Other()]}, "output 'z' cannot be written to Parquet"),
        ("parquet", {"z": [np.datetime64(1, "s"), 0.5]}, "output 'z' cannot be written to Parquet"),
        ("parquet", {"z": [2**70]}, "output 'z' cannot be written to Parquet"),
        ("parquet", {"key": [1]}, "an output is called 'key'"),
        ("tar", {"z": [Other()]}, "output 'z' cannot be written to a tar: Other"),
        ("tar", {"z": [np.array([None])]}, "output 'z' cannot be written to a tar: .*objects"),
        ("tar", {"Z": [1]}, "output 'Z' cannot be the name of a file in a tar"),
        ("tar", {"a/b": [1]}, "output 'a/b' cannot be the name"),
        ("tar", {"_z": [1]}, "output '_z' cannot be the name"),
    ],
)
def test_outputs_that_a_format_cannot_hold_are_named(name: FormatName, columns: Columns, words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_format(name).piece(["a", "b"][: len(next(iter(columns.values())))], columns)


def test_types_that_do_not_go_together_are_refused_by_parquet() -> None:
    format = Parquet()
    format.piece(["a"], {"z": ["text"]})
    with pytest.raises(DataError, match="changes its type between batches"):
        format.piece(["b"], {"z": [1]})


def test_without_pyarrow_parquet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"(?s)needs pyarrow, which is missing.*pip install 'disttrain\[parquet\]'"):
        PredictionWriter(Output(Path("p.parquet"), "parquet"))


class Plain(pl.LightningModule):
    """No Task: it knows nothing of padding."""

    def __init__(self, predict: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.result = predict

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Whatever it was told to return."""
        return self.result(batch)


def run_plain(tmp_path: Path, result: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Ten samples by a module that is no Task, in micro batches of four."""
    shard = write_features(tmp_path / "data", "part", 10)
    output = Output(tmp_path / "out.jsonl", "jsonl")
    writer = PredictionWriter(output)
    trainer = Trainer(run_dir=str(tmp_path / "run"), progress_bar=False, callbacks=[writer])
    data = ShardedDataModule(predict=shard, fields=FIELDS, micro_batch_size=4)
    trainer.predict(Plain(result), datamodule=data, return_predictions=False)
    return [json.loads(line) for line in output.path.read_text().splitlines()]


def test_any_lightning_module_predicts_and_padding_is_cut_off(tmp_path: Path) -> None:
    lines = run_plain(tmp_path / "tensor", lambda batch: batch["label"] + 1)
    assert [line["key"] for line in lines] == [f"part-{number:04d}" for number in range(10)]
    assert all(line.keys() == {"key", "output"} for line in lines)
    again = run_plain(tmp_path / "names", lambda batch: {"a": batch["label"] + 1, "b": batch["__key__"]})
    assert again == [{"key": line["key"], "a": line["output"], "b": line["key"]} for line in lines]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda batch: [1], "a list of 1"),
        (lambda batch: {"x": batch["label"][:1]}, r"a tensor of shape \(1,\)"),
        (lambda batch: {"x": batch["label"].sum()}, r"a tensor of shape \(\)"),
        (lambda batch: {"x": "text"}, "a str"),
        (lambda batch: {"x": {"y": 1}}, "a int"),
    ],
)
def test_what_is_not_a_value_a_sample_is_refused(
    tmp_path: Path, result: Callable[[dict[str, Any]], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"predict_step of Plain returned {words} for a micro batch of 4"):
        run_plain(tmp_path, result)
    assert not (tmp_path / "out.jsonl").exists()
