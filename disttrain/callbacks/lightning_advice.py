"""Refuse Lightning settings and callbacks that do not apply here, and name the replacement.

Users coming from Lightning try its names first. Arguments and callbacks that have another name here, or whose job
disttrain does itself, are refused when the trainer is created or a run begins, with the name to use instead. Errors in
which Lightning suggests settings of its own trainer are reworded to name disttrain's. No cost per step.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)

from disttrain.errors import ConfigError, nearest
from disttrain.lightning.callback import Callback as StepCallback
from disttrain.parallel.ranks import data_ranks

_ELSEWHERE: Final = {
    "devices": "ranks come from the launcher: torchrun --nproc-per-node N, or disttrain launch --nproc N",
    "gpus": "ranks come from the launcher: torchrun --nproc-per-node N, or disttrain launch --nproc N",
    "num_nodes": "ranks come from the launcher: torchrun --nnodes N, or disttrain submit --nodes N",
    "strategy": 'use parallel=ParallelConfig(strategy="ddp") or "fsdp"',
    "sync_batchnorm": "use parallel=ParallelConfig(sync_batchnorm=True)",
    "accumulate_grad_batches": "it is derived: use ShardedDataModule's global_batch_size and micro_batch_size",
    "gradient_clip_val": "use gradient_clip_norm or gradient_clip_value",
    "gradient_clip_algorithm": "use gradient_clip_norm or gradient_clip_value",
    "val_check_interval": "use validate_every_steps, in optimizer steps",
    "check_val_every_n_epoch": "use validate_every_steps, in optimizer steps",
    "log_every_n_steps": "use log_every_steps",
    "default_root_dir": "use run_dir",
    "enable_progress_bar": "use progress_bar",
    "enable_checkpointing": "checkpoints are always kept: see disttrain.Checkpointing",
    "max_time": "use stop_after, such as 3h50m",
    "use_distributed_sampler": "use ShardedDataModule, or set a DistributedSampler by hand",
    "reload_dataloaders_every_n_epochs": "ShardedDataModule has another order in every epoch",
    "logger": "metrics go to metrics.csv and TensorBoard in run_dir; append others to trainer.loggers",
}
"""What to use instead of an argument of Lightning's trainer."""

_TUNER: Final = "is of lightning's Tuner, which cannot work with disttrain's checkpoints and steps"
_REFUSED: Final[dict[type[Callback], tuple[str, str]]] = {
    ModelCheckpoint: (
        "keeps checkpoints, which disttrain does itself",
        'use disttrain.Checkpointing(monitor="val/loss", keep_best=1, keep_last=1) in its place; with a monitor,'
        " ckpt_path='best' finds its best one",
    ),
    LearningRateFinder: (
        _TUNER,
        "compare short runs: Trainer(max_steps=100, run_dir=...) with a few rates, and disttrain report",
    ),
    BatchSizeFinder: (_TUNER, "use ShardedDataModule(micro_batch_size='auto')"),
    StochasticWeightAveraging: (
        "averages weights in its own copy of the module and replaces the optimizer's schedule, neither of which a"
        " checkpoint holds",
        "use disttrain.EMA, whose averages are saved and sharded",
    ),
    WeightAveraging: (
        "puts its averages in the place of the weights in a checkpoint",
        "use disttrain.EMA, whose averages are saved beside the weights and sharded",
    ),
    ModelPruning: (
        "gives the module other parameters in mid-run (weight_orig, weight_mask), which a new process lacks when it"
        " loads a checkpoint",
        "prune after training: disttrain checkpoints export, then torch.nn.utils.prune; or mask the weights in"
        " forward() by a buffer",
    ),
    OnExceptionCheckpoint: (
        "saves on the ranks that failed, in the midst of a step",
        "leave it out: a run that failed resumes from its last checkpoint (checkpoint.every_steps, every_minutes)",
    ),
}
"""Callbacks that duplicate disttrain, cannot work with it, or change a run in ways that a resume cannot reproduce."""

_NO_BEST: Final = (
    "ckpt_path is 'best', and no checkpoint of this run is the best one",
    'give disttrain.Checkpointing a monitor, such as monitor="val/loss", and train with it; or name a checkpoint by its'
    " path",
)
_UNUSED: Final = "Expected to have finished reduction in the prior iteration"


def refuse_arguments(trainer: type, unknown: Iterable[str]) -> None:
    """Refuse arguments that the trainer does not have.

    Raises:
        ConfigError: there are any; it names the first one and what to use instead.
    """
    for name in unknown:
        known = [key for key in inspect.signature(trainer).parameters if key not in ("self", "unknown")]
        raise ConfigError(f"Trainer has no argument {name!r}", hint=_ELSEWHERE.get(name) or nearest(name, known))


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse Lightning callbacks that are incompatible with disttrain.

    Raises:
        ConfigError: there is one.
    """
    for callback in callbacks:
        for kind, (what, hint) in _REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigError(f"callback {type(callback).__name__} {what}", hint=hint)
        if hasattr(callback, "on_step_end") and not isinstance(callback, StepCallback):
            raise ConfigError(
                f"callback {type(callback).__name__} defines on_step_end, but is not a disttrain.Callback",
                hint="derive it from disttrain.Callback, which is called at the end of each step",
            )


def refuse_best(_: str) -> None:
    """Refuse ``ckpt_path='best'`` when no checkpoint holds a metric."""
    raise ConfigError(_NO_BEST[0], hint=_NO_BEST[1])


def refuse_used(trainer: pl.Trainer) -> None:
    """Refuse to start over with a trainer that has trained: its loops stand at their end."""
    if trainer.global_step:
        raise ConfigError(
            f"fit(resume='never') on a Trainer that has trained {trainer.global_step} steps would not train",
            hint="make a new Trainer for each run",
        )


def refuse_named_start(which: str) -> None:
    """Refuse ``fit(ckpt_path='last')`` and ``'best'``, for which Lightning may silently start from scratch."""
    raise ConfigError(
        f"ckpt_path is {which!r}, which fit does not take",
        hint='resume by fit(..., resume="auto")',
    )


def wants_progress(progress_bar: bool, callbacks: Iterable[Callback]) -> bool:
    """Return whether to show disttrain's progress: if it is wanted and the user gave no other progress bar.

    Raises:
        ConfigError: a progress bar is given although ``progress_bar`` is false.
    """
    given = [type(callback).__name__ for callback in callbacks if isinstance(callback, ProgressBar)]
    if given and not progress_bar:
        raise ConfigError(
            f"progress_bar is false, and the callbacks hold a {given[0]}", hint="leave one of them out of the trainer"
        )
    return progress_bar and not given


def check_by_hand(trainer: pl.Trainer) -> None:
    """Refuse settings that do not apply to a module that uses manual optimization.

    Raises:
        ConfigError: the trainer is to clip its gradients, or each rank's share of a global batch is split into several
            micro batches, each of which the module would treat as a full step.
    """
    module = trainer.lightning_module
    if module.automatic_optimization:
        return
    by_hand = f"{type(module).__name__} optimizes by hand (automatic_optimization is False)"
    if trainer.gradient_clip_val:
        name = "value" if trainer.gradient_clip_algorithm == "value" else "norm"
        raise ConfigError(
            f"trainer.gradient_clip_{name} is {trainer.gradient_clip_val}, but {by_hand}",
            hint="clip in training_step, by self.clip_gradients(optimizer, gradient_clip_val=...,"
            f' gradient_clip_algorithm="{name}"), and leave the setting out',
        )
    if trainer.accumulate_grad_batches == 1:
        return
    data: Any = getattr(trainer, "datamodule", None)
    plan = getattr(data, "plan", None)
    size = plan.rank_batch_size if plan is not None else None
    raise ConfigError(
        f"{by_hand}, and a step has {trainer.accumulate_grad_batches} micro batches a rank, each of which its"
        " training_step would make a step of",
        hint=f"set micro_batch_size to {size or 'global_batch_size / ranks'}, what each of {data_ranks(trainer).size}"
        " rank(s) takes of a global batch",
    )


@contextmanager
def in_our_words() -> Iterator[None]:
    """Reword Lightning and PyTorch errors that suggest their own settings, to name disttrain's."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        for matches, what, hint in _WORDS:
            if matches(str(error.args[0] if error.args else "")):
                raise ConfigError(what, hint=hint) from None
        raise


_WORDS: Final[tuple[tuple[Callable[[str], bool], str, str], ...]] = (
    (
        lambda text: _UNUSED in text or "parameters that were not used in producing the loss" in text,
        "some parameters got no gradient in a step, for which DDP waits",
        "freeze them (requires_grad=False) or use them in every step; else set parallel.find_unused_parameters to true,"
        " which also modules need that optimize by hand with several optimizers",
    ),
    (lambda text: '(ckpt_path="best")`' in text, *_NO_BEST),
)


def quieten() -> None:
    """Silence Lightning warnings that do not apply here.

    They concern its own use of a deprecated name, loaders without worker processes (disttrain's use threads), and an
    ``srun`` that is installed but not used.
    """
    for message in (".*LeafSpec", ".*does not have many workers", ".*`srun` command is"):
        warnings.filterwarnings("ignore", message=message)
