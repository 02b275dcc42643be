"""Predictions are the same files at every world size, whole or not there, and hold every sample once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from webdataset.writer import TarWriter

from disttrain import ShardedDataModule
from disttrain.callbacks.predictions.files import Output
from disttrain.callbacks.predictions.formats import FormatName
from tests.support.features import write_features
from tests.support.predictions import content, hidden, predict
from tests.support.ranks import run_cli, run_ranks
from tests.support.shards import tar_samples

SIZES = (13, 1, 23)
FORMATS: tuple[FormatName, ...] = ("jsonl", "parquet", "tar")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """37 samples in three shards."""
    return [write_features(tmp_path / "data", f"part{number}", size) for number, size in enumerate(SIZES)]


def keys_of(shards: list[str]) -> list[str]:
    return [key for key, _ in tar_samples(shards)]


def outputs_in(folder: Path, per_file: int) -> list[Output]:
    """A folder and a file of each format."""
    folder.mkdir(parents=True)
    many = [Output(folder / f"{name}-folder", name, per_file) for name in FORMATS]
    return [*many, *(Output(folder / f"{name}-file.{name}", name) for name in FORMATS)]


def lines_of(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.decode().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("per_file", [5, 8])
def test_files_are_the_same_at_every_world_size(shards: list[str], tmp_path: Path, per_file: int) -> None:
    """Files of 5 samples straddle micro batches of 4 and ranks; those of 8 straddle ranks."""
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    layouts = [(1, "ddp"), (2, "ddp"), (3, "ddp"), (4, "ddp")] + ([(2, "fsdp")] if per_file == 5 else [])
    for ranks, strategy in layouts:
        folder = tmp_path / f"{strategy}-{ranks}"
        outputs = outputs_in(folder, per_file)
        run_ranks(ranks, predict, shards, outputs, strategy, folder=tmp_path / f"logs-{strategy}-{ranks}").ok()
        found[folder.name] = {output.path.name: content(output.path) for output in outputs}
        assert not hidden(folder), f"{folder.name} leaves parts behind"
    alone = found["ddp-1"]
    number = -(-37 // per_file)
    assert [len(files) for files in alone.values()] == [number, number, 2 * number + 1, 1, 1, 2]
    for layout, made in found.items():
        for name, files in made.items():
            assert files.keys() == alone[name].keys(), f"{layout} makes other files in {name}"
            differ = [file for file in files if files[file] != alone[name][file]]
            assert not differ, f"{layout} differs from one process in {differ} of {name}"

    lines = lines_of(alone["jsonl-file.jsonl"]["jsonl-file.jsonl"])
    assert [line["key"] for line in lines] == keys_of(shards)
    for number, file in enumerate(alone["jsonl-folder"].values()):
        assert lines_of(file) == lines[number * per_file : (number + 1) * per_file], f"file {number}"


def test_formats_hold_the_same_results_with_their_types(shards: list[str], tmp_path: Path) -> None:
    outputs = outputs_in(tmp_path / "out", 10)
    run_ranks(2, predict, shards, outputs, folder=tmp_path / "logs").ok()
    lines = lines_of((tmp_path / "out" / "jsonl-file.jsonl").read_bytes())

    for place in ("parquet-file.parquet", "parquet-folder"):
        table = parquet.read_table(tmp_path / "out" / place)
        types = {field.name: str(field.type) for field in table.schema}
        assert types == {
            "key": "string",
            "class": "int64",
            "score": "double",
            "sure": "bool",
            "half": "list<element: halffloat>",
            "short": "list<element: float>",
            "matrix": "list<element: list<element: float>>",
            "text": "string",
            "maybe": "int64",
            "ragged": "list<element: float>",
            "nested": "struct<key: string, parts: list<element: double>>",
        }
        assert table.to_pylist() == lines, place

    data = ShardedDataModule(
        predict=str(tmp_path / "out" / "tar-folder" / "predictions.json"),
        fields={
            **{name: f"{name}.npy" for name in ("class", "score", "sure", "half", "short", "matrix")},
            "text": "text.txt",
            **{name: f"{name}.json" for name in ("maybe", "nested")},
        },
        micro_batch_size=37,
    )
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert batch["__key__"] == [line["key"] for line in lines]
    types = {"class": torch.int64, "score": torch.float64, "sure": torch.bool, "half": torch.float16}
    for name in ("class", "score", "sure", "half", "short", "matrix"):
        assert batch[name].dtype == types.get(name, torch.float32), name
        assert batch[name].tolist() == [line[name] for line in lines], name
    for name in ("text", "maybe", "nested"):
        assert batch[name] == [line[name] for line in lines], name
    single = tar_samples([str(tmp_path / "out" / "tar-file.tar")])
    folder = tar_samples([str(path) for path in sorted((tmp_path / "out" / "tar-folder").glob("*.tar"))])
    assert single == folder


@pytest.mark.parametrize(("kill", "name"), [((1, 2), "jsonl"), ((0, 4), "tar"), ("publish", "parquet")])
def test_a_killed_prediction_leaves_nothing_to_be_seen_and_is_run_again(
    shards: list[str], tmp_path: Path, kill: tuple[int, int] | str, name: FormatName
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    output, fresh = Output(out / "results", name, 6), Output(out / "fresh", name, 6)
    codes = run_ranks(2, predict, shards, [output], "ddp", kill, folder=tmp_path / "killed").codes
    assert -9 in codes, codes
    assert not output.path.exists(), "an unfinished output has its name"
    assert len(hidden(out)) == 1, "the parts of the killed run"
    run_ranks(3, predict, shards, [output, fresh], folder=tmp_path / "again").ok()
    assert not hidden(out), "the second run leaves what it or the first made"
    assert content(output.path) == content(fresh.path)
    assert len(content(output.path)) == (15 if name == "tar" else 7)


def test_an_output_that_exists_is_refused_before_anything_is_computed(digits: Path, tmp_path: Path) -> None:
    common = [
        *("--config", "recipes/digits.yaml", "--trainer.run_dir", str(tmp_path / "run"), "--trainer.max_steps", "2"),
        *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
        *("--model.schedule.name", "constant"),
    ]
    run_cli(1, ["fit", *common], folder=tmp_path / "fit").ok()
    first = run_cli(2, ["predict", *common], folder=tmp_path / "first").ok()
    written = tmp_path / "run" / "predictions.jsonl"
    assert f"disttrain: wrote 269 results to {written}" in first.text
    before = written.read_bytes()

    # Were anything computed first, the checkpoint, which is not there, would be the error.
    again = run_cli(2, ["predict", *common, "--checkpoint_path", "nowhere"], folder=tmp_path / "again")
    assert again.codes == [2, 2], again.text
    assert f"disttrain: error (rank 0 of 2): predictions exist: {written}" in again.outputs[0]
    assert "--overwrite" in again.outputs[0]
    assert again.outputs[1] == "", again.text
    assert written.read_bytes() == before

    written.write_text("something older")
    run_cli(3, ["predict", *common, "--overwrite"], folder=tmp_path / "over").ok()
    assert written.read_bytes() == before
    assert not hidden(tmp_path / "run")


def test_skipped_samples_have_no_result_and_the_others_keep_their_file(tmp_path: Path) -> None:
    """Samples 3 to 9 are bad: the second file of four has none, the third fewer."""
    good = tar_samples([write_features(tmp_path / "data", "part", 18)])
    damaged = tmp_path / "data" / "damaged.tar"
    with TarWriter(str(damaged), encoder=False) as writer:
        for number, (key, fields) in enumerate(good):
            writer.write({"__key__": key, **fields, **({"cls": b"none"} if 3 <= number <= 9 else {})})
    kept = [key for number, (key, _) in enumerate(good) if not 3 <= number <= 9]
    found = []
    for ranks in (1, 3):
        output = Output(tmp_path / f"out-{ranks}" / "results", "jsonl", 4)
        outcome = run_ranks(
            ranks, predict_skipping, [str(damaged)], [output], 10, folder=tmp_path / f"logs-{ranks}"
        ).ok()
        assert "wrote 11 results" in outcome.text
        assert "7 bad samples were skipped and have no result" in outcome.text
        found.append(content(output.path))
    assert found[0] == found[1]
    keys = {name: [line["key"] for line in lines_of(text)] for name, text in found[0].items()}
    assert keys == {
        "predictions-000000.jsonl": kept[:3],
        "predictions-000002.jsonl": kept[3:5],
        "predictions-000003.jsonl": kept[5:9],
        "predictions-000004.jsonl": kept[9:],
    }
    output = Output(tmp_path / "out" / "results", "jsonl", 4)
    codes = run_ranks(2, predict_skipping, [str(damaged)], [output], 5, folder=tmp_path / "logs").codes
    assert 0 not in codes
    assert not output.path.exists(), "more were skipped than are allowed, and results are published"


def predict_skipping(shards: list[str], outputs: list[Output], budget: int) -> None:
    predict(shards, outputs, on_bad_sample="skip", max_bad_samples=budget)


def test_keys_that_several_shards_hold_stay_apart(tmp_path: Path) -> None:
    """Three shards of the same keys; a tar of 8 samples holds a key up to twice, across ranks."""
    shards = [write_features(tmp_path / f"data{copy}", "part", 5) for copy in range(3)]
    keys = keys_of(shards[:1])
    found = []
    for ranks in (1, 3):
        outputs = outputs_in(tmp_path / f"out-{ranks}", 8)
        outcome = run_ranks(ranks, predict, shards, outputs, folder=tmp_path / f"logs-{ranks}").ok()
        assert "5 results got a number behind their key" in outcome.text
        found.append({output.path.name: content(output.path) for output in outputs})
    assert found[0] == found[1]
    assert [line["key"] for line in lines_of(found[0]["jsonl-file.jsonl"]["jsonl-file.jsonl"])] == keys * 3
    tars = sorted((tmp_path / "out-1" / "tar-folder").glob("*.tar"))
    second = [f"{key}-2" for key in keys]
    assert [key for key, _ in tar_samples([str(tars[0])])] == keys + second[:3]
    assert [key for key, _ in tar_samples([str(tars[1])])] == keys[3:] + keys[:3] + second[3:]
    assert [key for key, _ in tar_samples([str(tmp_path / "out-1" / "tar-file.tar")])] == [
        *keys,
        *second,
        *(f"{key}-3" for key in keys),
    ]


def test_fewer_samples_than_ranks(tmp_path: Path) -> None:
    shard = write_features(tmp_path / "data", "part", 2)
    for ranks in (1, 4):
        outputs = outputs_in(tmp_path / f"out-{ranks}", 1)
        run_ranks(ranks, predict, [shard], outputs, folder=tmp_path / f"logs-{ranks}").ok()
        assert len(lines_of((tmp_path / f"out-{ranks}" / "jsonl-file.jsonl").read_bytes())) == 2
    assert content(tmp_path / "out-1" / "tar-folder") == content(tmp_path / "out-4" / "tar-folder")
