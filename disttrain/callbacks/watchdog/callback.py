"""A watchdog on every rank: when the run hangs, report where each rank is and exit, so that the launcher restarts it.

Steps, batches and the hooks around them increment a counter, and so does long work between them
(:mod:`disttrain.system.heartbeat`): saving, copying, verifying, fetching. A thread checks both, from the set-up on. If
neither changes for ``hang_timeout``, the rank writes its location and all its Python stacks to
``<run_dir>/hangs/<attempt>/rank-00003.json``. The other ranks see that folder and do the same; the lowest of them
combines all files into one report, records it in ``run.json`` and prints it. Then all exit with code 76. None of this
uses collectives: a rank that is working while the others wait for it, without completing a step, touches
``<run_dir>/hangs/<attempt>.works``.

Time during which the whole process was stopped does not count. If native code holds the GIL, the rank's thread cannot
run; then a separate process makes the rank print its stacks and kills it
(:mod:`disttrain.callbacks.watchdog.monitor_process`). Cost: one addition per batch, one check of the run folder every
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

_LOOKS: Final = 20  # checks within the time limit
_MOST_SECONDS: Final = 10.0  # between two checks
_GRACE_SECONDS: Final = 15.0  # to wait for the other ranks' files
_REPORT_SECONDS: Final = 300.0  # for the whole report
_WORKS: Final = ".works"
_ENTRIES: Final = 5  # to show of the flight recorders
_SHARE: Final = 0.25  # of the time limit without a step, after which a working rank signals the others


class Watchdog(Callback):
    """Ends a run that makes no progress.

    Args:
        run_dir: the run folder, visible to all ranks.
        hang_timeout: duration, such as ``25m``, without any step, batch or other progress, from the set-up on; ``0``
            disables the watchdog.
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
        """PyTorch's timeout for collectives: long enough for the watchdog to report first."""
        return max(PYTORCHS_TIMEOUT, timedelta(seconds=self._timeout + _REPORT_SECONDS))

    def begin(self, trainer: pl.Trainer, doing: str) -> None:
        """Start watching, and agree on the name of the attempt's folder. Collective; the process group must exist.

        Args:
            trainer: its callbacks include this one.
            doing: what the run is doing now.
        """
        if self._timeout:
            self._attempt = trainer.strategy.broadcast(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            self._beat(trainer, doing)

    @contextmanager
    def watching(self, trainer: pl.Trainer, doing: str) -> Iterator[None]:
        """Watch within the context, for work whose end no trainer hook reports. Collective."""
        self.begin(trainer, doing)
        try:
            yield
        except BaseException as error:
            self.on_exception(trainer, trainer.lightning_module, error)
            raise
        self._rest()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Beat: the data are set up."""
        self._beat(trainer, "set-up")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: the model is on its device; a checkpoint is loaded next."""
        self._beat(trainer, "set-up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: the set-up is over."""
        self._beat(trainer, "start of training")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: the first micro batch of an epoch is loaded next."""
        self._beat(trainer, "first batch of the epoch")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: the last save and copies follow."""
        self._beat(trainer, "end of training")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._rest()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching; but if the run hangs, let the watchdog exit: the error only means that a peer has exited."""
        if self._thread is not None and self._folder().exists():
            self._thread.join(3 * _GRACE_SECONDS)  # the thread exits the process after writing its report
        self._rest()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Beat: a micro batch was loaded."""
        self._beat(trainer, MICRO_BATCH)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Beat: a micro batch is done."""
        self._beat(trainer, f"after a {MICRO_BATCH}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: a validation starts."""
        self._beat(trainer, "validation")

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Beat: a batch is done."""
        self._beat(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: a validation is over."""
        self._beat(trainer, "after validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: a test starts."""
        self._beat(trainer, "test")

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Beat: a batch is done."""
        self._beat(trainer, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Beat: a prediction starts."""
        self._beat(trainer, "prediction")

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Beat: a batch is done."""
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
        with suppress(OSError):  # there is none, or another rank has removed it
            self._works().unlink()
            self._works().parent.rmdir()

    def _folder(self) -> Path:
        return self.run_dir / FOLDER / self._attempt

    def _works(self) -> Path:
        return self.run_dir / FOLDER / f"{self._attempt}{_WORKS}"

    def _watch(self, ended: threading.Event, world: World) -> None:
        folder = self._folder()
        seen, worked, told = self._beats, beats(), self._last_told()
        quiet, still, looked = 0.0, 0.0, time.monotonic()  # seconds without progress; without a step or batch
        while not ended.wait(self._interval):
            now = time.monotonic()
            # A longer gap than between two checks means that the process was stopped; that time does not count.
            passed = min(now - looked, 2 * self._interval)
            quiet, still, looked = quiet + passed, still + passed, now
            if self._beats != seen:
                seen, quiet, still = self._beats, 0.0, 0.0
            if beats() != worked:
                worked, quiet = beats(), 0.0
                if still >= _SHARE * self._timeout:
                    self._tell_work()
            elif quiet >= _SHARE * self._timeout and (told_now := self._last_told()) != told:
                told, quiet = told_now, 0.0  # another rank is doing work that this one waits for
            if quiet >= self._timeout or folder.exists():
                self._end(folder, world, quiet)

    def _tell_work(self) -> None:
        """Signal the other ranks that this one is working."""
        with suppress(OSError):  # on a full disk, the others get no signal
            make_folder(self._works().parent)
            self._works().write_text(f"{time.time()}\n")

    def _last_told(self) -> tuple[int, str]:
        """Return the time and content of the last signal from any rank; only changes matter, so clocks may differ."""
        with suppress(OSError):
            return self._works().stat().st_mtime_ns, self._works().read_text()
        return 0, ""

    def _end(self, folder: Path, world: World, quiet: float) -> None:
        """Write where this rank is, make sure that there is a report, and exit the process."""
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
        except Exception as error:  # a full disk must not keep the rank alive
            tell(f"rank {world.rank} hangs, and cannot report it: {error}")
        finally:
            note_ending(HUNG_CODE)
            os._exit(HUNG_CODE)


def _last_collectives() -> list[str]:
    """Return the last entries of PyTorch's flight recorders, if they are enabled (``TORCH_FR_BUFFER_SIZE``)."""
    try:
        import torch._C._distributed_c10d as c10d
    except ImportError:  # a PyTorch build without distributed
        return []
    dumps = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's, and NCCL's separate one
        with suppress(Exception):  # each exists only in some versions and builds
            dumps.append(json.loads(getattr(c10d, name)(True, False)))
    return last_entries(dumps)


def last_entries(dumps: list[dict[str, Any]]) -> list[str]:
    """Return the newest entries of flight recorders, newest last, one line each.

    Args:
        dumps: the content of each recorder, in PyTorch's format.
    """
    # Deduplicate by content: in some builds both names return the same recorder.
    found = {json.dumps(entry, sort_keys=True): entry for dump in dumps for entry in dump.get("entries", [])}
    entries = sorted(found.values(), key=lambda entry: entry.get("time_created_ns", 0))[-_ENTRIES:]
    names = ("collective_seq_id", "profiling_name", "input_sizes", "state")
    return [
        " ".join([*(str(entry.get(name)) for name in names), "in group", *map(str, entry.get("process_group", []))])
        for entry in entries
    ]
