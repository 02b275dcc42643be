"""Report how a resumed run's settings differ from those of its checkpoint, before it continues.

There are two kinds. Most settings take effect from the resume on; one line lists those that changed. Learning rates and
the settings of a module's own schedules are restored from the checkpoint; another line lists the module's settings that
it overrides. A schedule that would end before the run does is refused before the first step. Checkpoints store the
settings as configured, as short strings and numbers. No cost per step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import OneCycleLR

from disttrain.callbacks.ema import EMA
from disttrain.callbacks.lightning_advice import check_by_hand
from disttrain.checkpoint.format.optimizer_state import NOT_COMPARED
from disttrain.errors import ConfigError
from disttrain.lightning.position import steps_per_epoch
from disttrain.system.terminal import redacted, tell
from disttrain.tasks.base import run_steps

_FREE: Final = (
    *("config", "resume", "report", "data.loader", "data.cache"),
    *(f"trainer.{name}" for name in ("run_dir", "progress_bar", "hang_timeout", "stop_after", "log_every_steps")),
    *(f"checkpoint.{name}" for name in ("save", "verify", "on_save_error", "mirror")),
    *("trainer.accelerator", "trainer.parallel.strategy", "trainer.parallel.bucket_mib"),
    *(f"trainer.parallel.{name}" for name in ("replicate", "shard", "tensor", "offload", "static_graph", "compile")),
    *(f"trainer.parallel.{name}" for name in ("find_unused_parameters", "reshard_after_forward")),
    *(f"trainer.parallel.{name}" for name in ("activation_checkpointing", "gradient_as_bucket_view")),
)
"""Settings, or groups of them, that do not affect a run's result except by rounding."""
_ELSEWHERE: Final = (
    *("initialize_from", "initialize_strict", "seed_everything", "checkpoint", "early_stopping"),
    *("optimizer", "lr_scheduler", "trainer.callbacks", "trainer.max_epochs", "trainer.max_steps"),
    *("trainer.validate_every_steps", "data.train", "data.val", "data.test", "data.predict", "data.micro_batch_size"),
)
"""Settings that a resume may change or that are compared elsewhere."""
_MOVING: Final = ("last_epoch", "base_lrs")
_LONGEST: Final = 200


def is_effective(name: str) -> bool:
    """Return whether a setting, given by its dotted name, affects a run's result by more than rounding."""
    return not _is_within(name, _FREE)


def _is_within(name: str, groups: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{group}.") for group in groups)


class SettingsNotes(Callback):
    """Compares the settings of a run with those of the checkpoint that it resumes from.

    Args:
        note: called on rank 0 with the step, ``start`` and each line.
    """

    def __init__(self, note: Callable[[int, str, str], object]) -> None:
        self._note = note
        self._now: dict[str, dict[str, Any]] = {}
        self._saved: dict[str, dict[str, Any]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse gradient accumulation if the module uses manual optimization."""
        if stage == "fit":
            check_by_hand(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the settings as configured, before a checkpoint overrides some.

        Raises:
            ConfigError: a one-cycle schedule ends before the run does.
        """
        self._now = {"effective": dict(_configured(trainer)), "kept": dict(_overridden(trainer))}
        if not trainer.ckpt_path:
            _check_length(trainer)  # early, before this run replaces an older one in its folder

    def state_dict(self) -> dict[str, Any]:
        """Return the settings as configured."""
        return self._now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the checkpoint's settings, to compare once everything is restored."""
        self._saved = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what differs; refuse a schedule that is too short.

        Raises:
            ConfigError: a one-cycle schedule ends before the run does.
        """
        _check_length(trainer, trainer.num_training_batches)
        saved, self._saved = self._saved, None
        if not saved or not trainer.is_global_zero:
            return
        changed, kept = (_changes(saved.get(kind, {}), self._now[kind]) for kind in ("effective", "kept"))
        lines = []
        if changed:
            differences = "; ".join(f"{name} was {was}, is {now}" for name, was, now in changed)
            lines.append(f"changed since the checkpoint, and so from here on: {differences}")
        if kept:
            differences = "; ".join(f"{name}: {was} (the configuration says {now})" for name, was, now in kept)
            lines.append(
                f"kept as the checkpoint has it: {differences}; --initialize_from begins a new run with others"
            )
        for line in lines:
            tell(line)
            self._note(trainer.global_step, "start", line)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return settings that are in both but differ; those in only one came with another version or command."""
    return [(name, saved[name], value) for name, value in now.items() if name in saved and saved[name] != value]


def _configured(trainer: pl.Trainer) -> Iterator[tuple[str, Any]]:
    """Yield the settings that take effect from the resume on, by their name on the command line."""
    found: dict[str, Any] = dict(getattr(trainer, "settings", {}))
    if not found:
        hparams = trainer.lightning_module.hparams
        found = {
            f"hyper_parameters.{name}": v for name, v in hparams.items() if isinstance(v, bool | int | float | str)
        }
    by = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm"
    found["trainer.precision"] = str(trainer.precision)
    found |= {
        f"trainer.gradient_clip_{kind}": trainer.gradient_clip_val if by == kind else None for kind in ("norm", "value")
    }
    parallel = getattr(trainer.strategy, "config", None)
    if dataclasses.is_dataclass(parallel):
        found |= {
            f"trainer.parallel.{each.name}": getattr(parallel, each.name) for each in dataclasses.fields(parallel)
        }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            found |= {
                "ema.decay": callback.decay,
                "ema.warmup": callback.warmup,
                "ema.every_steps": callback.every_steps,
            }
    for name, value in found.items():
        # An optimizer's settings are compared with its state instead.
        if is_effective(name) and not _is_within(name, _ELSEWHERE) and ".optimizer" not in name:
            yield name, _short(value)


def _overridden(trainer: pl.Trainer) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a checkpoint overrides, as the module configures them."""
    for number, optimizer in enumerate(trainer.optimizers):
        for place, group in enumerate(optimizer.param_groups):
            for name, value in group.items():
                # With a schedule, "lr" may depend on the length of the run; "initial_lr" is compared instead.
                if name != "params" and name not in NOT_COMPARED and (name != "lr" or "initial_lr" not in group):
                    yield f"{name} of group {group.get('name', place)} of optimizer {number}", _short(value)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        yield from _schedule(config.scheduler, f"of {type(config.scheduler).__name__} {number}")


def _schedule(scheduler: Any, where: str) -> Iterator[tuple[str, Any]]:
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _schedule(inner, f"of {type(inner).__name__} {where}")
    for name, value in scheduler.state_dict().items():
        if (
            (not name.startswith("_") or name == "_milestones")
            and name not in _MOVING
            and isinstance(value, bool | int | float | str | list | dict)
        ):
            yield f"{name} {where}", _short(value)


def _check_length(trainer: pl.Trainer, batches: float = math.inf) -> None:
    """Refuse a one-cycle schedule that is too short; for a custom loader, ``batches`` is known once training starts."""
    steps = run_steps(trainer)
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and not math.isinf(batches):
        of_epochs = trainer.max_epochs * int(steps_per_epoch(trainer))
        steps = of_epochs if steps is None else min(steps, of_epochs)
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, OneCycleLR):
            continue
        left = steps - trainer.global_step if steps is not None and config.interval == "step" else None
        if config.interval == "epoch" and trainer.max_epochs is not None and trainer.max_epochs > 0:
            left = trainer.max_epochs - trainer.current_epoch
        end = scheduler.last_epoch + left // config.frequency if left is not None else 0
        if end > scheduler.total_steps:
            raise ConfigError(
                f"OneCycleLR ends after {scheduler.total_steps} steps of its own, this run would take {end}",
                hint="limit the run (trainer.max_steps, trainer.max_epochs), or begin a new one with a longer cycle:"
                " --initialize_from takes the weights; a cycle that has begun cannot be extended",
            )


def _short(value: Any) -> Any:
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    text = redacted(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
