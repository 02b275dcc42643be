"""Saving in the background: the state of its step, one outcome at one step boundary for all ranks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from disttrain.checkpoint.format import checksum
from disttrain.checkpoint.format.fence import claim
from disttrain.checkpoint.format.marker import About, committed
from disttrain.checkpoint.format.reader import leaves, read_meta, read_model, remove
from disttrain.checkpoint.saving import staging
from disttrain.checkpoint.saving.saver import Outcome, Saver, SaveRequest
from disttrain.errors import CheckpointError, RankError
from tests.support.faults import can_mount, mount_small_disk
from tests.support.ranks import run_ranks

SIZES = {"a": (300, 70), "b": (70,), "c": (), "d": (4096,), "e": (11, 13)}


def tensors(step: float) -> dict[str, Any]:
    """A model and an optimizer that say which step they are of."""
    model = {name: torch.full(size, step) for name, size in SIZES.items()}
    return {"model": model, "optimizer0": {name: {"exp_avg": value + 0.5} for name, value in model.items()}}


def join_ranks() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def begin(saver: Saver, directory: Path, step: int, state: dict[str, Any], *, background: bool = True) -> None:
    meta = {"progress": {"step": step}, "trainer": {}}
    request = SaveRequest(saver, background=background)
    request.begin(directory / f"step-{step:08d}", tensors=state, meta=meta, about=About(step))


def told_at_which_boundary(directory: str) -> None:
    """Ranks of quite different speed; each prints when it heard of which save, and how it ended."""
    join_ranks()
    rank, chance, saver = dist.get_rank(), random.Random(dist.get_rank()), Saver()
    failing: list[bool] = []

    def write(self: checksum.SummedFile, data: Any, /) -> int:
        if failing and rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return known(self, data)

    known = checksum.SummedFile.write
    checksum.SummedFile.write = write  # type: ignore[method-assign]
    log: list[str] = []

    def hear(boundary: int, outcome: Outcome | None) -> None:
        if outcome is not None:
            kind = type(outcome.error).__name__ if outcome.error else "committed"
            log.append(f"{boundary}: {outcome.global_step} {'failed' if outcome.error else kind} {outcome.fatal}")
            if outcome.error is not None:
                assert "No space left on device" in str(outcome.error), outcome.error

    load = torch.ones(64, 64)
    for boundary in range(1500):
        for _ in range(chance.randrange(8) * (1 + 3 * rank)):
            load = load @ load / 64
        hear(boundary, saver.poll())
        if boundary % 250 == 0:
            hear(boundary, saver.wait())
            failing[:] = [True] if boundary in (500, 1000) else []
            begin(saver, Path(directory), boundary, tensors(boundary))
    hear(1500, saver.wait())
    print("\n".join(log))


def test_all_ranks_hear_of_a_save_at_the_same_boundary(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    outcome = run_ranks(3, told_at_which_boundary, str(directory), folder=tmp_path / "logs").ok()
    first, *others = outcome.outputs
    assert others == [first] * 2, f"ranks heard different things\n{outcome.text}"
    lines = first.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        f"{step} {'failed' if step in (500, 1000) else 'committed'} False" for step in range(0, 1500, 250)
    ]
    found, passed_over = committed(directory)
    assert [entry.global_step for entry in found] == [0, 250, 750, 1250]
    assert passed_over == [], "what a failed save wrote was left"
    for entry in found:
        model = read_one(entry.path)
        assert all(bool((value == entry.global_step).all()) for value in model.values())


def prune_slowly(directory: str) -> None:
    """Rank 0 deletes older checkpoints for as long as the ranks train on; none of them waits for it."""
    join_ranks()
    saver, deleting, over = Saver(), Gate(), Gate()

    def prune() -> None:
        deleting.open()
        over.wait()
        print("pruned", flush=True)

    request = SaveRequest(saver, background=True, done=prune if dist.get_rank() == 0 else None)
    request.begin(Path(directory) / "step-00000001", tensors=tensors(1.0), meta={}, about=About(1))
    outcome = None
    while outcome is None:  # each a step, with a collective of training's
        outcome = saver.poll()
        dist.barrier()
    assert outcome.error is None, outcome.error
    assert not saver.busy
    print("told", flush=True)
    if dist.get_rank() == 0:
        deleting.wait()
    over.open()
    assert saver.wait() is None
    begin(saver, Path(directory), 2, tensors(2.0), background=False)
    print("saved", flush=True)


def test_no_rank_waits_for_the_deletion_of_older_checkpoints(tmp_path: Path) -> None:
    outcome = run_ranks(2, prune_slowly, str(tmp_path / "checkpoints"), folder=tmp_path / "logs").ok()
    assert outcome.outputs == ["told\npruned\nsaved\n", "told\nsaved\n"]


def read_one(path: Path) -> dict[str, torch.Tensor]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return read_model(path)


def save_and_go_on(directory: str) -> None:
    """The state changes while it is being written: tensors in place, and what callbacks gave."""
    join_ranks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(40.0).reshape(10, 4)
    state = tensors(7.0)
    state["model"] |= {
        "sharded": distribute_tensor(whole.clone(), mesh, [Shard(0)]),
        "copied": distribute_tensor(whole.clone(), mesh, [Replicate()]),
    }
    held = [1, 2, 3]
    entered, leave = Gate(), Gate()
    known = checksum.Sums.summed

    @contextmanager
    def slow(self: checksum.Sums, *arguments: Any, **more: Any) -> Iterator[Any]:
        entered.open()
        leave.wait()
        with known(self, *arguments, **more) as file:
            yield file

    checksum.Sums.summed = slow  # type: ignore[method-assign]
    saver = Saver()
    for step in (1, 2):  # the second time the buffers are used again
        entered.close()
        leave.close()
        held[:] = [step] * 3
        for _, value in leaves(state):
            value.fill_(step)
        request = SaveRequest(saver, background=True)
        final, meta = Path(directory) / f"step-{step:08d}", {"trainer": {"held": held}}
        request.begin(final, tensors=state, meta=meta, about=About(step))
        entered.wait()
        held[:] = [99]
        for _, value in leaves(state):
            value.fill_(99.0)
        leave.open()
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.error is None, outcome.error


class Gate:
    """Opened by one thread, waited for by another."""

    def __init__(self) -> None:
        import threading

        self._event = threading.Event()
        self.open, self.close = self._event.set, self._event.clear

    def wait(self) -> None:
        """Until it is open."""
        assert self._event.wait(30), "the writing thread never came here"


def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path) -> None:
    run_ranks(2, save_and_go_on, str(tmp_path / "checkpoints"), folder=tmp_path / "logs").ok()
    found, _ = committed(tmp_path / "checkpoints")
    assert [entry.global_step for entry in found] == [1, 2]
    for entry in found:
        model = read_one(entry.path)
        assert model.keys() == {*SIZES, "sharded", "copied"}
        wrong = [name for name, value in model.items() if not bool((value == entry.global_step).all())]
        assert not wrong, f"{wrong} of step {entry.global_step} were changed by the steps that followed"
        assert read_meta(entry.path)["trainer"]["held"] == [entry.global_step] * 3


def print_own_part() -> None:
    join_ranks()
    state = tensors(1.0)
    own = staging.own_part(state)
    copies = staging.Stage().copy(own)
    assert [name for name, _ in leaves(own)] == [name for name, _ in leaves(copies)]
    assert not any(a.data_ptr() == b.data_ptr() for (_, a), (_, b) in zip(leaves(own), leaves(copies), strict=True))
    print(*sorted(name for name, _ in leaves(own)))
    print(sum(tensor.nbytes for _, tensor in leaves(own)))


def test_what_all_ranks_hold_is_copied_and_written_by_one_of_them(tmp_path: Path) -> None:
    outcome = run_ranks(3, print_own_part, folder=tmp_path / "logs").ok()
    names, sizes = zip(*(output.splitlines() for output in outcome.outputs), strict=True)
    parts = [part.split() for part in names]
    assert sorted(name for part in parts for name in part) == sorted(name for name, _ in leaves(tensors(1.0)))
    largest = 300 * 70 * 4
    assert max(map(int, sizes)) <= largest, f"bytes of the ranks: {sizes}"


def overtaken(directory: str) -> None:
    join_ranks()
    path, attempt = Path(directory), None
    if dist.get_rank() == 0:
        attempt = claim(path)
        claim(path)
    saver = Saver()
    request = SaveRequest(saver, background=True, attempt=attempt)
    request.begin(path / "step-00000001", tensors=tensors(1.0), meta={}, about=About(1))
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.fatal, "a run that was fenced off goes on"
    print(type(outcome.error).__name__)


def test_being_fenced_off_is_fatal_on_all_ranks(tmp_path: Path) -> None:
    outcome = run_ranks(2, overtaken, str(tmp_path / "checkpoints"), folder=tmp_path / "logs").ok()
    assert outcome.outputs == ["FencedError\n", "RankError\n"]


def onto_a_small_disk(directory: str) -> None:
    """Save until the disk of 32 KiB is full, free it, and save again."""
    mount_small_disk(directory)
    saver, path = Saver(), Path(directory)
    begin(saver, path, 1, {"model": {"w": torch.ones(1000)}})
    first = saver.wait()
    assert first is not None
    assert first.error is None, first.error
    from disttrain.checkpoint.format import writer

    known = writer._check_space
    for step, checked in ((2, True), (3, False)):  # seen before it is written, or while it is
        writer._check_space = known if checked else lambda directory, num_bytes: None
        begin(saver, path, step, {"model": {"w": torch.ones(7000)}})
        outcome = saver.wait()
        assert outcome is not None
        print(outcome.error)
        assert isinstance(outcome.error, CheckpointError)
        assert not outcome.fatal
    assert [entry.global_step for entry in committed(path)[0]] == [1]
    assert sorted(entry.name for entry in path.iterdir()) == ["LATEST", "step-00000001"]
    remove(path / "step-00000001")
    begin(saver, path, 4, {"model": {"w": torch.ones(1000)}})
    last = saver.wait()
    assert last is not None
    assert last.error is None, last.error


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")
def test_a_full_disk_is_one_error_and_the_next_save_finds_its_space_again(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    outcome = run_ranks(1, onto_a_small_disk, str(tmp_path / "disk"), folder=tmp_path / "logs").ok()
    before, written = outcome.outputs[0].split("cannot write")[1:]
    assert "it needs about" in before
    assert "are free" in before
    assert "No space left on device" in written, written


def lose_a_peer(directory: str) -> None:
    join_ranks()
    saver = Saver()
    begin(saver, Path(directory), 1, tensors(1.0))
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.error is None
    if dist.get_rank() == 1:
        known = checksum.SummedFile.write
        checksum.SummedFile.write = lambda self, data, /: os._exit(9) or known(self, data)  # type: ignore
    begin(saver, Path(directory), 2, tensors(2.0))
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.fatal
    assert not isinstance(outcome.error, RankError | None), outcome.error
    print("told")


def test_a_peer_that_dies_in_a_save_is_an_error_of_the_others(tmp_path: Path) -> None:
    outcome = run_ranks(2, lose_a_peer, str(tmp_path / "checkpoints"), folder=tmp_path / "logs")
    assert outcome.codes == [0, 9], outcome.text
    assert outcome.outputs[0].endswith("told\n")
    assert [entry.global_step for entry in committed(tmp_path / "checkpoints")[0]] == [1]


@pytest.mark.gpu
def test_a_copy_of_what_is_on_a_gpu_is_pinned_and_complete() -> None:
    stage = staging.Stage()
    state = {"model": {name: torch.full((1 << 20,), float(step), device="cuda") for step, name in enumerate("abc")}}
    copies = stage.copy(state)
    for _, value in leaves(state):
        value.fill_(99.0)
    for step, (_, copy) in enumerate(leaves(copies)):
        assert copy.is_pinned()
        assert bool((copy == step).all()), "the copy was not complete when training went on"
    assert [copy.data_ptr() for _, copy in leaves(stage.copy(state))] == [copy.data_ptr() for _, copy in leaves(copies)]
