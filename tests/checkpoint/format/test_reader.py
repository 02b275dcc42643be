"""Checkpoint folders of one process: committed or not there, read back bit by bit, and never unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain.checkpoint.format import writer as write_module
from disttrain.checkpoint.format.reader import (
    Committed,
    Tensors,
    check,
    committed,
    read_meta,
    read_model,
    read_tensors,
    remove,
)
from disttrain.checkpoint.format.writer import write
from disttrain.errors import CheckpointError
from tests.support.checkpoints import commit, make_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

META = {"progress": {"epoch": 1, "step": 2}, "trainer": {"names": ["a", None], "t": torch.arange(3), "x": 0.1}}


def state(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "layer.weight": torch.randn(7, 5, generator=generator),
            "layer.bias": torch.randn(7, generator=generator).to(torch.bfloat16),
            "scale": torch.randn((), generator=generator, dtype=torch.float64),
            "counts": torch.arange(4),
        },
        "optimizer0": {"layer.weight": {"exp_avg": torch.randn(7, 5, generator=generator), "step": torch.tensor(3.0)}},
    }


def like(tree: Tensors) -> Tensors:
    return {name: like(value) if isinstance(value, dict) else torch.zeros_like(value) for name, value in tree.items()}


def leaves(tree: Tensors, prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in tree.items():
        out |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def check_equal(found: Tensors, expected: Tensors) -> None:
    ours, theirs = leaves(found), leaves(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, f"{name} is {ours[name].dtype}"
        assert torch.equal(ours[name], tensor), f"{name} is {ours[name]}, was {tensor}"


def save(directory: Path, name: str = "step-5", *, step: int = 5, seed: int = 0) -> Path:
    return write(directory, name, tensors=state(seed), meta=META, global_step=step)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def test_what_is_written_is_read_back_bit_by_bit(saved: Path) -> None:
    assert check(saved) == Committed(saved, 5)
    into = like(state())
    read_tensors(saved, into)
    check_equal(into, state())
    check_equal({"model": read_model(saved)}, {"model": state()["model"]})
    meta = read_meta(saved)
    assert torch.equal(meta["trainer"].pop("t"), torch.arange(3))
    assert meta == {"format": 3, "progress": {"epoch": 1, "step": 2}, "trainer": {"names": ["a", None], "x": 0.1}}


def test_a_part_of_the_tensors_may_be_read(saved: Path) -> None:
    into = {"model": {"scale": torch.zeros((), dtype=torch.float64)}}
    read_tensors(saved, into)
    assert torch.equal(into["model"]["scale"], state()["model"]["scale"])


def test_tensors_are_read_in_place(saved: Path) -> None:
    weight = torch.zeros(7, 5)
    read_tensors(saved, {"model": {"layer.weight": weight}})
    assert torch.equal(weight, state()["model"]["layer.weight"])


def test_a_folder_holds_marker_and_latest_and_nothing_half_done(saved: Path) -> None:
    names = sorted(path.name for path in saved.parent.iterdir())
    assert names == ["LATEST", "step-5"]
    assert (saved.parent / "LATEST").read_text() == "step-5\n"
    marker = json.loads((saved / "COMMITTED").read_text())
    sums = {
        path.name: [path.stat().st_size, f"{zlib.crc32(path.read_bytes()):08x}"]
        for path in saved.iterdir()
        if path.name != "COMMITTED"
    }
    assert set(sums) == {".metadata", "__0_0.distcp", "meta.pt"}
    del marker["time"], marker["crc32"]
    known = {"global_step": 5, "epoch": None, "run": "", "attempt": 0, "metric": None}
    assert marker == {"format": 3, **known, "checksum": "crc32", "files": sums}


def test_a_taken_name_gets_a_number(saved: Path) -> None:
    second, third = save(saved.parent, step=6, seed=1), save(saved.parent, step=7, seed=2)
    assert [path.name for path in (second, third)] == ["step-5.2", "step-5.3"]
    check_equal({"model": read_model(saved)}, {"model": state()["model"]})
    check_equal({"model": read_model(second)}, {"model": state(1)["model"]})
    assert (saved.parent / "LATEST").read_text() == "step-5.3\n"


FILES = [".metadata", "__0_0.distcp", "meta.pt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["cut", "emptied", "grown", "deleted"])
def test_torn_files_are_named(saved: Path, name: str, way: str) -> None:
    file = saved / name
    size = file.stat().st_size
    if way == "deleted":
        file.unlink()
    else:
        os.truncate(file, {"cut": size - 1, "emptied": 0, "grown": size + 1}[way])
    now = "is missing" if way == "deleted" else f"has {file.stat().st_size} bytes"
    for read in (check, read_meta, read_model):
        with pytest.raises(CheckpointError) as caught:
            read(saved)
        assert str(caught.value) == (
            f"checkpoint {saved} is torn: {name} {now}, but its marker says {size}\n  hint: resume from an earlier one"
        )
    assert committed(saved.parent) == ([], [f"checkpoint {saved} is torn: {name} {now}, but its marker says {size}"])


def test_without_its_marker_a_checkpoint_does_not_exist(saved: Path, tmp_path: Path) -> None:
    (saved / "COMMITTED").unlink()
    for read in (check, read_meta, read_model):
        with pytest.raises(CheckpointError, match="was never committed"):
            read(saved)
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            read(tmp_path / "none")


@pytest.mark.parametrize(
    "marker",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"global_step": 5}',
        b'{"files": {}}',
        b'{"files": [], "global_step": 5}',
        b'{"files": null, "global_step": 5}',
        b'{"files": {}, "global_step": null}',
        b'{"files": {}, "global_step": "five"}',
    ],
)
def test_a_damaged_marker_is_none(saved: Path, marker: bytes) -> None:
    (saved / "COMMITTED").write_bytes(marker)
    with pytest.raises(CheckpointError, match="has a damaged COMMITTED"):
        check(saved)
    assert committed(saved.parent)[0] == []


def test_a_marker_cut_at_any_byte_is_none(saved: Path) -> None:
    whole = (saved / "COMMITTED").read_bytes()
    for length in range(len(whole)):
        (saved / "COMMITTED").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            check(saved)


def test_an_index_cut_at_any_byte_is_refused(saved: Path) -> None:
    whole = (saved / ".metadata").read_bytes()
    for length in range(0, len(whole), 3):
        (saved / ".metadata").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="index of checkpoint"):
            read_tensors(saved, like(state()))


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_right_size_with_other_contents_are_refused(saved: Path, name: str) -> None:
    (saved / name).write_bytes(bytes((saved / name).stat().st_size))
    check(saved)
    readers = [read_meta] if name == "meta.pt" else [read_model, lambda path: read_tensors(path, like(state()))]
    for read in readers:
        with pytest.raises(CheckpointError) as caught:
            read(saved)
        assert str(saved) in str(caught.value)


def test_a_newer_format_is_refused(saved: Path) -> None:
    torch.save({"format": 99}, saved / "meta.pt")
    commit(saved, 5)
    with pytest.raises(CheckpointError, match="has checkpoint format 99, but this disttrain reads up to 3") as caught:
        read_meta(saved)
    assert "newer disttrain" in caught.value.hint


def test_a_tensor_that_is_missing_names_the_nearest(saved: Path) -> None:
    into = {"model": {"layer.wieght": torch.zeros(7, 5)}}
    with pytest.raises(CheckpointError) as caught:
        read_tensors(saved, into)
    for word in (str(saved), "has no tensor model.layer.wieght", "did you mean 'model.layer.weight'?"):
        assert word in str(caught.value), f"the message does not say {word!r}"


def test_a_tensor_of_another_shape_is_refused_before_any_is_read(saved: Path) -> None:
    into = like(state())
    into["model"]["layer.bias"] = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(saved, into)
    assert f"{saved}: model.layer.bias has shape (7,), but the model's has (8,)" in str(caught.value)
    touched = [name for name, tensor in leaves(into).items() if tensor.any()]
    assert not touched, f"{touched} were read all the same"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return io.open, (str(self.path), "w")


def calling(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls something by module and name; the name may hold dots."""

    def text(value: str) -> bytes:
        return b"\x8c" + len(value.encode()).to_bytes(1, "little") + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR."


METADATA = "torch.distributed.checkpoint.metadata"
CALLS = [
    pytest.param("io", "open", id="function"),
    pytest.param("io", "FileIO", id="class"),
    pytest.param(METADATA, "torch.serialization.io.FileIO", id="class-through-a-module"),
    pytest.param(METADATA, "os.open", id="function-through-a-module"),
    pytest.param("torch", "serialization.io.FileIO", id="class-through-torch"),
    pytest.param("pathlib", "io.FileIO", id="class-through-pathlib"),
    pytest.param("torch.distributed.checkpoint.filesystem", "io.FileIO", id="class-through-the-filesystem"),
    pytest.param(METADATA, "field", id="function-of-the-module"),
]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_crafted_index_is_refused_and_does_not_run(saved: Path, tmp_path: Path, module: str, name: str) -> None:
    planted = tmp_path / "planted"
    (saved / ".metadata").write_bytes(calling(module, name, str(planted), "w"))
    commit(saved, 5)
    for read in (read_model, lambda path: read_tensors(path, like(state()))):
        with pytest.raises(CheckpointError, match=r"index of checkpoint .* is not part of a checkpoint"):
            read(saved)
    assert not planted.exists(), "code from the checkpoint has run"


def test_the_planted_pickles_would_run(tmp_path: Path) -> None:
    for number, (module, name) in enumerate([("io", "FileIO"), (METADATA, "torch.serialization.io.FileIO")]):
        planted = tmp_path / f"planted{number}"
        pickle.loads(calling(module, name, str(planted), "w")).close()
        assert planted.exists(), f"{module}.{name} is harmless: the tests above show nothing"


def test_an_index_that_is_another_object_is_refused(saved: Path) -> None:
    for content in (pickle.dumps(["no index"]), pickle.dumps(torch.Size([1])), calling("collections", "OrderedDict")):
        (saved / ".metadata").write_bytes(content)
        commit(saved, 5)
        with pytest.raises(CheckpointError, match=r"index of checkpoint .* is not an index"):
            read_model(saved)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_crafted_meta_file_is_refused_and_does_not_run(saved: Path, tmp_path: Path, zipped: bool) -> None:
    planted = tmp_path / "planted"
    torch.save({"format": 1, "x": Bomb(planted)}, saved / "meta.pt", _use_new_zipfile_serialization=zipped)
    commit(saved, 5)
    with pytest.raises(CheckpointError, match=r"meta\.pt cannot be read without running code"):
        read_meta(saved)
    assert not planted.exists(), "code from the checkpoint has run"


def test_a_bare_pickle_in_place_of_the_meta_file_does_not_run(saved: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (saved / "meta.pt").write_bytes(pickle.dumps(Bomb(planted), protocol=protocol))
        commit(saved, 5)
        with pytest.raises(CheckpointError, match="without running code"):
            read_meta(saved)
    assert not planted.exists(), "code from the checkpoint has run"


def test_tensor_files_are_not_unpickled(saved: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    file = saved / "__0_0.distcp"
    for payload in (pickle.dumps(Bomb(planted)), zipped_bomb(planted)):
        file.write_bytes(payload.ljust(file.stat().st_size, b"\0"))
        commit(saved, 5)
        with pytest.raises(CheckpointError):
            read_model(saved)
        with pytest.raises(CheckpointError):
            read_tensors(saved, like(state()))
    assert not planted.exists(), "code from the checkpoint has run"


def zipped_bomb(planted: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Bomb(planted), stream)
    return stream.getvalue()


@pytest.mark.parametrize("content", [[1], "text", torch.ones(2)])
def test_a_meta_file_that_holds_no_dictionary_is_refused(saved: Path, content: object) -> None:
    torch.save(content, saved / "meta.pt")
    commit(saved, 5)
    with pytest.raises(CheckpointError, match=r"meta\.pt cannot be read"):
        read_meta(saved)


def test_a_state_that_could_only_be_unpickled_is_not_committed(saved: Path, tmp_path: Path) -> None:
    directory, planted = saved.parent, tmp_path / "planted"
    with pytest.raises(CheckpointError, match="would need unpickling") as caught:
        write(directory, "step-6", tensors=state(), meta={"x": Bomb(planted)}, global_step=6)
    assert "state_dict()" in caught.value.hint
    assert not planted.exists()
    assert [c.path for c in committed(directory)[0]] == [saved]
    assert (directory / "LATEST").read_text() == "step-5\n"
    assert save(directory, "step-6", step=6).name == "step-6", "what a failed attempt left is in the way"
    assert [c.global_step for c in committed(directory)[0]] == [5, 6]


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["index", "rename", "commit", "sync"])
def test_a_write_that_fails_leaves_the_earlier_checkpoints(
    saved: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved.parent
    with monkeypatch.context() as patch:
        if step == "index":  # torch renames its index once all tensors are written
            patch.setattr(os, "rename", no_space)
        elif step == "rename":
            rename = os.rename
            patch.setattr(os, "rename", lambda a, b: no_space() if Path(b).name == "step-6" else rename(a, b))
        else:
            patch.setattr(write_module, {"commit": "write_marker", "sync": "sync_directory"}[step], no_space)
        with pytest.raises(CheckpointError) as caught:
            save(directory, "step-6", step=6, seed=1)
    assert "No space left on device" in str(caught.value)
    assert str(directory / "step-6.tmp") in str(caught.value)
    assert committed(directory)[0] == [Committed(saved, 5)]
    assert (directory / "LATEST").read_text() == "step-5\n"
    assert {path.name for path in directory.iterdir()} == {"step-5", "LATEST"}, "what failed takes room on a full disk"
    check_equal({"model": read_model(saved)}, {"model": state()["model"]})
    again = save(directory, "step-6", step=6, seed=1)
    assert again.name == "step-6"
    check_equal({"model": read_model(again)}, {"model": state(1)["model"]})


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path / "checkpoints")


def test_committed_checkpoints_come_oldest_first(tmp_path: Path) -> None:
    times = {"b": (10, 300), "a": (2, 400), "d": (10, 100), "c": (10, 200)}
    for name, (step, time) in times.items():
        os.utime(make_checkpoint(tmp_path, name, step), ns=(time, time))
    make_checkpoint(tmp_path, "e.tmp", 99, marker=False)
    (tmp_path / "LATEST").write_text("b\n")
    found, passed_over = committed(tmp_path)
    assert [(c.path.name, c.global_step) for c in found] == [("a", 2), ("d", 10), ("c", 10), ("b", 10)]
    assert passed_over == [f"checkpoint {tmp_path / 'e.tmp'} was never committed"]


def test_a_folder_that_is_not_there_holds_no_checkpoints(tmp_path: Path) -> None:
    assert committed(tmp_path / "none") == ([], [])
    assert committed(tmp_path) == ([], [])


def test_removing_takes_the_marker_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed in between
        remove(saved)
    assert committed(saved.parent)[0] == []
    assert (saved / "meta.pt").exists()
    remove(saved)
    assert not saved.exists()
    remove(saved)
