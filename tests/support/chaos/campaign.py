"""A campaign: one run, brought down attempt after attempt by a schedule, checked after each of them and at its end.

Ranks are real processes. Nothing waits for a while and hopes: a fault happens where its place in the code is reached,
and the campaign goes on when the ranks have ended. Each attempt is printed with the seed; the same seed gives the same
schedule, and but for how far a save in the background has come meanwhile, the same course.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from disttrain.checkpoint.format.marker import ABANDONED, LATEST, MARKER
from tests.support.chaos import checks, disk
from tests.support.chaos.plan import EVERY, FAILING, STEPS, Attempt, Between, Fault, Layout
from tests.support.chaos.trap import RUN_DIR, SCHEDULE
from tests.support.ranks import Outcome, Ranks

KEEP_LAST, KEEP_BEST = 3, 1
TREE = ("--trainer.parallel.reduction", "tree")
HANG_SECONDS = 10
_KILLED, _ERROR, _PREEMPTED, _HUNG = -9, 2, 75, 76


@dataclass(frozen=True)
class Row:
    """What became of an attempt.

    Attributes:
        layout: what it ran on.
        fault: in words.
        at: the step of the fault, or of its save; None before the first step, and between attempts.
        kill: whether a process was killed.
        in_save: whether that was during a save.
        resumed_at: where the next attempt went on; None until it is known, 0 from the start.
        survived: whether this attempt went on all the same.
    """

    layout: Layout
    fault: str
    at: int | None
    kill: bool = False
    in_save: bool = False
    resumed_at: int | None = None
    survived: bool = False


@dataclass
class Campaign:
    """A run under a schedule.

    Attributes:
        folder: for everything that it writes; new.
        data: shards of the digits; they are copied.
        seed: for what is drawn on the way.
        attempts: the schedule.
        whole: the folder of a run that nothing brings down, to compare with.
        more: arguments of the run.
        small_disk: give the checkpoints a disk of their own.
    """

    folder: Path
    data: Path
    seed: int
    attempts: Sequence[Attempt]
    whole: Path
    more: Sequence[str] = ()
    small_disk: bool = False
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run_dir, self.own_data, self.control = (self.folder / name for name in ("run", "data", "control"))
        self.chance = random.Random(self.seed)
        self.sessions: list[int] = []
        self.harmed: list[tuple[Path, int]] = []
        self.mark = secrets.token_hex(8)
        self.notes: list[str] = []
        self.number = self.unpruned = 0

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def damaged(self) -> list[str]:
        """Names of the damaged checkpoints that are still there; a sound one may have taken a name over."""
        return [path.parent.name for path, time_ns in self.harmed if path.exists() and _changed(path) == time_ns]

    def run(self) -> list[Row]:
        """All attempts; raises an AssertionError that names the seed and the attempt where something does not hold."""
        print(f"seed {self.seed}: {len(self.attempts)} attempts", flush=True)
        shutil.copytree(self.data, self.own_data)
        left: list[Ranks] = []
        with ExitStack() as stack:
            if self.small_disk:
                stack.enter_context(disk.small_disk(self.checkpoints))
            stack.callback(_kill, left)
            for number, attempt in enumerate(self.attempts):
                self.number = number
                try:
                    self._attempt(attempt, left)
                except AssertionError as error:
                    raise AssertionError(f"seed {self.seed}, attempt {self.number} on {attempt}: {error}") from None
            self._check_end()
        return self.rows

    def _attempt(self, attempt: Attempt, left: list[Ranks]) -> None:
        self.notes += [self._between(what, attempt.layout) for what in attempt.between]
        expected = checks.sound(self.checkpoints, self.damaged)
        woken = list(left)
        ranks = start(attempt.layout, self._arguments(attempt), attempt.faults, folder=self._folder(), mark=self.mark)
        self.sessions += [process.pid for process in ranks.processes if process.pid]
        if attempt.faults and attempt.faults[-1].act == "leave":
            self._until_stopped(ranks)
            left.append(ranks)
            text = "".join(log.read_text() for log in ranks.logs)
        else:
            # A rank that hangs is the launcher's to kill; all others end by themselves, and soon.
            hangs = any(fault.act == "hang" for fault in attempt.faults)
            outcome = ranks.wait(150, grace=10 if hangs else 40)
            text = outcome.text
            self._check_codes(attempt, outcome)
        self._note(attempt, text, expected)
        self.unpruned += any(fault.place in ("latest", "pruning", "pruned") for fault in attempt.faults)
        if "resuming from" in text:  # it came as far as that
            missing = [note for note in self.notes if note not in text]
            assert not missing, f"it does not say {missing}\n{text}"
            self.notes.clear()
        self._check_resumed(text, expected)
        disk.make_sound(self.checkpoints)
        for ranks in woken:
            self._wake(ranks)
            left.remove(ranks)
        self._check_folder()

    def _note(self, attempt: Attempt, text: str, expected: list[str]) -> None:
        resumed = int(expected[-1][5:13]) if expected else 0
        # Whatever came before this attempt, it goes on from here.
        self.rows[:] = [
            Row(**{**vars(row), "resumed_at": resumed}) if row.resumed_at is None else row for row in self.rows
        ]
        for number, fault in enumerate(attempt.faults):
            marks = sorted(self._spent().glob(f"{number}-*"))
            assert marks, f"{fault} did not happen\n{text}"
            step = json.loads(marks[0].read_text())["step"]
            self.rows.append(fault_row(attempt.layout, fault, step))
            where = f"at step {step}" if step >= 0 else "before the first step"
            print(f"  {self.number:3d}  {attempt.layout}  from {resumed:2d}: {fault} {where}", flush=True)

    def _folder(self) -> Path:
        return self.control / f"{self.number:03d}"

    def _spent(self) -> Path:
        return self._folder() / "spent"

    def _arguments(self, attempt: Attempt) -> list[str]:
        more = list(self.more)
        acts = {fault.act for fault in attempt.faults}
        if "hang" in acts:
            more += ["--trainer.hang_timeout", f"{HANG_SECONDS}s"]
        if any(fault.survives and fault.act in ("eio", "full") for fault in attempt.faults):
            more += ["--checkpoint.on_save_error", "continue"]
        return fit_arguments(self.run_dir, self.own_data, attempt.layout, more)

    def _between(self, what: Between, layout: Layout) -> str:
        """Do something between two attempts; returns what the next one has to say."""
        if what == "shard":
            self._without_a_shard(layout)
            return ""
        there = checks.sound(self.checkpoints, self.damaged)
        if len(there) < 2:  # then the run would lose all it has, and rightly so
            return ""
        path = self.checkpoints / there[-1]
        files = sorted(path.glob("*.distcp")) if what != "marker" else [path / MARKER]
        file = self.chance.choice(files)
        if what == "truncate":
            disk.truncate(file)
        else:
            disk.flip(file, self.chance.randrange(8 * file.stat().st_size))
        self.harmed.append((file, _changed(file)))
        self.rows.append(Row(layout, "flip, marker" if what == "marker" else f"{what}, tensors", None))
        print(f"  {self.number:3d}  {layout}  before: {what} {path.name}/{file.name}", flush=True)
        return f"skipped: checkpoint {path} "

    def _without_a_shard(self, layout: Layout) -> None:
        """A shard is gone: one clear error, and nothing has changed once it is back."""
        shard = self.chance.choice(sorted(self.own_data.glob("train*.tar")))
        aside = shard.with_suffix(".aside")
        shard.rename(aside)
        before = checks.sound(self.checkpoints)
        folder = self.control / f"{self.number:03d}-shard"
        outcome = start(layout, fit_arguments(self.run_dir, self.own_data, layout, self.more), folder=folder).wait(60)
        aside.rename(shard)
        assert set(outcome.codes) == {_ERROR}, f"without {shard.name}: {outcome.codes}\n{outcome.text}"
        assert shard.name in outcome.text, f"it does not name {shard.name}\n{outcome.text}"
        assert "Traceback" not in outcome.text, outcome.text
        assert checks.sound(self.checkpoints) == before
        self.rows.append(Row(layout, "delete, shard", None))
        print(f"  {self.number:3d}  {layout}  before: without {shard.name}", flush=True)

    def _check_codes(self, attempt: Attempt, outcome: Outcome) -> None:
        codes, fault = outcome.codes, attempt.faults[-1] if attempt.faults else None
        told = f"exit codes {codes} after {fault}\n{outcome.text}"
        assert "Traceback" not in outcome.text, told
        if fault is None:
            assert set(codes) == {0}, told
        elif fault.act == "terminate":
            assert set(codes) == {_PREEMPTED}, told
        elif fault.act in FAILING:
            assert set(codes) == {_ERROR}, told
            assert "cannot write" in outcome.text, told
        elif fault.act == "hang":
            assert codes[fault.rank] == _KILLED, told
            others = {code for rank, code in enumerate(codes) if rank != fault.rank}
            assert {_HUNG} <= others <= {_HUNG, _ERROR}, told  # the first that ends is a lost peer to the next
        else:
            # The others lose their peer, which is an error. After the last step they may have come to their end.
            others = {code for rank, code in enumerate(codes) if rank != fault.rank}
            may = {"kill-all": {_KILLED}}.get(fault.act, {0} if fault.place == "ending" else set())
            assert _KILLED in codes if fault.act == "kill-all" else codes[fault.rank] == _KILLED, told
            assert others <= {_ERROR, *may}, told

    def _check_resumed(self, text: str, expected: list[str]) -> None:
        """It went on from the newest sound checkpoint, if it came so far as to say."""
        said = re.findall(r"resuming from \S*/(\S+)", text)
        if said:
            assert said[0] == expected[-1], f"it resumed from {said[0]}, the newest was {expected}"

    def _check_folder(self) -> None:
        """Nothing that was committed is lost, and nothing piles up, whatever has just happened."""
        there = checks.sound(self.checkpoints, self.damaged)
        names = {path.name for path in self.checkpoints.iterdir() if path.is_dir()} - set(self.damaged)
        aside = {name for name in names if ABANDONED in name}
        assert len(aside) <= len(self.harmed), f"more is set aside than was damaged: {sorted(aside)}"
        # The newest and two for a guard, with what was the best at each; the best now; one for each attempt that ended
        # between a commit and its pruning; one being written or removed.
        most = 2 * (KEEP_LAST + 2) + KEEP_BEST + 1 + self.unpruned
        assert len(there) <= most, f"checkpoints pile up: {there}"
        assert len(names - aside) <= most + 2, f"checkpoints pile up: {sorted(names)}"

    def _until_stopped(self, ranks: Ranks) -> None:
        process = psutil.Process(ranks.processes[0].pid)
        deadline = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, "rank 0 was not stopped\n" + ranks.logs[0].read_text()
            time.sleep(0.02)
        assert process.is_running(), "rank 0 has ended\n" + ranks.logs[0].read_text()

    def _wake(self, ranks: Ranks) -> None:
        """A process that was stopped while others took its run over publishes nothing, and ends."""
        before, latest = checks.sound(self.checkpoints), self._latest()
        os.kill(ranks.processes[0].pid or 0, signal.SIGCONT)
        outcome = ranks.wait(60, grace=40)
        assert set(outcome.codes) <= {_ERROR}, f"woken, it ended with {outcome.codes}\n{outcome.text}"
        assert "it will not publish anything" in outcome.text, outcome.text
        assert "Traceback" not in outcome.text, outcome.text
        # What it was about to prune was superfluous already, and may go.
        after = checks.sound(self.checkpoints)
        assert set(after) <= set(before), f"an old process has published {set(after) - set(before)}"
        assert after[-KEEP_LAST:] == before[-KEEP_LAST:], f"an old process has removed {set(before) - set(after)}"
        assert self._latest() == latest, "an old process has turned LATEST back"

    def _latest(self) -> str:
        path = self.checkpoints / LATEST
        return path.read_text() if path.exists() else ""

    def _check_end(self) -> None:
        try:
            checks.assert_same(self.whole, self.run_dir)
            checks.assert_end(self.run_dir, self.damaged, KEEP_LAST, KEEP_BEST)
            left = checks.wait_until_gone(self.sessions, self.mark)
            assert not left, f"left running: {left}"
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}, at the end: {error}") from None


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def fault_row(layout: Layout, fault: Fault, step: int) -> Row:
    """The row of a fault that happened."""
    kill = fault.act in ("kill", "kill-all", "kill-launcher")
    return Row(layout, str(fault), step if step >= 0 else None, kill, kill and fault.in_save, survived=fault.survives)


def fit_arguments(run_dir: Path, data: Path, layout: Layout, more: Sequence[str] = ()) -> list[str]:
    """The command line of a short run: a checkpoint every 3 steps, a validation every 10, averaged weights."""
    return [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *("--model.init_args.widths", "[8]", "--trainer.progress_bar", "false"),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--trainer.max_steps", str(STEPS), "--trainer.parallel.strategy", layout.strategy),
        *("--trainer.validate_every_steps", "10", "--checkpoint.every_steps", str(EVERY)),
        *("--early_stopping.restore_best", "false"),
        *("--checkpoint.keep_last", str(KEEP_LAST), "--checkpoint.keep_best", str(KEEP_BEST)),
        *("--trainer.callbacks+=disttrain.callbacks.SampleLedger", "--trainer.callbacks+=disttrain.EMA"),
        *more,
    ]


def start(
    layout: Layout, arguments: Sequence[str], faults: Sequence[Fault] = (), *, folder: Path, mark: str = ""
) -> Ranks:
    """Start the ranks of an attempt; the faults happen in them."""
    (folder / "spent").mkdir(parents=True)
    schedule = folder / "schedule.json"
    schedule.write_text(json.dumps([asdict(fault) for fault in faults]))
    trap = ["--trainer.callbacks+=tests.support.chaos.trap.Trap"] if faults else []
    run_dir = arguments[arguments.index("--trainer.run_dir") + 1]
    environ = {SCHEDULE: str(schedule), RUN_DIR: run_dir, checks.MARK: mark}
    return Ranks(layout.ranks, _rank, [*arguments, *trap], environ, folder=folder)


def _rank(arguments: list[str], environ: dict[str, str]) -> None:
    from disttrain.cli import main

    os.setsid()  # by its session, whatever it starts is found again
    os.environ |= environ
    sys.exit(main(arguments))


def whole_run(folder: Path, data: Path, layout: Layout, more: Sequence[str] = ()) -> Path:
    """A run that nothing brings down."""
    start(layout, fit_arguments(folder / "run", data, layout, more), folder=folder / "logs").wait().ok()
    return folder / "run"


def _kill(left: list[Ranks]) -> None:
    for ranks in left:
        for process in ranks.processes:
            process.kill()
