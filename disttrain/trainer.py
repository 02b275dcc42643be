"""Lightning's Trainer with ranks from the launcher, intervals in optimizer steps, and disttrain's own checkpoints.

The configuration does not name hardware: ranks come from torchrun, SLURM or a single process. The data module derives
the accumulation, and random numbers are keyed. Two parts of Lightning are disabled: its signal handlers, which run
collectives inside the handler, and its broadcast before every batch.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from disttrain.callbacks.bad_sample_report import BadSamples
from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.introductions import Introductions
from disttrain.callbacks.keyed_randomness import KeyedRandomness
from disttrain.callbacks.lightning_advice import (
    check_by_hand,
    in_our_words,
    quieten,
    refuse_arguments,
    refuse_best,
    refuse_callbacks,
    refuse_named_start,
    refuse_used,
    wants_progress,
)
from disttrain.callbacks.micro_batch_size import MicroBatchSearch
from disttrain.callbacks.preemption import Preemption
from disttrain.callbacks.progress import StepProgress
from disttrain.callbacks.records.compile_report import CompileReport
from disttrain.callbacks.records.loader_record import LoaderRecord
from disttrain.callbacks.records.run_record import RunRecord
from disttrain.callbacks.records.settings_notes import SettingsNotes
from disttrain.callbacks.records.step_log import StepLog
from disttrain.callbacks.reduction_check import ReductionCheck
from disttrain.callbacks.rehearsal import Rehearsal
from disttrain.callbacks.stragglers import Stragglers
from disttrain.callbacks.update_guard.callback import UpdateGuard
from disttrain.callbacks.watchdog.callback import Watchdog
from disttrain.data.loader.user_loaders import give_back
from disttrain.data.loader.workers import refuse_second_run
from disttrain.distributed.consistency import check_alike
from disttrain.distributed.exit_codes import ends_within
from disttrain.distributed.process_group import LoneEnvironment, WorldEnvironment
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.distributed.world import detect_world
from disttrain.errors import ConfigError, Preempted
from disttrain.lightning.bases import TrainerBase
from disttrain.lightning.internals import end_midway, without_signal_handlers
from disttrain.lightning.loops import use_own_loops
from disttrain.parallel.clipping import check_clipping
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.determinism import use_deterministic_convolutions, use_deterministic_kernels
from disttrain.parallel.model.precision import ScaledPrecision, check_precision, device_kind, use_tensor_cores
from disttrain.run.attempts import AttemptOver, free_frames, modes_of, put_right
from disttrain.run.folder import Start, best_checkpoint, find_start, last_begun, stopped_by_request
from disttrain.run.loggers import EventsLog, MetricsLog
from disttrain.strategies.build import build_strategy
from disttrain.system.files import place, resolve_path
from disttrain.system.output import lossy_output
from disttrain.system.terminal import tell

PrecisionName = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


class Trainer(TrainerBase):
    """Trains, evaluates and predicts on the ranks that the launcher starts.

    Args:
        run_dir: run folder, for checkpoints, logs, record and report.
        max_epochs: epochs to train; without any limit, Lightning's default of 1000.
        max_steps: optimizer steps to train; -1 for no limit.
        validate_every_steps: optimizer steps between validations; by default one at the end of each epoch.
        log_every_steps: optimizer steps between log lines.
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed`` (CUDA only) or ``bf16-true``.
        gradient_clip_norm: clip each step's gradient to this norm.
        gradient_clip_value: clip each element of the gradient to this absolute value; excludes ``gradient_clip_norm``.
        parallel: how the model is distributed over the ranks.
        seed: seed of dropout and other random numbers in training, and of initial weights with ``parallel.meta_init``.
        stop_after: duration from launch, such as ``3h50m``, after which to save and stop.
        hang_timeout: duration without a step, batch or other progress (setup included) after which the run reports
            where it hangs and exits; ``0`` never. Collectives time out 5 minutes later, but not before 30 minutes.
        accelerator: ``auto`` uses CUDA if available.
        callbacks: additional callbacks; checkpoints are saved with default settings unless one of them does it.
        progress_bar: show progress on rank 0.
        tf32: let CUDA multiply float32 matrices on tensor cores, with inputs rounded to 10-bit mantissas (TF32).
        deterministic: use deterministic kernels or raise an error; process-wide. On CUDA, two runs are bit-identical
            only with it.
        inference_mode: evaluate and predict under ``torch.inference_mode``; set to false if the module enables
            gradients there (forces, attributions).

    Raises:
        ConfigError: a setting is out of range or not supported by this device.
    """

    def __init__(
        self,
        *,
        run_dir: str = "runs/run",
        max_epochs: int | None = None,
        max_steps: int = -1,
        validate_every_steps: int | None = None,
        log_every_steps: int = 10,
        precision: PrecisionName = "32-true",
        gradient_clip_norm: float | None = None,
        gradient_clip_value: float | None = None,
        parallel: ParallelConfig | None = None,
        seed: int = 0,
        stop_after: str | None = None,
        hang_timeout: str = "25m",
        accelerator: Literal["auto", "cpu", "cuda"] = "auto",
        callbacks: list[Callback] | None = None,
        progress_bar: bool = True,
        tf32: bool = True,
        deterministic: bool = False,
        inference_mode: bool = True,
        **unknown: Any,
    ) -> None:
        refuse_arguments(type(self), unknown)
        refuse_callbacks(callbacks or [])
        if validate_every_steps is not None and validate_every_steps < 1:
            raise ConfigError(
                f"trainer.validate_every_steps is {validate_every_steps}",
                hint="use at least 1, or null for every epoch",
            )
        parallel = parallel or ParallelConfig()
        device = device_kind(accelerator)
        if deterministic:
            use_deterministic_kernels(device)
        elif device == "cuda" and parallel.reduction == "tree":
            use_deterministic_convolutions()
        check_precision(precision, device)
        check_clipping(gradient_clip_norm, gradient_clip_value)
        if device == "cuda":
            use_tensor_cores(tf32)
        world = detect_world()
        plugins: list[Any] = [ScaledPrecision(device)] if precision == "16-mixed" else []
        # Do not let Lightning detect the environment: a single process inside a SLURM allocation is not a SLURM task.
        plugins.append(LoneEnvironment() if world.size == 1 else WorldEnvironment(world))
        if device == "cuda":
            world.check_devices(torch.cuda.device_count())
        # Resolve once: the working directory may change, and the run must not follow a symlink that is re-pointed.
        self.run_dir = resolve_path(run_dir, name="trainer.run_dir")
        self.settings: dict[str, Any] = {}
        """Settings by dotted name, which :meth:`connect` compares between ranks."""
        self._compared, self._validate_every_steps = False, validate_every_steps
        self._loads: str | Path | None = None  # the checkpoint passed to fit, validate, test or predict
        self._over: AttemptOver | None = None  # how the last attempt ended, if another follows in this process
        bad_samples = BadSamples(self.run_dir, log_every_steps)
        self.record = RunRecord(self.run_dir, bad_samples, strategy=parallel.strategy, precision=precision)
        self.step_log = StepLog(log_every_steps, bad_samples)
        self._introductions = Introductions(self.record, self.step_log)
        self.preemption = Preemption(self.run_dir, self.record, stop_after=stop_after)
        self.watchdog = Watchdog(self.run_dir, hang_timeout=hang_timeout)
        self.search = MicroBatchSearch(self.record)
        own: list[Callback] = [
            self._introductions,
            self.watchdog,
            KeyedRandomness(seed),
            bad_samples,
            self.step_log,
            Stragglers(self.record),
            self.record,
            self.search,
            SettingsNotes(self.record.tell),
            ReductionCheck(),
            LoaderRecord(),
        ]
        if parallel.compile != "none":
            own.append(CompileReport(self.record))
        if wants_progress(progress_bar, callbacks or []):
            own.append(StepProgress(self.step_log))
        given = tuple(type(callback) for callback in callbacks or [])
        own += [kind() for kind in (Checkpointing, UpdateGuard) if not any(issubclass(one, kind) for one in given)]
        super().__init__(
            accelerator=device,
            devices=world.local_size,
            num_nodes=world.num_nodes,
            strategy=build_strategy(parallel, seed=seed, timeout=self.watchdog.collective_timeout),
            plugins=plugins,
            precision=None if precision == "16-mixed" else precision,  # set by the plugin
            max_epochs=max_epochs,
            max_steps=max_steps,
            num_sanity_val_steps=1,
            log_every_n_steps=1,  # StepLog applies the interval
            gradient_clip_val=gradient_clip_norm if gradient_clip_value is None else gradient_clip_value,
            gradient_clip_algorithm=None if gradient_clip_value is None else "value",
            use_distributed_sampler=False,
            inference_mode=inference_mode,
            logger=[
                MetricsLog(self.run_dir),
                EventsLog(self.run_dir),
            ],
            callbacks=[*own, *(callbacks or []), self.preemption, Rehearsal()],
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=self.run_dir,
        )
        quieten()
        self._introductions.introduce(self.callbacks)  # type: ignore[attr-defined]
        use_own_loops(self, validate_every_steps=validate_every_steps)
        if validate_every_steps is not None:
            self.check_val_every_n_epoch = None  # so that Lightning's EarlyStopping checks after each validation
        without_signal_handlers(self)

    @property
    def checkpoints(self) -> Checkpointing | None:
        """The callback that saves checkpoints."""
        return self._introductions.checkpoints

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """The callback that saves checkpoints, without others that Lightning only schedules like one."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpointing)]  # type: ignore[attr-defined]

    def connect(self) -> None:
        """Join the other ranks now rather than in ``fit``, and check that they run the same code; idempotent.

        Raises:
            ConfigError: versions, source code or :attr:`settings` differ between ranks.
            JoinError: some ranks did not join.
        """
        refuse_second_run()
        self.strategy.setup_environment()
        if not self._compared:
            self._compared = True
            check_alike(self.settings)

    def find_start(self, resume: str) -> Start:
        """Find where to start, for ``auto``, ``never`` or a path; rank 0 decides. Collective.

        Ranks restarted by torchrun or SLURM always resume from what their launch has saved.
        Pass ``ckpt_path=start.checkpoint`` to :meth:`fit`.

        Raises:
            CheckpointError: the given checkpoint does not exist or is torn, ``auto`` finds a checkpoint of another
                run, or the remote copies are unreachable or belong to another run.
            Preempted: this launch was asked to stop, and torchrun restarted it.
        """
        self.connect()
        resume = place(resume, name="--resume")
        with raise_together():
            stopped = stopped_by_request(self.run_dir) if self.is_global_zero else ""
        if stopped := self.strategy.broadcast(stopped):
            raise Preempted(f"not started again: this launch was {stopped}")
        checkpoints = self.checkpoints
        with self.watchdog.watching(self, "search for a checkpoint"):
            start = find_start(
                self.run_dir,
                resume,
                checksums=checkpoints is None or checkpoints.verify_checksums,
                mirror=checkpoints.mirror if checkpoints is not None else None,
                best=checkpoints.keep_best if checkpoints is not None else 0,
            )
        if start.checkpoint is not None:  # the working directory may change before it is loaded
            start = replace(start, checkpoint=start.checkpoint.absolute())
        if checkpoints is not None:
            checkpoints.attempt, checkpoints.faulty = start.attempt, start.faulty
        self.record.start = start
        return start

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Save now, at a step boundary; does nothing if called while an exception is handled. Collective."""
        if self.state.status == TrainerStatus.INTERRUPTED and self.state.stage is not None:
            # Other ranks may not have failed, so no collectives here; an error would hide the original one.
            tell(f"{filepath} is not saved: the run has failed in the midst of a step")
            return
        super().save_checkpoint(filepath, weights_only, storage_options)

    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        *,
        resume: str | Path | None = None,
    ) -> None:
        """Train, in one attempt or several.

        A rollback ends an attempt. So does running out of memory on one rank, if the micro batch size is ``auto``. The
        next attempt resumes from a checkpoint, as if the run had been restarted.

        Args:
            model: the module to train.
            train_dataloaders: as in Lightning.
            val_dataloaders: as in Lightning.
            datamodule: the data.
            ckpt_path: a checkpoint to resume from, such as one from :meth:`find_start`.
            weights_only: as in Lightning.
            resume: passed to :meth:`find_start`: ``auto``, ``never``, or a path. None starts a new run in the folder,
                or resumes from ``ckpt_path``.

        Raises:
            ConfigError: both ``resume`` and ``ckpt_path`` are given.
            CheckpointError: see :meth:`find_start`.
            Preempted: the run was stopped from outside.
            OutOfMemoryError: the ranks must be restarted with a smaller micro batch.
        """
        if resume is not None:
            if ckpt_path is not None:
                raise ConfigError("fit() is given both resume and ckpt_path", hint='give one; resume="auto" does both')
            if str(resume) == "never":
                refuse_used(self)
            start = self.find_start(str(resume))
            for note in start.notes if self.is_global_zero else ():
                tell(note)
            ckpt_path = start.checkpoint
        data = (train_dataloaders, val_dataloaders, datamodule)
        self._over = None
        while True:
            self._call(super().fit, model, *data, ckpt_path=ckpt_path, weights_only=weights_only)
            if self._over is None:
                return
            ckpt_path = self._over.checkpoint
            # Lightning's loops would otherwise keep counting from where the last attempt ended.
            use_own_loops(self, validate_every_steps=self._validate_every_steps)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Run Lightning's validation; ``ckpt_path`` may be ``best`` or ``last``, of those in the run folder."""
        return self._call(super().validate, *args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Run Lightning's test; ``ckpt_path`` as in :meth:`validate`."""
        return self._call(super().test, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Run Lightning's prediction; ``ckpt_path`` as in :meth:`validate`. Padding is not returned."""
        return self._call(super().predict, *args, **kwargs)

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        with in_our_words():
            given = inspect.signature(method).bind(*args, **kwargs)
            which = self._loads = given.arguments.get("ckpt_path")
            if which in ("best", "last"):
                if method.__name__ == "fit":
                    refuse_named_start(which)
                given.arguments["ckpt_path"] = self._loads = self._checkpoint_of_run(which)
            return method(*given.args, **given.kwargs)

    def _checkpoint_of_run(self, which: str) -> str:
        """Return the path of the best or last checkpoint in the run folder. Collective."""
        self.connect()
        path = ""
        with raise_together():
            if self.is_global_zero:
                path = str(best_checkpoint(self.run_dir, which, tell=refuse_best).absolute())
        return str(self.strategy.broadcast(path))

    def around_run(self, run: Callable[[], Any]) -> Any:
        """Set up, run and tear down, with signal handling, watchdog and error translation around all three."""
        fitting = self.state.fn == TrainerFn.FITTING
        modes = modes_of(self.lightning_module) if fitting else ()
        self.record.goes_on, self._over = self._over is not None, None
        # React to signals during an entire fit, including setup; an evaluation has nothing to save.
        noting = self.preemption.noting(goes_on=self.record.goes_on) if fitting else nullcontext()
        with in_our_words(), lossy_output(), noting:
            if self.state.fn == TrainerFn.FITTING and last_begun() is not None:
                # Earlier trainers of this process are reference cycles, which keep shards open until collected.
                gc.collect()
            self.connect()
            if self.state.fn == TrainerFn.FITTING:
                refuse_callbacks(self.callbacks)  # type: ignore[attr-defined]  # Lightning's Tuner adds its own now
                check_by_hand(self)
            self.watchdog.begin(self, "set-up")
            self.search.choose(self, self._loads)
            try:
                return run()
            except Exception as error:
                over = error if isinstance(error, AttemptOver) else self.search.next_attempt(self, error)
                if over is None:
                    raise
                self._over = over.with_traceback(None)
                free_frames(error)
            # Outside the except block: there, the traceback keeps the loops' frames and their tensors alive.
            put_right(self.lightning_module, modes)
            end_midway(self)
            return None

    def around_teardown(self, teardown: Callable[[], None]) -> None:
        """Release the run's resources."""
        # This moves the module to the CPU, which on a rank that failed alone waits for kernels that wait for others.
        with ends_within(sys.exception() if self.world_size > 1 else None):
            teardown()
        give_back(self)
