"""The callback that injects faults in a rank, each at its exact place and once.

It is added to an ordinary run by ``--trainer.callbacks``. Functions of disttrain and of the system are wrapped where
a fault has its place, so nothing depends on timing. The schedule is a file, named by an environment variable; a fault
that is about to happen leaves a file beside it first, by which later attempts, other ranks and the campaign know.
After a fault that ends the attempt, a process does no further one: what is left of it has only to come to its end.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from disttrain.callbacks.records.run_record import RunRecord
from disttrain.checkpoint import cleanup
from disttrain.checkpoint.format import checksum, fence, reader, writer
from disttrain.checkpoint.format.marker import LATEST, MARKER, META
from disttrain.checkpoint.saving import staging
from disttrain.run.folder import RUN_FILE
from disttrain.run.metrics_file import FILE_NAME
from tests.support.chaos.disk import fill, make_read_only
from tests.support.chaos.plan import AT_START, LAST_CALL, Fault

SCHEDULE: Final = "DISTTRAIN_CHAOS_SCHEDULE"
"""Names the file of the schedule."""
RUN_DIR: Final = "DISTTRAIN_CHAOS_RUN"
"""Names the run's folder."""
OWN_NAME: Final = re.compile(r"step-\d{8}(\.\d+)?")

Where = Callable[..., bool]


def _anywhere(*_: Any, **__: Any) -> bool:
    return True


def _to(name: str) -> Where:
    return lambda source, target, *_, **__: Path(target).name == name


# Place: what is wrapped, and which of its calls are meant. The fault comes before the call.
PLACES: Final[dict[str, tuple[Any, str, Where]]] = {
    "staging": (staging.Stage, "_buffer", _anywhere),
    "writing": (checksum.SummedFile, "write", _anywhere),
    "syncing": (os, "fsync", _anywhere),
    "meta": (checksum.Sums, "summed", lambda sums, path, **_: path.name == META),
    "renaming": (os, "rename", lambda source, *_, **__: str(source).endswith(".tmp")),
    "marking": (writer, "write_marker", _anywhere),
    "marked": (os, "replace", _to(MARKER)),
    "latest": (os, "replace", _to(LATEST)),
    "pruning": (cleanup, "remove", _anywhere),
    "pruned": (shutil, "rmtree", lambda path, *_, **__: OWN_NAME.fullmatch(Path(path).name) is not None),
    "claiming": (os, "replace", _to(fence.FENCE)),
    "clearing": (fence, "_clear", _anywhere),
    "reading": (reader._SafeReader, "read_metadata", _anywhere),
    "recording": (os, "replace", _to(RUN_FILE)),
    "logging": (os, "replace", _to(FILE_NAME)),
    "ending": (RunRecord, "add_result", _anywhere),
}


class Trap(Callback):
    """Has the faults of the schedule happen in this rank."""

    def __init__(self) -> None:
        path = Path(os.environ[SCHEDULE])
        self.spent, self.rank = path.parent / "spent", int(os.environ.get("RANK", "0"))
        self.faults = [Fault(**fault) for fault in json.loads(path.read_text())]
        self.before = self._marks()  # of earlier attempts
        self.step, self.saving = 0, -1
        self.ballast: Path | None = None
        self.slow = False
        for place in {fault.place for fault in self.faults} & PLACES.keys():
            self._lay(place)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Faults at a step; and, late in the run, those whose place did not come up."""
        self.step = trainer.global_step
        self._meet("step", self.step)
        if self.step >= LAST_CALL and (armed := self._next()) and armed[1].act == "kill":
            self.saving = self.step
            self._meet(armed[1].place, self.step)
        if self.slow:
            time.sleep(1.0)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Faults in a validation."""
        if not trainer.sanity_checking:
            self._meet("validation", trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A save begins: the disk that an earlier one has found full has room again."""
        self.saving = trainer.global_step
        if self.ballast is not None:
            self.ballast.unlink(missing_ok=True)
            self.ballast = None
        self._meet("saving", self.saving)

    def _lay(self, place: str) -> None:
        owner, name, meant = PLACES[place]
        known: Callable[..., Any] = getattr(owner, name)

        @wraps(known)
        def trapped(*arguments: Any, **more: Any) -> Any:
            if meant(*arguments, **more):
                # What comes before the first step counts as of any step; else it is the step of the save.
                self._meet(place, LAST_CALL if place in AT_START else self.saving)
            return known(*arguments, **more)

        setattr(owner, name, trapped)

    def _marks(self) -> set[str]:
        return {path.name for path in self.spent.iterdir()}

    def _next(self) -> tuple[int, Fault] | None:
        """The first fault that is still to come, unless this attempt has had its end."""
        marks = self._marks()
        for number, fault in enumerate(self.faults):
            mine = [mark for mark in marks if mark.startswith(f"{number}-")]
            if self.before & set(mine):
                continue
            if f"{number}-{self.rank}" not in mine and (fault.everywhere or not mine):
                return number, fault
            if not fault.survives:
                return None
        return None

    def _meet(self, place: str, step: int) -> None:
        number, fault = self._next() or (-1, None)
        if fault is None or fault.place != place or step < fault.step:
            return
        if not fault.everywhere and self.rank != fault.rank:
            return
        happened = {"fault": str(fault), "place": place, "step": self.saving if place in PLACES else self.step}
        (self.spent / f"{number}-{self.rank}").write_text(json.dumps(happened))
        getattr(self, "_" + fault.act.replace("-", "_"))(fault)

    def _kill(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    _kill_all = _kill

    def _kill_launcher(self, fault: Fault) -> None:
        """The ranks go on as orphans, slowly, so that the next attempt meets them."""
        os.kill(os.getppid(), signal.SIGKILL)
        self.slow = True

    def _terminate(self, fault: Fault) -> None:
        time.sleep(fault.seconds * self.rank)  # the skew is what is tested
        os.kill(os.getpid(), signal.SIGTERM)

    def _pause(self, fault: Fault) -> None:
        """Somebody else has to wake a stopped process."""
        subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    def _hang(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    _leave = _hang

    def _eio(self, fault: Fault) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _full(self, fault: Fault) -> None:
        self.ballast = fill(self._directory())

    def _read_only(self, fault: Fault) -> None:
        make_read_only(self._directory())

    def _directory(self) -> Path:
        return Path(os.environ[RUN_DIR]) / "checkpoints"
