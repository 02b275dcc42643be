"""Checksums: made while writing, compared at a resume by all ranks; formats of earlier times are still read."""

from __future__ import annotations

import json
import math
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from disttrain.checkpoint.format import verification
from disttrain.checkpoint.format.checksum import Sums, sum_of
from disttrain.checkpoint.format.marker import FORMAT, MARKER, About, Metric, check, committed, faults, write_marker
from disttrain.checkpoint.format.reader import groups, leaves, read_group, read_meta, read_model, read_tensors
from disttrain.checkpoint.format.writer import write
from disttrain.errors import CheckpointError
from disttrain.run.folder import find_start
from disttrain.system.files import open_directory
from tests.checkpoint.make_format import META, tensors
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FORMATS = Path(__file__).parents[1] / "formats"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write(tmp_path / "run" / "checkpoints", "step-00000005", tensors=tensors(), meta=META, global_step=5)


def flip(file: Path, place: int, bit: int = 1) -> None:
    """Change one bit of a file; size and time of change stay."""
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


@pytest.mark.parametrize("number", sorted(int(path.name) for path in FORMATS.iterdir()))
def test_a_checkpoint_of_every_format_since_the_first_is_loaded(number: int) -> None:
    path = FORMATS / str(number) / "step-00000005"
    found = check(path)
    assert (found.format, found.global_step) == (number, 5)
    assert verification.faults(path) == []
    assert committed(path.parent) == ([found], [])
    into = {name: {key: _zeros(value) for key, value in group.items()} for name, group in tensors().items()}
    read_tensors(path, into)
    for (name, there), (_, due) in zip(leaves(into), leaves(tensors()), strict=True):
        assert torch.equal(there, due), f"{name} of format {number} is {there}, was {due}"
    assert read_meta(path) == {"format": number, **META}
    assert groups(path) == ["model", "optimizer0"]
    assert read_model(path).keys() == tensors()["model"].keys()
    assert read_group(path, "optimizer0").keys() == {"layer.weight.exp_avg", "layer.weight.step"}


def _zeros(value: object) -> object:
    return {k: _zeros(v) for k, v in value.items()} if isinstance(value, dict) else torch.zeros_like(value)  # type: ignore[call-overload]


def test_the_present_format_is_among_the_kept_ones() -> None:
    assert (FORMATS / str(FORMAT)).is_dir(), "run `python -m tests.checkpoint.make_format`"


def test_what_goes_through_a_summed_file_has_the_sum_of_the_file(tmp_path: Path) -> None:
    chance, sums = random.Random(1), Sums()
    for number, sizes in enumerate([[], [0], [1], [5 << 20], [3, 100_000, 7, 1 << 20]]):
        with sums.summed(tmp_path / f"{number}") as file:
            for size in sizes:
                file.write(chance.randbytes(size))
        assert sums.files[f"{number}"] == sum_of(tmp_path / f"{number}")
        assert sums.files[f"{number}"].num_bytes == sum(sizes)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "meta.pt"])
def test_a_flipped_bit_is_found_wherever_it_is(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    assert verification.faults(saved) == []
    for place in (0, len(whole) // 2, len(whole) - 1, *random.Random(2).sample(range(len(whole)), 20)):
        flip(saved / name, place, 1 << place % 8)
        check(saved)  # the sizes are right
        (fault,) = verification.faults(saved)
        assert f"{saved} is damaged: {name} ({len(whole):,} bytes) has checksum" in fault
        (saved / name).write_bytes(whole)
    assert verification.faults(saved) == []


def test_a_flipped_bit_of_the_marker_makes_it_none(saved: Path) -> None:
    whole = (saved / "COMMITTED").read_bytes()
    for place in range(len(whole)):
        flip(saved / "COMMITTED", place, 1 << place % 7)
        with pytest.raises(CheckpointError, match=r"has a damaged COMMITTED|checkpoint format"):
            check(saved)
        (saved / "COMMITTED").write_bytes(whole)


def test_a_marker_says_whose_state_it_is(tmp_path: Path) -> None:
    about = About(7, 3, run="abc", attempt=2, metric=Metric("val/loss", 0.25, "min"), time=12.5)
    with open_directory(tmp_path) as opened:
        write_marker(opened, about, {})
    assert check(tmp_path).about == about


def damaged_run(folder: Path) -> tuple[Path, list[Path]]:
    """A run of three checkpoints; of the newest a bit has flipped, the second is cut, the oldest is sound."""
    paths = [
        write(folder / "run" / "checkpoints", f"step-{step:08d}", tensors=tensors(), meta=META, global_step=step)
        for step in (1, 2, 3)
    ]
    (paths[1] / "meta.pt").write_bytes((paths[1] / "meta.pt").read_bytes()[:-1])
    flip(paths[2] / "__0_0.distcp", 3000)
    return folder / "run", paths


def start_on_every_rank(run_dir: str) -> None:
    torch.distributed.init_process_group("gloo")
    start = find_start(Path(run_dir), "auto")
    print("start", start.checkpoint, *start.notes, sep="\n")
    try:
        find_start(Path(run_dir), f"{run_dir}/checkpoints/step-00000003")
    except CheckpointError as error:
        print("refused", error)
    except Exception as error:
        print("refused too", error)


def test_all_ranks_pass_over_what_is_damaged_and_say_why(tmp_path: Path) -> None:
    run_dir, paths = damaged_run(tmp_path)
    outcome = run_ranks(3, start_on_every_rank, str(run_dir), folder=tmp_path / "logs").ok()
    for output in outcome.outputs:
        _, checkpoint, *notes = output.splitlines()
        assert checkpoint == str(paths[0])
        assert f"skipped: checkpoint {paths[1]} is torn: meta.pt has" in notes[0]
        assert f"skipped: checkpoint {paths[2]} is damaged: " in notes[1]
        assert notes[2] == f"resuming from {paths[0]}"
        assert "refused" in output
        assert "is damaged: __0_0.distcp (" in notes[3], "a named checkpoint was taken although it is damaged"


def test_sizes_alone_are_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    run_dir, paths = damaged_run(tmp_path)
    assert find_start(run_dir, "auto", checksums=False).checkpoint == paths[2]
    assert find_start(run_dir, "auto").checkpoint == paths[2], "trusted once, it is not read again by this process"


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew_and_says_so(tmp_path: Path) -> None:
    run_dir, paths = damaged_run(tmp_path)
    shutil.rmtree(paths[0])
    start = find_start(run_dir, "auto")
    assert start.checkpoint is None
    assert ["is damaged" in note or "is torn" in note for note in start.notes] == [True, True]


def test_a_checkpoint_is_not_loaded_from_when_it_is_damaged(saved: Path) -> None:
    flip(saved / "__0_0.distcp", 2000)
    with pytest.raises(CheckpointError, match="is damaged"):
        verification.ensure(saved)
    flip(saved / "__0_0.distcp", 2000)
    verification.ensure(saved)


@pytest.mark.parametrize("name", ["/etc/hostname", "../ATTEMPT", "..", "a/b", ""])
@pytest.mark.parametrize("number", [1, 2])
def test_a_marker_has_no_file_outside_its_directory_read(saved: Path, number: int, name: str) -> None:
    """Even one with a right checksum of its own."""
    content = json.loads((saved / MARKER).read_text())
    content.pop("crc32")
    content |= {"format": number, "files": {name: 4 if number == 1 else [4, "00000000"]}}
    text = json.dumps({**content, "crc32": f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"})
    (saved / MARKER).write_text(text)
    with pytest.raises(CheckpointError, match="has a damaged COMMITTED"):
        faults(saved)


def test_a_metric_that_is_not_finite_is_kept_by_a_marker_that_others_can_parse(tmp_path: Path) -> None:
    for value in (math.inf, -math.inf, math.nan):
        path = tmp_path / f"{value}"
        path.mkdir()
        with open_directory(path) as opened:
            write_marker(opened, About(3, 0, metric=Metric("val/loss", value, "min")), {})
        json.loads((path / MARKER).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        read = check(path).about.metric
        assert read is not None
        assert repr(read.value) == repr(value)
