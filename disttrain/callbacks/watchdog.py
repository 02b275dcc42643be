"""A watchdog on every rank: a run that hangs says where each rank is, and ends so that its launcher restarts it.

Steps and batches count up a number; a thread looks at it. If it stands still for ``hang_timeout``, the rank writes
where it is and all its Python stacks to ``<run_dir>/hangs/<attempt>/rank-00003.json``. The other ranks see that
folder and do the same; the lowest of them makes one report of all, notes it in ``run.json`` and prints it. Then all
end with exit code 76. Nothing of it is a collective. Time during which the whole process was stopped does not
count. A rank whose thread cannot run, since code of C holds Python's lock, prints its stacks to standard error. Cost:
one addition a batch, and one look at the run's folder every few seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.hang_report import FOLDER, REPORT, make_report
from disttrain.durations import parse_duration
from disttrain.endings import note_ending
from disttrain.errors import HUNG_CODE
from disttrain.whereabouts import whereabouts
from disttrain.world import World, detect_world

_LOOKS: Final = 20  # within the time limit
_MOST_SECONDS: Final = 10.0  # between two looks
_GRACE_SECONDS: Final = 15.0  # for the other ranks' files


class Watchdog(Callback):
    """Ends a run in which nothing moves.

    Args:
        run_dir: the run's folder, which all ranks see.
        hang_timeout: duration, such as ``25m``, without any step or batch; ``0`` watches nothing.
    """

    def __init__(self, run_dir: Path, *, hang_timeout: str = "25m") -> None:
        self.run_dir = run_dir
        self._timeout = parse_duration(hang_timeout, "trainer.hang_timeout")
        self._interval = min(_MOST_SECONDS, self._timeout / _LOOKS)
        self._beats, self._step, self._doing = 0, 0, ""
        self._attempt = ""
        self._ended: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the name of the attempt's folder. A collective."""
        if self._timeout:
            self._attempt = trainer.strategy.broadcast(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")

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
        self._beat(trainer, "step")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A micro batch is done."""
        self._beat(trainer, "after step")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self._beat(trainer, "validation")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is over."""
        self._beat(trainer, "after validation")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "test")

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A batch is done."""
        self._beat(trainer, "prediction")

    def _beat(self, trainer: pl.Trainer, doing: str) -> None:
        if not self._timeout:
            return
        self._beats, self._step, self._doing = self._beats + 1, trainer.global_step, doing
        if self._ended is None:
            self._ended = threading.Event()
            arguments = (self._ended, detect_world())
            self._arm()  # Python's lock may be held before the thread has had its first turn
            name = "disttrain-watchdog"
            self._thread = threading.Thread(target=self._watch, args=arguments, name=name, daemon=True)
            self._thread.start()

    def _rest(self) -> None:
        if self._ended is not None:
            self._ended.set()
            self._ended = self._thread = None

    def _folder(self) -> Path:
        return self.run_dir / FOLDER / self._attempt

    def _watch(self, ended: threading.Event, world: World) -> None:
        folder = self._folder()
        seen, quiet, looked = self._beats, 0.0, time.monotonic()
        while not ended.wait(self._interval):
            now = time.monotonic()
            # Of a longer gap than between two looks, the process was stopped; only what it was awake for counts.
            quiet += min(now - looked, 2 * self._interval)
            looked = now
            if self._beats != seen:
                seen, quiet = self._beats, 0.0
            if quiet >= self._timeout or folder.exists():
                self._end(folder, world, quiet)
            self._arm()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Have the stacks printed from C, should the watching thread not come round to put that off."""
        with suppress(OSError):  # standard error may be gone
            # It prints and no more: it also fires when a process goes on that was stopped for long.
            faulthandler.dump_traceback_later(self._timeout + 2 * self._interval, exit=False, file=2)

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
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{world.rank:05d}.json"
            path.with_suffix(".tmp").write_text(json.dumps(told, indent=2))
            os.replace(path.with_suffix(".tmp"), path)
            deadline = time.monotonic() + min(_GRACE_SECONDS, self._timeout)
            while len(list(folder.glob("rank-*.json"))) < world.size and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
            if sorted(folder.glob("rank-*.json"))[0] == path:
                report = make_report(self.run_dir, folder, world.size, self._timeout)
                print(f"disttrain: {report}", file=sys.stderr, flush=True)
            deadline += _GRACE_SECONDS
            while not (folder / REPORT).exists() and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
        except Exception as error:  # a full disk must not keep the rank from ending
            print(f"disttrain: rank {world.rank} hangs, and cannot report it: {error}", file=sys.stderr, flush=True)
        finally:
            note_ending(HUNG_CODE)
            os._exit(HUNG_CODE)


def _last_collectives() -> list[str]:
    """The last entries of PyTorch's flight recorder, where it records (``TORCH_FR_BUFFER_SIZE``)."""
    try:
        import torch._C._distributed_c10d as c10d

        dump: Any = getattr(c10d, "_dump_fr_trace_json")  # noqa: B009
        entries = json.loads(dump(True, False)).get("entries", [])[-5:]
    except Exception:  # it exists in some versions and builds only
        return []
    names = ("collective_seq_id", "profiling_name", "input_sizes", "state")
    return [
        " ".join([*(str(entry.get(name)) for name in names), "in group", *map(str, entry.get("process_group", []))])
        for entry in entries
    ]
