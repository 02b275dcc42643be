"""``micro_batch_size: auto``: a run that ran out of memory is the run that began with the smaller size, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disttrain import ParallelConfig
from disttrain.reading import read_run
from tests.support.memory import Run, Shortage, assert_same, make
from tests.support.weights import distance, final_weights

LAYOUTS = [("ddp", "fast"), ("ddp", "tree"), ("fsdp", "fast"), ("fsdp", "tree")]


def config(strategy: str, reduction: str = "fast", **more: Any) -> ParallelConfig:
    return ParallelConfig(strategy=strategy, reduction=reduction, **more)  # type: ignore[arg-type]


def events(run_dir: Path) -> list[str]:
    """What a run has said of memory."""
    return [event["text"] for event in read_run(run_dir)["events"] if event["kind"] == "memory"]


@pytest.mark.parametrize(
    ("strategy", "reduction"), [("ddp", "fast"), pytest.param("fsdp", "tree", marks=pytest.mark.slow)]
)
def test_a_rank_that_runs_out_takes_the_others_down_with_it(tmp_path: Path, strategy: str, reduction: str) -> None:
    """In the middle of a step, and in its very first micro batch, where the order of the blocks is not known yet."""
    parallel = config(strategy, reduction)
    runs = [
        Run("wanted", 4, parallel, steps=3),
        Run("forward", "auto", parallel, Shortage(1, "forward", 4, micro_batch=2), start=8, steps=3),
        Run("backward", "auto", parallel, Shortage(0, "backward", 4), start=8, steps=3),
    ]
    thawed = [
        Run("thawed wanted", 8, parallel, then=4, after=2, steps=3, task={"thaws": True}),
        Run("thawed", "auto", parallel, Shortage(1, "backward", 4, step=2), start=8, steps=3, task={"thaws": True}),
    ]
    make(2, [*runs, *thawed], tmp_path).ok()
    assert_same(tmp_path / "thawed wanted", tmp_path / "thawed")
    for run in runs[1:]:
        assert_same(tmp_path / "wanted", tmp_path / run.name)
        for rank in range(2):  # what was thrown away has left no line
            lines = (tmp_path / run.name / "ledger" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
            assert [len(json.loads(line)["keys"]) for line in lines] == [4] * 8 * run.steps
        record = read_run(tmp_path / run.name)
        assert record["attempts"][0]["micro_batch_size"] == 4
    assert events(tmp_path / "forward") == [
        "step 0: out of memory on rank 1 in the forward pass with micro_batch_size 8; going on with 4"
    ]


def test_an_optimizer_step_that_was_half_done_is_undone(tmp_path: Path) -> None:
    parallel = config("ddp")
    runs = [
        Run("wanted", 16, parallel, then=8, after=1, steps=3),
        Run("first", 8, parallel, steps=3),
        Run("optimizer", "auto", parallel, Shortage(0, "optimizer", 8, step=1), start=16, steps=3),
        Run("new_state", "auto", parallel, Shortage(0, "optimizer", 8), start=16, steps=3),
    ]
    make(2, runs, tmp_path).ok()
    assert_same(tmp_path / "wanted", tmp_path / "optimizer")
    assert_same(tmp_path / "first", tmp_path / "new_state")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_in_the_exchange_of_the_tree(tmp_path: Path, strategy: str) -> None:
    """With partial sums that are sent by themselves; in a later step DDP has several buckets."""
    parallel = config(strategy, "tree", **({"bucket_mib": 1} if strategy == "ddp" else {}))
    how: dict[str, Any] = {"steps": 2, "samples": 48, "task": {"width": 330}}
    runs = [Run("step 0", 4, parallel, **how), Run("step 1", 8, parallel, then=4, after=1, **how)]
    for step, number in ((0, 3), (1, 1), (1, 4)):
        short = Shortage(1, "exchange", 4, place=str(number), step=step)
        runs.append(Run(f"step {step}, allocation {number}", "auto", parallel, short, start=8, **how))
    make(2, runs, tmp_path).ok()
    for run in runs[2:]:
        wanted = run.name.split(",")[0]
        told = f"{wanted}: out of memory on rank 1 in the backward pass with micro_batch_size 8; going on with 4"
        assert events(tmp_path / run.name) == [told], run.name
        assert_same(tmp_path / wanted, tmp_path / run.name)


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("clip", "where the ranks cannot agree on a smaller micro batch: in clipping or in a hook"),
        pytest.param("cast", "after the others had its gradients of a sharded block", marks=pytest.mark.slow),
    ],
)
def test_where_the_others_cannot_be_told_a_rank_ends_and_they_with_it(tmp_path: Path, phase: str, words: str) -> None:
    """In clipping sharded gradients, where they wait in a sum, and behind a reduce-scatter; nobody hangs."""
    run = Run("run", "auto", config("fsdp"), Shortage(1, phase, 0, step=1), start=8, steps=3)
    outcome = make(2, [run], tmp_path)
    assert outcome.codes == [1, 1], outcome.text  # a rank that waits would be killed: -9
    assert f"OutOfStepError: rank 1 ran out of memory {words}" in outcome.text


def test_a_lone_rank_goes_down_twice(tmp_path: Path) -> None:
    """As far as its memory asks, here the CPU's own."""
    parallel = config("ddp")
    runs = [
        Run("wanted", 16, parallel, steps=3),
        Run("twice", "auto", parallel, Shortage(0, "backward", 16, cpu=True), steps=3),
    ]
    outcome = make(1, runs, tmp_path).ok()
    assert_same(tmp_path / "wanted", tmp_path / "twice")
    assert [text.split("with ", 1)[1] for text in events(tmp_path / "twice")] == [
        "micro_batch_size 64; going on with 32",
        "micro_batch_size 32; going on with 16",
    ]
    assert outcome.text.count("out of memory on rank 0 in the backward pass") == 2


@pytest.mark.parametrize("step", [2, 3])
def test_at_the_ends_of_an_epoch(tmp_path: Path, step: int) -> None:
    """Whose last step is the third."""
    parallel = config("ddp")
    runs = [
        Run("wanted", 32, parallel, then=16, after=step),
        Run("late", "auto", parallel, Shortage(0, "forward", 16, step=step), start=32),
    ]
    make(1, runs, tmp_path).ok()
    assert_same(tmp_path / "wanted", tmp_path / "late")


def test_nothing_smaller_is_left(tmp_path: Path) -> None:
    run = Run("run", "auto", config("ddp"), Shortage(1, "forward", 0), start=2, steps=3, task={"plain": True})
    outcome = make(2, [run], tmp_path)
    assert outcome.codes == [1, 1]
    for text in outcome.outputs:
        assert "RankError: step 0: out of memory on rank 1 in the forward pass with micro_batch_size 1" in text
        assert "mend: use parallel.strategy: fsdp and more ranks" in text


def test_an_optimizer_step_that_cannot_be_undone(tmp_path: Path) -> None:
    run = Run("run", "auto", config("ddp"), Shortage(1, "optimizer", 0, step=4), start=8, steps=6)
    outcome = make(2, [run], tmp_path)
    assert outcome.codes == [1, 1]
    for text in outcome.outputs:
        assert "step 4: out of memory on rank 1 in the optimizer step with micro_batch_size 8, which had served" in text
        assert "mend: resume from the last checkpoint" in text


@pytest.mark.slow
def test_a_resumed_run_begins_with_what_was_found(tmp_path: Path) -> None:
    """On other ranks too, where it is the most; and another size may be given."""
    parallel, plain = config("ddp"), {"plain": True}
    make(
        2,
        [
            Run("whole", 8, parallel, task=plain, steps=4),
            Run("found", "auto", parallel, Shortage(0, "forward", 8), start=16, task=plain, steps=2),
        ],
        tmp_path,
    ).ok()
    checkpoint = next((tmp_path / "found" / "checkpoints").glob("step-00000002*"))
    later = [
        Run("moved", "auto", config("fsdp"), task=plain, steps=4, resume=checkpoint),
        Run("given", 32, config("ddp"), task=plain, steps=4, resume=checkpoint),
    ]
    make(1, later, tmp_path).ok()
    assert read_run(tmp_path / "moved")["attempts"][0]["micro_batch_size"] == 8
    for run in later:
        apart = distance(final_weights(tmp_path / "whole"), final_weights(tmp_path / run.name))
        assert apart <= 1e-6, f"{run.name}: weights are {apart:.2e} apart"


# Each takes a minute: one rank where nothing is sharded, four with the sharded tree, which exchanges the most.
WHEREVER = [(*layout, 2) for layout in LAYOUTS] + [("ddp", "fast", 1), ("fsdp", "tree", 1), ("fsdp", "tree", 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "reduction", "ranks"), WHEREVER)
def test_wherever_it_happens(tmp_path: Path, strategy: str, reduction: str, ranks: int) -> None:
    """In any phase and micro batch, before, in and behind the blocks; at once and at a late step."""
    parallel, start = config(strategy, reduction), {1: 16, 2: 8, 4: 4}[ranks]
    half, last = start // 2, ranks - 1
    runs = [Run("early", half, parallel), Run("late", start, parallel, then=half, after=4)]
    places = {"forward": ("stem", "1", "2"), "backward": ("head", "0", "1")}
    for phase, where in places.items():
        for micro_batch, place in zip((0, 1, 3), where, strict=True):
            for step, name in ((0, "early"), (4, "late")):
                short = Shortage(last, phase, half, place=place, step=step, micro_batch=micro_batch)
                runs.append(Run(f"{name}-{phase}-{micro_batch}", "auto", parallel, short, start=start))
    runs.append(Run("early-optimizer", "auto", parallel, Shortage(0, "optimizer", half), start=start))
    runs.append(Run("early-all", "auto", parallel, Shortage(-1, "backward", half), start=start))
    make(ranks, runs, tmp_path, timeout=600).ok()
    for run in runs[2:]:
        assert_same(tmp_path / run.name.split("-")[0], tmp_path / run.name)
        assert len(events(tmp_path / run.name)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("what", "allocations"), [("gather", 16), ("scatter", 8), ("copy", 2)])
def test_in_buffers(tmp_path: Path, what: str, allocations: int) -> None:
    """All that FSDP allocates for the blocks and the root in a step of two micro batches; and the batches."""
    parallel = config("fsdp")
    runs = [Run("wanted", 8, parallel, steps=2)]
    for number in range(1, allocations + 1):
        short = Shortage(1, what, 8, place=str(number))
        runs.append(Run(f"allocation-{number}", "auto", parallel, short, start=16, steps=2))
    make(2, runs, tmp_path, timeout=600).ok()
    for run in runs[1:]:
        assert [text[:7] for text in events(tmp_path / run.name)] == ["step 0:"], f"{run.name} did not fail"
        assert_same(tmp_path / "wanted", tmp_path / run.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("fsdp", {"reshard_after_forward": False}),
        ("fsdp", {"activation_checkpointing": "blocks"}),
        ("fsdp", {"replicate": 2}),
        ("fsdp", {"replicate": 2, "reduction": "tree"}),
        ("fsdp", {"reduce_dtype": "bf16"}),
        ("ddp", {"activation_checkpointing": "blocks"}),
        ("ddp", {"reduce_dtype": "bf16"}),
    ],
    ids=str,
)
def test_in_other_arrangements(tmp_path: Path, strategy: str, more: dict[str, Any]) -> None:
    """Also where the first block gets the data, whose gradients FSDP reduces last."""
    parallel, ranks = config(strategy, **more), 4 if "replicate" in more else 2
    runs = []
    for stem in (True, False):
        task = {"stem": stem}
        runs.append(Run(f"wanted-{stem}", 4, parallel, task=task, steps=3))
        for phase, place in (("forward", "0"), ("forward", "head"), ("backward", "1"), ("backward", "0")):
            short = Shortage(1, phase, 4, place=place)
            runs.append(Run(f"{phase}-{place}-{stem}", "auto", parallel, short, start=8, task=task, steps=3))
    make(ranks, runs, tmp_path, timeout=600).ok()
    for run in runs:
        assert_same(tmp_path / f"wanted-{run.task['stem']}", tmp_path / run.name)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_memory_of_a_device(tmp_path: Path, strategy: str) -> None:
    """Real activations that do not fit, with a loss scale, which a thrown-away step must leave as it was."""
    parallel = config(strategy)
    runs = [Run(name, size, parallel, steps=3, device_mib=640) for name, size in (("found", "auto"), ("wanted", 16))]
    make(1, runs, tmp_path, timeout=300).ok()
    assert read_run(tmp_path / "found")["attempts"][0]["micro_batch_size"] == 16
    assert_same(tmp_path / "wanted", tmp_path / "found")
