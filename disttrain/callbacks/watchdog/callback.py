"""A watchdog on every rank: a run that hangs says where each rank is, and ends so that its launcher restarts it.

Steps, batches and the hooks around them count up a number, and so does what takes long beside them
(:mod:`disttrain.system.heartbeat`): saving, copying, verifying, fetching. A thread looks at both, from the set-up on.
If they stand still for ``hang_timeout``, the rank writes where it is and all its Python stacks to
``<run_dir>/hangs/<attempt>/rank-00003.json``. The other ranks see that folder and do the same; the lowest of them makes
one report of all, notes it in ``run.json`` and prints it. Then all end with exit code 76. Nothing of it is a
collective: a rank that works while the others wait for it, without a step, touches ``<run_dir>/hangs/<attempt>.works``.

Time during which the whole process was stopped does not count. A rank whose thread cannot run, since code of C holds
Python's lock, is made to print its stacks, and is ended, by a process beside it
(:mod:`disttrain.callbacks.watchdog.monitor_process`). Cost: one addition a batch, one look at the run's folder every
few seconds, and that process.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.watchdog.hang_report import FOLDER, MICRO_BATCH, REPORT, make_report
from disttrain.callbacks.watchdog.monitor_process import Overseer
from disttrain.distributed.exit_codes import note_ending
from disttrain.distributed.synchronize_errors import PYTORCHS_TIMEOUT
from disttrain.distributed.world import World, detect_world
from disttrain.errors import HUNG_CODE
from disttrain.system.durations import parse_duration
from disttrain.system.files import make_folder, to_json, write_atomically
from disttrain.system.heartbeat import beats
from disttrain.system.stack_summary import whereabouts
from disttrain.system.terminal import tell

_LOOKS: Final = 20  # within the time limit
_MOST_SECONDS: Final = 10.0  # between two looks
_GRACE_SECONDS: Final = 15.0  # for the other ranks' files
_REPORT_SECONDS: Final = 300.0  # for all of it
_WORKS: Final = ".works"
_ENTRIES: Final = 5  # of the flight recorders
_SHARE: Final = 0.25  # of the time limit without a step, after which a rank that works says so to the others


class Watchdog(Callback):
    """Ends a run in which nothing moves.

    Args:
        run_dir: the run's folder, which all ranks see.
        hang_timeout: duration, such as ``25m``, without any step, batch or other progress, from the set-up on; ``0``
            watches nothing.
    """

    def __init__(self, run_dir: Path, *, hang_timeout: str = "25m") -> None:
        self.run_dir = run_dir
        self._timeout = parse_duration(hang_timeout, "trainer.hang_timeout")
        self._interval = min(_MOST_SECONDS, self._timeout / _LOOKS)
        self._beats, self._step, self._doing = 0, 0, ""
        self._attempt = ""
        self._ended: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._overseer: Overseer | None = None

    @property
    def collective_timeout(self) -> timedelta:
        """How long a collective may take until PyTorch gives it up: long enough for a report to be made before."""
        return max(PYTORCHS_TIMEOUT, timedelta(seconds=self._timeout + _REPORT_SECONDS))

    def begin(self, trainer: pl.Trainer, doing: str) -> None:
        """Watch from here on, and agree on the name of the attempt's folder. A collective, once the ranks have joined.

        Args:
            trainer: its callbacks include this one.
            doing: what the run does now.
        """
        if self._timeout:
            self._attempt = trainer.strategy.broadcast(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            self._beat(trainer, doing)

    @contextmanager
    def watching(self, trainer: pl.Trainer, doing: str) -> Iterator[None]:
        """Watch what is done here, where the trainer's hooks do not say when it is over. A collective."""
        self.begin(trainer, doing)
        try:
            yield
        except BaseException as error:
            self.on_exception(trainer, trainer.lightning_module, error)
            raise
        self._rest()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The data are set up."""
        self._beat(trainer, "set-up")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is where it is to be; a checkpoint is loaded next."""
        self._beat(trainer, "set-up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The set-up is over."""
        self._beat(trainer, "start of training")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first micro batch of an epoch is waited for."""
        self._beat(trainer, "first batch of the epoch")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last save, copies and the end of the run follow."""
        self._beat(trainer, "end of training")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no more."""
        self._rest()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no more; but where the run hangs, a peer that has ended is only why a collective has failed here."""
        if self._thread is not None and self._folder().exists():
            self._thread.join(3 * _GRACE_SECONDS)  # it ends the process, once its part of the report is written
        self._rest()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A micro batch has come."""
        self._beat(trainer, MICRO_BATCH)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A micro batch is done."""
        self._beat(trainer, f"after a {MICRO_BATCH}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self._beat(trainer, "validation")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is over."""
        self._beat(trainer, "after validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A test begins."""
        self._beat(trainer, "test")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A prediction begins."""
        self._beat(trainer, "prediction")

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "prediction")

    def _beat(self, trainer: pl.Trainer, doing: str) -> None:
        if not self._attempt:
            return
        self._beats, self._step, self._doing = self._beats + 1, trainer.global_step, doing
        if self._ended is None:
            self._ended, world = threading.Event(), detect_world()
            limit, grace = self._timeout + 2 * self._interval, min(_GRACE_SECONDS, self._timeout)
            self._overseer = Overseer(world.rank, limit=limit, grace=grace)
            arguments = (self._ended, world)
            name = "disttrain-watchdog"
            self._thread = threading.Thread(target=self._watch, args=arguments, name=name, daemon=True)
            self._thread.start()

    def _rest(self) -> None:
        if self._ended is None or self._overseer is None:
            return
        self._ended.set()
        self._overseer.end()
        self._ended = self._thread = self._overseer = None
        with suppress(OSError):  # where there is none, or another rank has removed it
            self._works().unlink()
            self._works().parent.rmdir()

    def _folder(self) -> Path:
        return self.run_dir / FOLDER / self._attempt

    def _works(self) -> Path:
        return self.run_dir / FOLDER / f"{self._attempt}{_WORKS}"

    def _watch(self, ended: threading.Event, world: World) -> None:
        folder = self._folder()
        seen, worked, told = self._beats, beats(), self._last_told()
        quiet, still, looked = 0.0, 0.0, time.monotonic()  # seconds without anything, and without a step or batch
        while not ended.wait(self._interval):
            now = time.monotonic()
            # Of a longer gap than between two looks, the process was stopped; only what it was awake for counts.
            passed = min(now - looked, 2 * self._interval)
            quiet, still, looked = quiet + passed, still + passed, now
            if self._beats != seen:
                seen, quiet, still = self._beats, 0.0, 0.0
            if beats() != worked:
                worked, quiet = beats(), 0.0
                if still >= _SHARE * self._timeout:
                    self._tell_work()
            elif quiet >= _SHARE * self._timeout and (told_now := self._last_told()) != told:
                told, quiet = told_now, 0.0  # another rank does what this one waits for
            if quiet >= self._timeout or folder.exists():
                self._end(folder, world, quiet)

    def _tell_work(self) -> None:
        """Let the other ranks see that this one works."""
        with suppress(OSError):  # a full disk: they see no more of it than before
            make_folder(self._works().parent)
            self._works().write_text(f"{time.time()}\n")

    def _last_told(self) -> tuple[int, str]:
        """When a rank last said that it works, and what; only whether that has changed is looked at."""
        with suppress(OSError):
            return self._works().stat().st_mtime_ns, self._works().read_text()
        return 0, ""

    def _end(self, folder: Path, world: World, quiet: float) -> None:
        """Tell where this rank is, see to it that there is a report, and end the process."""
        try:
            place, stacks = whereabouts()
            told = {
                "rank": world.rank,
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "step": self._step,
                "doing": self._doing,
                "quiet_seconds": round(quiet, 1),
                "place": place,
                "collectives": _last_collectives(),
                "stacks": stacks,
            }
            make_folder(folder)
            path = folder / f"rank-{world.rank:05d}.json"
            write_atomically(path, to_json(told, indent=2))
            deadline = time.monotonic() + min(_GRACE_SECONDS, self._timeout)
            while len(list(folder.glob("rank-*.json"))) < world.size and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
            if sorted(folder.glob("rank-*.json"))[0] == path:
                report = make_report(self.run_dir, folder, world.size, self._timeout)
                tell(report)
            deadline += _GRACE_SECONDS
            while not (folder / REPORT).exists() and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
        except Exception as error:  # a full disk must not keep the rank from ending
            tell(f"rank {world.rank} hangs, and cannot report it: {error}")
        finally:
            note_ending(HUNG_CODE)
            os._exit(HUNG_CODE)


def _last_collectives() -> list[str]:
    """The last entries of PyTorch's flight recorders, where they record (``TORCH_FR_BUFFER_SIZE``)."""
    try:
        import torch._C._distributed_c10d as c10d
    except ImportError:  # a build without
        return []
    dumps = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's; and NCCL's, which has one of its own
        with suppress(Exception):  # each exists in some versions and builds only
            dumps.append(json.loads(getattr(c10d, name)(True, False)))
    return last_entries(dumps)


def last_entries(dumps: list[dict[str, Any]]) -> list[str]:
    """The newest entries of flight recorders, the newest last, a line each.

    Args:
        dumps: what each recorder holds, as PyTorch gives it.
    """
    # By what they are, since a build may give one recorder under both names.
    found = {json.dumps(entry, sort_keys=True): entry for dump in dumps for entry in dump.get("entries", [])}
    entries = sorted(found.values(), key=lambda entry: entry.get("time_created_ns", 0))[-_ENTRIES:]
    names = ("collective_seq_id", "profiling_name", "input_sizes", "state")
    return [
        " ".join([*(str(entry.get(name)) for name in names), "in group", *map(str, entry.get("process_group", []))])
        for entry in entries
    ]
