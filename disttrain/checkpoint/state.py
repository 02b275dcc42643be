"""From a trainer's state to a checkpoint and back: one format for every strategy and world size.

Lightning gathers the state; here it is split into tensors under their parameter names (model, optimizers)
and the rest (schedules, callbacks, data order, progress in steps), none of it tied to a rank. The mixin gives
a strategy this format for ``trainer.save_checkpoint`` and ``trainer.fit(ckpt_path=...)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from disttrain.checkpoint import store, verify
from disttrain.checkpoint.marker import About
from disttrain.checkpoint.progress import Progress, loop_state, progress_of
from disttrain.checkpoint.saver import SaveRequest
from disttrain.checkpoint.staging import own_part
from disttrain.checkpoint.write import write
from disttrain.errors import CheckpointError
from disttrain.parallel.agree import is_distributed

_SPLIT_OFF = ("state_dict", "optimizer_states", "loops", "epoch", "global_step")


class CheckpointMixin:
    """Saves and loads disttrain's checkpoints; to be mixed into a Lightning strategy, before its base."""

    lightning_module: pl.LightningModule | None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model is wrapped first, then filled."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are filled together with the model."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of the model's tensors, by parameter name. A collective where there are buffers."""
        self.sync_buffers()
        return dict(get_model_state_dict(self._module()))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of an optimizer's state, by parameter name."""
        return dict(get_optimizer_state_dict(self._module(), _bare(optimizer)))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint directory and commit it. A collective.

        With a :class:`~disttrain.checkpoint.saver.SaveRequest` as ``storage_options`` it is written as that says.
        """
        progress = progress_of(self._module().trainer)
        optimizers = checkpoint.get("optimizer_states", [])
        tensors: store.Tensors = {"model": checkpoint["state_dict"]}
        for number, state in enumerate(optimizers):
            if state["state"]:
                tensors[f"optimizer{number}"] = state["state"]
        meta = {
            "progress": progress.as_dict(),
            "param_groups": [state["param_groups"] for state in optimizers],
            "trainer": {key: value for key, value in checkpoint.items() if key not in _SPLIT_OFF},
        }
        path = Path(filepath)
        about = About(progress.global_step, progress.epoch)
        if isinstance(storage_options, SaveRequest):
            storage_options.begin(path, tensors=tensors, meta=meta, about=about)
            return
        write(path.parent, path.name, tensors=own_part(tensors), meta=meta, global_step=about.global_step, about=about)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and, when fitting, optimizers; return the rest in Lightning's form. A collective."""
        path = Path(checkpoint_path)
        verify.ensure(path)
        meta = store.read_meta(path)
        trainer = self._module().trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._fill(path, meta["param_groups"] if fitting else [])
        checkpoint: dict[str, Any] = dict(meta["trainer"])
        if fitting:
            progress = Progress(**meta["progress"])
            checkpoint["loops"] = {"fit_loop": loop_state(trainer, progress)}
            checkpoint |= {"epoch": progress.epoch, "global_step": progress.global_step}
        return checkpoint

    def load_weights(self, path: Path) -> None:
        """Fill the model alone. A collective."""
        verify.ensure(path)
        self._fill(path, [])

    def on_validation_start(self) -> None:
        """Evaluate with the same buffers on all ranks."""
        self.sync_buffers()

    def on_test_start(self) -> None:
        """Evaluate with the same buffers on all ranks."""
        self.sync_buffers()

    def on_predict_start(self) -> None:
        """Predict with the same buffers on all ranks."""
        self.sync_buffers()

    def sync_buffers(self) -> None:
        """Give all ranks rank 0's buffers, such as the running statistics of batch norms. A collective.

        Ranks gather their own in training; what is evaluated and saved must be one model.
        """
        buffers = [buffer for buffer in self._module().buffers() if not isinstance(buffer, DTensor)]
        if is_distributed():
            for buffer in buffers:
                dist.broadcast(buffer, src=0)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do: :meth:`load_checkpoint` has filled the model."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do: :meth:`load_checkpoint` has filled the optimizers."""

    def _fill(self, path: Path, param_groups: list[list[dict[str, Any]]]) -> None:
        module = self._module()
        optimizers = [_bare(optimizer) for optimizer in module.trainer.optimizers] if param_groups else []
        if len(optimizers) != len(param_groups):
            raise CheckpointError(
                f"checkpoint {path} holds {len(param_groups)} optimizers, the module has {len(optimizers)}",
                mend="use the module that the checkpoint was made with",
            )
        for optimizer, groups in zip(optimizers, param_groups, strict=True):
            _compare_groups(path, optimizer, groups)
        weights = get_model_state_dict(module)
        tensors: store.Tensors = {"model": weights}
        for number, optimizer in enumerate(optimizers):
            state = get_optimizer_state_dict(module, optimizer)["state"]
            if state:
                tensors[f"optimizer{number}"] = state
        store.read_tensors(path, tensors)
        set_model_state_dict(module, weights)
        for number, (optimizer, groups) in enumerate(zip(optimizers, param_groups, strict=True)):
            filled: dict[str, Any] = {"state": tensors.get(f"optimizer{number}", {}), "param_groups": groups}
            set_optimizer_state_dict(module, optimizer, filled)

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _compare_groups(path: Path, optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    """Refuse another kind of optimizer; say where the checkpoint's settings win over the configuration's."""
    kind = type(optimizer).__name__
    if len(saved) != len(optimizer.param_groups) or any(
        set(was) != set(now) for was, now in zip(saved, optimizer.param_groups, strict=False)
    ):
        raise CheckpointError(
            f"checkpoint {path} holds the state of an optimizer with other settings or parameter groups than this"
            f" run's {kind}",
            mend="use the optimizer that it was made with, or start over with --resume never",
        )
    # The learning rate moves with the schedule; its peak is kept as `initial_lr`.
    kept = [
        f"{name} {was[name]} (the configuration says {now[name]})"
        for was, now in zip(saved, optimizer.param_groups, strict=True)
        for name in was
        if name not in ("params", "lr") and was[name] != now[name]
    ]
    if kept:
        warnings.warn(f"the checkpoint's optimizer settings are kept: {', '.join(dict.fromkeys(kept))}", stacklevel=2)
