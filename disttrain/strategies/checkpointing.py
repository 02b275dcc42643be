"""Save and load a trainer's state in one checkpoint format for every strategy and world size.

Lightning collects the state. Here it is split into tensors under their parameter names (model, optimizers) and the rest
(schedules, callbacks, data order, progress in steps), none of it tied to a rank. The mixin gives a strategy this format
for ``trainer.save_checkpoint`` and ``trainer.fit(ckpt_path=...)``. Callbacks may add tensors
(:mod:`disttrain.checkpoint.format.groups`), which may replace the weights in evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer

from disttrain.checkpoint.format import reader, verification
from disttrain.checkpoint.format.contents import check_hooks, check_tensors, plain_contents, savers, split_off_extra
from disttrain.checkpoint.format.groups import TensorGroup, freeze_as_saved, parameters_by_name
from disttrain.checkpoint.format.marker import About
from disttrain.checkpoint.format.optimizer_state import (
    Filling,
    agreed_groups,
    named_state,
    restore_groups,
    split,
    with_first_names,
)
from disttrain.checkpoint.format.writer import write
from disttrain.checkpoint.saving.saver import SaveRequest
from disttrain.checkpoint.saving.staging import own_part
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.errors import CheckpointError
from disttrain.lightning.internals import checkpoint_of
from disttrain.lightning.position import Progress, loop_state, plateau_state, progress_of, restore_plateaus
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.model.module_tensors import broadcast_tensors
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.optimizers import check_optimizers

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

_SPLIT_OFF = ("state_dict", "optimizer_states", "loops", "epoch", "global_step")


class CheckpointMixin(_Base):
    """Saves and loads disttrain's checkpoints; list it before the base in a Lightning strategy."""

    lightning_module: pl.LightningModule | None
    config: ParallelConfig
    _given: dict[str, Any] | None = None
    """The weights in the checkpoint being saved, before hooks can change them."""
    _loaded: dict[str, Any] | None = None
    """The same for the checkpoint being loaded."""
    _rehearsing = False
    evaluated_group: str | None = None
    """The group whose tensors replaced parameters when weights were last loaded for evaluation."""

    @cached_property
    def tensor_groups(self) -> dict[str, TensorGroup]:
        """Additional tensors to save, by their name in the checkpoint; callbacks add theirs in ``setup``."""
        return {}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: the model is wrapped before its weights are loaded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: optimizer state is loaded together with the model."""
        return False

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Set up the optimizers; reject state that a checkpoint cannot hold, now and after their first step."""
        super().setup_optimizers(trainer)
        check_optimizers(
            [_bare(optimizer) for optimizer in self.optimizers],
            self._module(),
            self.config,
            ranks=self.world_size,
            accumulation=trainer.accumulate_grad_batches,
        )
        for number, optimizer in enumerate(self.optimizers):
            self._check(number, optimizer)
            due = [number]

            def check_once(stepped: Any, *_: Any, due: list[int] = due) -> None:
                # Most optimizers create their state in the first step. PyTorch is iterating over the hooks now, so this
                # one cannot remove itself and clears `due` instead.
                if due:
                    self._check(due.pop(), stepped)

            optimizer.register_step_post_hook(check_once)

    def _check(self, number: int, optimizer: Optimizer) -> None:
        split(self.optimizer_state(optimizer), f"optimizer {number} ({type(_bare(optimizer)).__name__})")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the model's tensors, by parameter name. Collective if there are buffers."""
        if not self._rehearsing:
            self.sync_buffers()
        self._given = dict(get_model_state_dict(self._module()))
        return dict(self._given)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this rank's part of an optimizer's state, by parameter name, without copying or stepping."""
        return named_state(_bare(optimizer), self._module())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint directory and commit it. Collective.

        If ``storage_options`` is a :class:`~disttrain.checkpoint.saving.saver.SaveRequest`, the request writes it.
        """
        with raise_together():
            tensors, meta = self._contents(checkpoint)
        path = Path(filepath)
        about = About(meta["progress"]["global_step"], meta["progress"]["epoch"])
        with ExitStack() as stack:
            # A checkpoint may be saved during an evaluation, when the parameters hold averaged weights. The tensors
            # collected above share memory with the parameters, so swap the training weights back before writing.
            for group in self.tensor_groups.values():
                stack.enter_context(group.training_weights())
            if isinstance(storage_options, SaveRequest):
                storage_options.begin(path, tensors=tensors, meta=meta, about=about)
                return
            own = own_part(tensors)
            write(path.parent, path.name, tensors=own, meta=meta, global_step=about.global_step, about=about)

    def rehearse(self) -> dict[str, Any]:
        """Collect what a save would, without copying, writing or synchronizing; pass it to :meth:`examine`."""
        self._rehearsing = True
        try:
            return checkpoint_of(self._module().trainer)
        finally:
            self._rehearsing = False

    def examine(self, checkpoint: dict[str, Any]) -> None:
        """Check what :meth:`rehearse` has collected.

        Raises:
            CheckpointError: something cannot be saved, or a hook would make the checkpoint impossible to resume.
        """
        tensors, _ = self._contents(checkpoint)
        check_tensors(tensors)

    def _contents(self, checkpoint: dict[str, Any]) -> tuple[reader.Tensors, dict[str, Any]]:
        """Split what Lightning has collected into tensors and the rest."""
        module = self._module()
        given, self._given = self._given, None
        if given is not None:
            suspects = savers(module, module.trainer.callbacks)  # type: ignore[attr-defined]
            check_hooks(given, checkpoint["state_dict"], partly=not module.strict_loading, suspects=suspects)
        progress = progress_of(module.trainer)
        model, extra = split_off_extra(checkpoint["state_dict"])
        tensors: reader.Tensors = {"model": model}
        optimizers = []
        for number, state in enumerate(checkpoint.get("optimizer_states", [])):
            own, plain = split(state, f"optimizer {number} ({self._kind_of(number)})")
            if own:
                tensors[f"optimizer{number}"] = own
            optimizers.append(plain)
        groups: dict[str, dict[str, Any]] = {}
        for name, group in self.tensor_groups.items():
            held = group.tensors()
            if held:
                tensors[name] = held
                groups[name] = {"evaluated": group.evaluated, "names": list(held), "state": group.state()}
        meta = {
            "tensor_groups": groups,
            "progress": progress.as_dict(),
            "param_groups": [plain["param_groups"] for plain in optimizers],
            "optimizer_entries": [plain["entries"] for plain in optimizers],
            "extra_state": extra,
            "plateaus": plateau_state(module.trainer),
            "frozen": [name for name, parameter in parameters_by_name(module) if not parameter.requires_grad],
            "trainer": plain_contents({key: value for key, value in checkpoint.items() if key not in _SPLIT_OFF}),
        }
        return tensors, meta

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the model and, when fitting, optimizers; return the rest in Lightning's format. Collective.

        For evaluation and prediction, load the weights that the run itself evaluated (which may be averaged).
        """
        path = Path(checkpoint_path)
        verification.ensure(path)
        meta = reader.read_meta(path)
        trainer = self._module().trainer
        checkpoint: dict[str, Any] = dict(meta["trainer"])
        if trainer.state.fn == TrainerFn.FITTING:
            self._fill(path, meta)
            progress = Progress(**meta["progress"])
            checkpoint["loops"] = {"fit_loop": loop_state(trainer, progress)}
            restore_plateaus(trainer, meta.get("plateaus", {}), progress)
            checkpoint |= {"epoch": progress.epoch, "global_step": progress.global_step}
        else:
            self._fill_to_evaluate(path, meta)
        # Modules may read the state_dict in on_load_checkpoint(): pass the live weights, not copies.
        self._loaded = dict(get_model_state_dict(self._module()))
        checkpoint["state_dict"] = dict(self._loaded)
        return checkpoint

    def load_weights(self, path: Path) -> None:
        """Load only the model, with the weights that the run evaluated. Collective."""
        verification.ensure(path)
        self._fill_to_evaluate(path, reader.read_meta(path))

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
        """Broadcast rank 0's buffers, such as the running statistics of batch norms. Collective.

        They diverge between ranks in training, but all ranks must evaluate and save the same model.
        """
        broadcast_tensors(self._module().buffers())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load nothing, since :meth:`load_checkpoint` has loaded the model; check that hooks changed no weights.

        Raises:
            CheckpointError: ``on_load_checkpoint()`` of the module has replaced weights.
        """
        loaded, self._loaded = self._loaded or {}, None
        now = checkpoint.get("state_dict", {})
        tensors = [name for name, value in {**loaded, **now}.items() if isinstance(value, Tensor)]
        if changed := [name for name in tensors if loaded.get(name) is not now.get(name)]:
            raise CheckpointError(
                f"on_load_checkpoint() of {class_name(self._module())} changes {changed[0]} of the checkpoint's"
                " state_dict, whose weights have been loaded by then",
                hint="change the weights in place there, or convert a checkpoint's (disttrain checkpoints export) and"
                " begin a new run with --initialize_from",
            )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: :meth:`load_checkpoint` has loaded the optimizers."""

    def _fill(self, path: Path, meta: dict[str, Any]) -> None:
        """Load the model, optimizers and additional tensors."""
        module, param_groups = self._module(), meta["param_groups"]
        optimizers = [_bare(optimizer) for optimizer in module.trainer.optimizers] if param_groups else []
        if len(optimizers) != len(param_groups):
            raise CheckpointError(
                f"checkpoint {path} holds {len(param_groups)} optimizers, the module has {len(optimizers)}",
                hint="use the module that the checkpoint was made with",
            )
        index = reader.read_index(path)
        weights, tensors = self._weights(path, meta, index)
        if "frozen" in meta:  # absent in older checkpoints
            freeze_as_saved(module, meta["frozen"])
        fillings = []
        for number, (optimizer, saved_groups) in enumerate(zip(optimizers, param_groups, strict=True)):
            groups = with_first_names(module, saved_groups)
            restore_groups(optimizer, module, groups)
            now = named_state(optimizer, module)["param_groups"]
            prefix = f"optimizer{number}."
            filling = Filling(
                optimizer,
                module,
                index={name.removeprefix(prefix): entry for name, entry in index.items() if name.startswith(prefix)},
                kept={name[len("model.") :]: dtype for name, (_, dtype) in index.items() if name.startswith("model.")},
                entries=meta["optimizer_entries"][number] if "optimizer_entries" in meta else (),
                groups=agreed_groups(path, type(optimizer).__name__, groups, now),
            )
            tensors |= {prefix[:-1]: filling.tensors} if filling.tensors else {}
            fillings.append(filling)
        saved = meta.get("tensor_groups", {})  # absent in older checkpoints
        for name, group in self.tensor_groups.items():
            names = set(saved.get(name, {}).get("names", ()))
            held = {key: tensor for key, tensor in group.tensors().items() if key in names}
            if held:
                tensors[name] = held
        reader.read_tensors(path, tensors)
        set_model_state_dict(module, weights)
        for filling in fillings:
            filling.finish()
        for name, group in self.tensor_groups.items():
            group.resume(set(tensors.get(name, ())), saved.get(name, {}).get("state", {}))
        for name in saved.keys() - self.tensor_groups.keys():
            warnings.warn(
                f"the tensors {name!r} of checkpoint {path} are left out: no callback of this run keeps them",
                stacklevel=2,
            )

    def _fill_to_evaluate(self, path: Path, meta: dict[str, Any]) -> None:
        """Load the model, with parameters from the tensor group to evaluate, if any."""
        module, saved = self._module(), meta.get("tensor_groups", {})
        weights, into = self._weights(path, meta, reader.read_index(path))
        self.evaluated_group = None
        for name, about in saved.items():
            group = self.tensor_groups.get(name)
            if group.evaluated if group is not None else about["evaluated"]:
                self.evaluated_group = name
                into = _in_place_of_parameters(module, into["model"], name, about["names"])
                break
        reader.read_tensors(path, into)
        set_model_state_dict(module, weights)
        for name, group in self.tensor_groups.items():
            group.replaced(name in saved)

    def _weights(self, path: Path, meta: dict[str, Any], index: reader.Index) -> tuple[dict[str, Any], reader.Tensors]:
        """Return the model's state dict, with extra state from the checkpoint, and the tensors to read into it."""
        weights = dict(get_model_state_dict(self._module()))
        read, extra = split_off_extra(weights)
        if not self._module().strict_loading:  # the module fills what its hook kept out of the checkpoint
            read = {name: tensor for name, tensor in read.items() if f"model.{name}" in index}
        saved = meta.get("extra_state", {})  # older checkpoints store extra state as tensors
        for name in extra:
            if name in saved:
                weights[name] = saved[name]
            elif f"model.{name}" in index:
                shape, dtype = index[f"model.{name}"]
                weights[name] = read[name] = torch.empty(shape, dtype=dtype)
            elif self._module().strict_loading:  # otherwise a hook has kept it out
                raise CheckpointError(
                    f"checkpoint {path} has no {name}, which get_extra_state() of the model gives now",
                    hint="use the model that the checkpoint was made with",
                )
        return weights, {"model": read}

    def _kind_of(self, number: int) -> str:
        return type(_bare(self._module().trainer.optimizers[number])).__name__

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _in_place_of_parameters(
    module: pl.LightningModule, weights: dict[str, Any], group: str, names: list[str]
) -> reader.Tensors:
    """Return what to read: the group's tensors into the parameters they replace, the rest from the model's."""
    named = dict(parameters_by_name(module))
    # A tied parameter has one tensor in the group; reading the model's tensor for its other names would overwrite it.
    taken = {id(named[name]) for name in names if name in named}
    rest = {name: tensor for name, tensor in weights.items() if id(named.get(name)) not in taken}
    return {"model": rest, group: {name: weights[name] for name in names if name in weights}}
