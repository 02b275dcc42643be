"""Sources: what becomes of scikit-learn's data, image folders and tables, and what is said of faulty ones."""

from __future__ import annotations

import importlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.pack.packer import PackConfig, pack
from disttrain.data.pack.samples import Sample
from disttrain.data.pack.sources import open_source
from disttrain.errors import ConfigError, DataError

TABLE = """name,height,weight,kind
a,1.5,60,cat
b,2,61.5,dog
c,1e-3,-7,cat
"""


def array(sample: Sample, name: str) -> NDArray[np.generic]:
    found: NDArray[np.generic] = np.load(io.BytesIO(sample.fields[name]), allow_pickle=False)
    assert not found.flags.fnc or found.ndim < 2, f"{name} is in Fortran order"
    return found


@pytest.mark.parametrize(
    ("name", "num_samples", "shape", "num_classes"),
    [
        ("digits", 1797, (1, 8, 8), 10),
        ("iris", 150, (4,), 3),
        ("wine", 178, (13,), 3),
        ("breast_cancer", 569, (30,), 2),
        ("diabetes", 442, (10,), 0),
    ],
)
def test_sklearns_data(name: str, num_samples: int, shape: tuple[int, ...], num_classes: int) -> None:
    samples = open_source(f"sklearn:{name}").load()
    assert (len(samples), len(samples.classes)) == (num_samples, num_classes)
    data = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")
    data = data(scaled=False) if name == "diabetes" else data()
    field = "image.npy" if name == "digits" else "features.npy"
    for number in (0, 1, num_samples - 1):
        sample = samples.read(number)
        assert sample.key == f"{name}-{number:06d}"
        found = array(sample, field)
        assert (found.shape, found.dtype) == (shape, np.dtype(np.uint8 if name == "digits" else np.float32))
        np.testing.assert_array_equal(found.ravel(), data.data[number].astype(found.dtype))
        if name == "diabetes":
            target = array(sample, "target.npy")
            assert (target.shape, target.dtype) == ((), np.dtype(np.float32))
            assert float(target) == data.target[number]
        else:
            assert set(sample.fields) == {field, "cls"}
            assert int(sample.fields["cls"]) == data.target[number]


@pytest.mark.parametrize(
    ("spec", "options", "kind", "words"),
    [
        ("sklearn:digit", {}, DataError, "did you mean 'digits'?"),
        ("sklearn:iris", {"task": "regression"}, ConfigError, "is for classification, not regression"),
        ("sklearn:iris", {"target": "x"}, ConfigError, "has no columns to choose"),
        ("nowhere", {}, DataError, "there is no such folder"),
        ("nowhere.csv", {"target": "x"}, DataError, "cannot read nowhere.csv: No such file"),
        ("sklearn:iris", {"task": "ranking"}, ConfigError, "task is 'ranking'"),
    ],
)
def test_unknown_sources_are_named(spec: str, options: dict[str, str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        open_source(spec, **options)
    assert words in str(caught.value)


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(DataError, match=r"pip install 'disttrain\[recipes\]'"):
        open_source("sklearn:iris")


def add_images(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {path.name}".encode())


def test_image_folder(tmp_path: Path) -> None:
    names = ["dog/b.JPEG", "dog/a.v2.jpg", "dog/a_v2.jpg", "dog/c.avif", "cat/a.png", "cat/ü ö.webp", "__x__/a.jpg"]
    add_images(tmp_path / "in", [*names, "cat/.hidden.jpg", "cat/notes.txt", "readme.md", ".git/a.jpg"])
    samples = open_source(str(tmp_path / "in")).load()
    assert samples.classes == ("__x__", "cat", "dog")
    found = {sample.key: dict(sample.fields) for sample in samples}
    assert found == {
        "_x__/a": {"jpg": b"bytes of a.jpg", "cls": b"0"},
        "cat/a": {"png": b"bytes of a.png", "cls": b"1"},
        "cat/ü_ö": {"webp": "bytes of ü ö.webp".encode(), "cls": b"1"},
        "dog/a_v2": {"jpg": b"bytes of a.v2.jpg", "cls": b"2"},
        "dog/a_v2-2": {"jpg": b"bytes of a_v2.jpg", "cls": b"2"},
        "dog/b": {"jpg": b"bytes of b.JPEG", "cls": b"2"},
        "dog/c": {"avif": b"bytes of c.avif", "cls": b"2"},
    }
    assert samples.notes[0] == f"skipped files that are not images: {tmp_path}/in/cat/notes.txt"
    assert samples.notes[1] == "images of several kinds: 1 avif, 4 jpg, 1 png, 1 webp"
    pack(open_source(str(tmp_path / "in")), out_dir=tmp_path / "out", config=PackConfig(fractions=()))
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["__x__", "cat", "dog"]
    index = ShardIndex.open(str(tmp_path / "out/data.json"))
    assert {index.key(number) for number in range(len(index))} == set(found)


def test_image_folder_with_splits_of_its_own(tmp_path: Path) -> None:
    add_images(tmp_path / "in", [f"train/{c}/{i}.jpg" for c in ("a", "b") for i in range(5)])
    add_images(tmp_path / "in", ["val/b/0.jpg", "val/a/7.jpg"])
    source = open_source(str(tmp_path / "in"))
    done = pack(source, out_dir=tmp_path / "out")
    assert {prefix: split.num_samples for prefix, split in done.splits.items()} == {"train": 10, "val": 2}
    index = ShardIndex.open(str(tmp_path / "out/val.json"))
    assert [index.key(number) for number in range(2)] == ["a/7", "b/0"], "the same key may be in two splits"
    assert pack(source, out_dir=tmp_path / "out").was_complete
    with pytest.raises(ConfigError, match="already has splits"):
        pack(source, out_dir=tmp_path / "out", config=PackConfig(fractions=(0.5, 0.5)))
    add_images(tmp_path / "in", ["val/bb/0.jpg"])
    with pytest.raises(DataError, match=r"class 'bb' of .* is not in train"):
        open_source(str(tmp_path / "in")).load()
    add_images(tmp_path / "in", ["valid/b/0.jpg"])
    with pytest.raises(DataError, match="also a folder 'valid'"):
        open_source(str(tmp_path / "in"))


def test_a_changed_image_folder_is_packed_again(tmp_path: Path) -> None:
    add_images(tmp_path, [f"{c}/{i}.jpg" for c in ("a", "b") for i in range(3)])
    before = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == before
    os.utime(tmp_path / "a/0.jpg", (1, 1))
    touched = open_source(str(tmp_path)).fingerprint
    add_images(tmp_path, ["a/9.jpg"])
    assert len({before, touched, open_source(str(tmp_path)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "b.jpg"], "holds no images in class folders"),
        (["cat/a.jpg", "dog/readme.txt"], "holds no images"),
        (["train/cat/a.jpg", "val/a.jpg"], "val holds no images in class folders"),
    ],
)
def test_folders_without_images_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    add_images(tmp_path, names)
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    assert words in caught.value.what


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_with_classes(tmp_path: Path, separator: str) -> None:
    spec = write(tmp_path / "my pets.csv", "\ufeff" + TABLE.replace(",", separator) + "\n")
    samples = open_source(spec, target="kind").load()
    assert samples.classes == ("cat", "dog")
    assert samples.notes == ("skipped non-numeric columns: name",)
    assert [(sample.key, sample.fields["cls"]) for sample in samples] == [
        ("my_pets-000000", b"0"),
        ("my_pets-000001", b"1"),
        ("my_pets-000002", b"0"),
    ]
    features = np.stack([array(sample, "features.npy") for sample in samples])
    np.testing.assert_array_equal(features, np.array([[1.5, 60], [2, 61.5], [1e-3, -7]], dtype=np.float32))


def test_csv_with_a_target(tmp_path: Path) -> None:
    spec = write(tmp_path / "t.csv", TABLE)
    samples = open_source(spec, target="height", features=["weight"]).load()
    assert [float(array(sample, "target.npy")) for sample in samples] == [1.5, 2.0, np.float32(1e-3)]
    assert array(samples.read(1), "features.npy").tolist() == [61.5]
    assert samples.notes == (), "named columns leave nothing to be told"
    assert samples.labels is not None
    assert samples.labels.dtype == np.float64


@pytest.mark.parametrize(
    ("labels", "numbers", "classes", "num_notes"),
    [
        (["0", "2", "1"], [0, 2, 1], (), 0),
        (["0", "3", "1"], [0, 3, 1], (), 1),
        (["1.0", "0", "1"], [1, 0, 1], (), 0),
        (["-1", "1", "-1"], [0, 1, 0], ("-1", "1"), 0),
        (["b", " a", "b "], [1, 0, 1], ("a", "b"), 0),
        (["10", "9", "x"], [0, 1, 2], ("10", "9", "x"), 0),
    ],
)
def test_class_labels(
    tmp_path: Path, labels: list[str], numbers: list[int], classes: tuple[str, ...], num_notes: int
) -> None:
    spec = write(tmp_path / "t.csv", "x,y\n" + "".join(f"1,{label}\n" for label in labels))
    samples = open_source(spec, target="y", task="classification").load()
    assert [int(sample.fields["cls"]) for sample in samples] == numbers
    assert (samples.classes, len(samples.notes)) == (classes, num_notes)


@pytest.mark.parametrize(
    ("text", "options", "kind", "words"),
    [
        (TABLE, {}, ConfigError, ["no target column", "--target COLUMN, one of name, height, weight, kind"]),
        (TABLE, {"target": "hight"}, DataError, ["no column 'hight' (the target)", "did you mean 'height'?"]),
        (TABLE, {"target": "kind", "features": ["wait"]}, DataError, ["no column 'wait' (feature)", "'weight'"]),
        (TABLE, {"target": "kind", "features": ["kind"]}, ConfigError, ["both target and feature"]),
        (
            TABLE,
            {"target": "kind", "task": "regression"},
            DataError,
            ["row 0 (line 2), column 'kind': 'cat'", "2 more"],
        ),
        (TABLE, {"target": "height", "task": "classification"}, DataError, ["row 0 (line 2)", "1.5 is not a class"]),
        ("x,y\n1,3\n2,4\n", {"target": "y"}, ConfigError, ["whole numbers", "--task classification or"]),
        ("x,y\n1,a\n\noops,b\n", {"target": "y"}, DataError, ["t.csv, row 1 (line 4), column 'x': 'oops'"]),
        ("x,y\n1,a\n,b\n", {"target": "y"}, DataError, ["row 1 (line 3), column 'x': missing"]),
        ("x,y\n1,a\nnan,b\n", {"target": "y"}, DataError, ["row 1 (line 3), column 'x': 'nan'"]),
        ("x,y\n1,a\n1e39,b\n", {"target": "y"}, DataError, ["'1e39', not a finite float32"]),
        ("x,y\n1,a\n1_0,b\n", {"target": "y"}, DataError, ["'1_0'"]),
        ("x,y\n1,a\n2,\n", {"target": "y"}, DataError, ["row 1 (line 3), column 'y': the class is missing"]),
        ("x,y\n1,a\n2\n", {"target": "y"}, DataError, ["line 3: 1 cells, but 2 columns"]),
        ("x,x\n1,a\n", {"target": "x"}, DataError, ["two columns 'x'"]),
        ("1,2\n3,4\n", {"target": "x"}, DataError, ["its first line holds numbers"]),
        ("x,y\n", {"target": "y"}, DataError, ["it holds no rows"]),
        ("", {"target": "y"}, DataError, ["it holds no rows"]),
        ('x,y\n1,"a\n', {"target": "y"}, DataError, ["after line 1: unexpected end of data"]),
        ("n,y\na,b\n", {"target": "y"}, DataError, ["no numeric columns besides 'y'"]),
    ],
)
def test_faulty_tables_are_named(
    tmp_path: Path, text: str, options: dict[str, object], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        open_source(write(tmp_path / "t.csv", text), **options).load()  # type: ignore[arg-type]
    for part in words:
        assert part in str(caught.value)


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("x,y\n1,ä\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as CSV in UTF-8"):
        open_source(str(tmp_path / "t.csv"), target="y").load()


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    columns = {
        "f": pa.array([1.5, 2.5, -1.0]),
        "i": pa.array([1, 2, 3], type=pa.int16()),
        "b": pa.array([True, False, True]),
        "day": pa.array([0, 1, 2], type=pa.date32()),
        "kind": pa.array(["y", "x", "y"]).dictionary_encode(),
        "gap": pa.array([1.0, None, 2.0]),
    }
    spec = str(tmp_path / "t.parquet")
    parquet.write_table(pa.table(columns), spec)
    samples = open_source(spec, target="kind", features=["f", "i", "b"]).load()
    assert samples.classes == ("x", "y")
    assert [int(sample.fields["cls"]) for sample in samples] == [1, 0, 1]
    assert array(samples.read(1), "features.npy").tolist() == [2.5, 2.0, 0.0]
    assert array(open_source(spec, target="f", features=["i"]).load().read(2), "target.npy") == -1.0
    with pytest.raises(DataError, match=r"t\.parquet, row 1, column 'gap': missing"):
        open_source(spec, target="kind").load()
    with pytest.raises(DataError, match=r"column 'day' .* holds neither numbers nor text"):
        open_source(spec, target="day", task="regression").load()
    (tmp_path / "t.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        open_source(spec, target="kind").load()


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'disttrain\[parquet\]'"):
        open_source(write(tmp_path / "t.parquet", ""), target="y").load()


def test_a_changed_table_or_option_has_another_fingerprint(tmp_path: Path) -> None:
    spec = write(tmp_path / "t.csv", TABLE)
    found = [open_source(spec, target="kind").fingerprint, open_source(spec, target="height").fingerprint]
    found.append(open_source(spec, target="kind", features=["weight"]).fingerprint)
    write(tmp_path / "t.csv", TABLE.replace("60", "61"))
    found.append(open_source(spec, target="kind").fingerprint)
    assert len(set(found)) == 4
