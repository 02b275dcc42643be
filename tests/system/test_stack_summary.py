"""Where a process is, told from its stacks; and one report of what all ranks told."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from disttrain.callbacks.watchdog.hang_report import make_report, summarize
from disttrain.checkpoint.format.marker import About
from disttrain.checkpoint.saving.saver import Saver
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig
from disttrain.data.reader.sample_reader import Reader
from disttrain.run.folder import write_run
from disttrain.system.reading import read_run
from disttrain.system.stack_summary import describe, place_of, waiting_for, whereabouts
from tests.support.shards import write_numbered


def place_in(call: Callable[[], object], reached: threading.Event) -> str:
    """The phrase about a thread that is inside a call."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert reached.wait(20)
    return describe(place_of(thread), [])


def test_user_code_is_named_with_its_line_also_in_the_backward_pass() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def mine() -> None:
        reached.set()
        go_on.wait()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            mine()
            return gradients[0]

    for call in (mine, Slow.apply(torch.ones(1, requires_grad=True)).sum().backward):
        reached.clear()
        place = place_in(call, reached)
        assert place.startswith("is in user code system/test_stack_summary.py:"), place
        assert place.endswith("(mine)"), place
    go_on.set()


def test_a_fifo_in_place_of_a_shard_is_named(tmp_path: Path) -> None:
    """Opening it waits for a writer that never comes."""
    index = ShardIndex.open(write_numbered(tmp_path, [5, 5]))
    loader = EvaluationLoader(Reader(index, {"x": Field("x.npy")}), micro_batch_size=10, config=LoaderConfig(threads=0))
    path = Path(index.shards[1].path)
    path.unlink()
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: next(iter(loader)), daemon=True)
    thread.start()
    wanted, place, tick = f"is in the reader, shard {path.name}", "", threading.Event()
    for _ in range(400):
        place = describe(place_of(thread), [])
        if place == wanted:
            break
        tick.wait(0.05)
    assert place == wanted


def test_who_waits_for_a_save_says_where_that_is() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Stuck:
        final, about = Path("step-1"), About(1)

        def run(self, group: object = None) -> None:
            reached.set()
            go_on.wait()

    saver = Saver()
    saver.begin(Stuck(), background=True)
    waiting = threading.Thread(target=saver.wait, daemon=True)
    waiting.start()
    assert reached.wait(20)
    tick = threading.Event()
    while not any(frame.f_code.co_name == "join" for frame in place_of(waiting).stack):
        tick.wait(0.01)
    saving = next(thread for thread in threading.enumerate() if thread.name == "disttrain-save")
    place = describe(place_of(waiting), [], [place_of(saving)])
    assert place.startswith("waits for a save or a copy, which is in user code system/test_stack_summary.py:"), place
    assert describe(place_of(waiting), []) == "waits for a save or a copy"
    go_on.set()
    waiting.join(20)


def test_a_wait_that_is_marked_is_named_while_it_lasts() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        with waiting_for("the outer one"):
            with waiting_for("the vote on stopping"):
                reached.set()
                go_on.wait()
            go_on.clear()
            reached.set()
            go_on.wait()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    for name in ("the vote on stopping", "the outer one"):
        assert reached.wait(20)
        assert describe(place_of(thread), []) == f"waits for the other ranks in {name}"
        reached.clear()
        go_on.set()
    thread.join(20)
    assert describe(place_of(thread), []) == "has no Python frame"


def test_a_process_tells_the_stacks_of_its_other_threads() -> None:
    told: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: told.append(whereabouts()), name="watcher")
    thread.start()
    thread.join()
    assert "thread MainThread" in told[0][1]
    assert "test_stack_summary.py" in told[0][1]
    assert "thread watcher" not in told[0][1]


def told(rank: int, place: str, host: str = "a") -> dict[str, object]:
    return {
        **{
            "rank": rank,
            "host": host,
            "pid": 7,
            "step": 12,
            "doing": "micro batch",
            "quiet_seconds": 4.0,
            "place": place,
        },
        **{"collectives": [], "stacks": f"stack of rank {rank}"},
    }


REDUCES = "is in the backward pass, where gradients are reduced"


def test_who_does_not_wait_for_others_is_named_first() -> None:
    ranks = {rank: told(rank, REDUCES) for rank in (0, 1, 2, 5)} | {3: told(3, "is in the reader, shard t.tar")}
    assert summarize(ranks, 7) == (
        "rank 3 is in the reader, shard t.tar; ranks 4, 6 told nothing: dead, stopped, or in code that holds Python's"
        f" lock (then see standard error); ranks 0-2, 5 {REDUCES}"
    )
    nodes = {rank: told(rank, REDUCES, host="ab"[rank // 2]) for rank in range(4)}
    nodes[3]["place"] = "is in user code m.py:3 (f)"
    assert summarize(nodes, 4) == f"rank 3 on b is in user code m.py:3 (f); ranks 0-2 on a, b {REDUCES}"


def test_the_report_holds_the_stacks_and_is_noted_in_the_record(tmp_path: Path) -> None:
    write_run(tmp_path, {"attempts": [{"started": 1.0}], "events": []})
    folder = tmp_path / "hangs" / "x"
    folder.mkdir(parents=True)
    for rank in (0, 1):
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(told(rank, REDUCES)))
    head = make_report(tmp_path, folder, 2, 90.0)
    text = (folder / "report.txt").read_text()
    assert text.startswith(head)
    assert "no step or batch for 90 s" in head
    assert "stack of rank 0" in text
    assert "stack of rank 1" in text
    assert [event["kind"] for event in read_run(tmp_path)["events"]] == ["hang"]
    assert read_run(tmp_path)["attempts"][0]["stop_reason"] == "hung"


def test_a_slurm_job_goes_on_after_a_hang_where_it_came_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, {"attempts": [{"started": 1.0}], "events": []})
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "DISTTRAIN_REQUEUE": "50"}.items():
        monkeypatch.setenv(name, value)
    said, notes = [], []
    for number, step in enumerate((0, 12, 12, 13)):
        folder = tmp_path / "hangs" / str(number)
        folder.mkdir(parents=True)
        (folder / "rank-00000.json").write_text(json.dumps(told(0, REDUCES) | {"step": step}))
        said.append(make_report(tmp_path, folder, 1, 90.0).rpartition("; ")[2])
        notes.append((tmp_path / "requeue").exists() and (tmp_path / "requeue").read_text())
        (tmp_path / "requeue").unlink(missing_ok=True)
    goes_on = "the script of job 7 will requeue it"
    stays = "job 7 is not requeued: the run has come no further than when it hung before"
    assert said == [goes_on, goes_on, stays, goes_on]
    assert notes == ["7 2\n", "7 2\n", False, "7 2\n"]
