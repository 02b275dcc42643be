"""Trace a run for comparison with others: loss, gradient norm and weights of each step, and random number use.

Written to ``<run_dir>/trace``: ``steps.jsonl`` (loss over the global batch, and the gradient norm seen by the
optimizer), ``weights-000012.pt`` after each step (full parameters and buffers by name), and per rank
``rank-00000.json``: the random number generators used in training that disttrain does not seed. ``about.json``
describes the module for the comparison: batch norms, optimizers, micro batch size, and whether training draws random
numbers. Cost: the weights are gathered and written every step, so use it only for short runs of models that fit into
one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.callbacks.records.step_log import StepLog
from disttrain.data.module import sharded_data
from disttrain.lightning.callback import Callback
from disttrain.lightning.internals import begins_step
from disttrain.parallel.gradients import norm_of
from disttrain.system.files import append_lines, make_folder, to_json, write_atomically
from disttrain.tasks.base import Task

FOLDER = "trace"


class StepTrace(Callback):
    """Writes the trace of a run.

    Args:
        stop_at: end the run after this step, or after a later one that it resumes from, without changing the schedule;
            -1 to let it end by itself.
        kill_at: kill rank 0, and with it the run, before this step, once; -1 for never.
    """

    def __init__(self, stop_at: int = -1, kill_at: int = -1) -> None:
        self._stop_at, self._kill_at = stop_at, kill_at
        self.step_log: StepLog | None = None
        """The log with the loss of a task's step; set by the Trainer."""
        self._folder = Path()
        self._drawn: set[str] = set()
        self._before: dict[str, str] = {}
        self._loss: Tensor | None = None
        self._about: dict[str, Any] = {}
        self._keyed = b""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the weights that the run starts from."""
        self._folder = Path(trainer.default_root_dir) / FOLDER
        self._loss = None  # drop that of a step that an earlier attempt left unfinished
        make_folder(self._folder)
        self._write_weights(trainer, pl_module)
        if trainer.is_global_zero:
            norms = [name for name, m in pl_module.named_modules() if isinstance(m, _BatchNorm)]
            data = sharded_data(trainer)
            self._about = {
                "batch_norms": norms,
                # A task that overrides training_step does not have the base class's gradient.
                "is_task": isinstance(pl_module, Task) and type(pl_module).training_step is Task.training_step,
                "micro_batch_size": None if data is None else data.micro_batch_size,
                "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
                "draws": False,
            }
            self._write_about()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the generators' states before a micro batch; kill the process if requested."""
        marker = self._folder / "killed"
        dies = trainer.global_step == self._kill_at and begins_step(trainer) and trainer.is_global_zero
        if dies and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self._before = _generators(pl_module)
        self._keyed = _keyed_state(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the generators' states after a micro batch, and add its loss."""
        after = _generators(pl_module)
        fresh = {name for name, state in after.items() if self._before.get(name) not in (None, state)} - self._drawn
        if fresh:
            self._drawn |= fresh
            path = self._folder / f"rank-{trainer.global_rank:05d}.json"
            write_atomically(path, json.dumps(sorted(self._drawn)))
        if self._about and not self._about["draws"] and _keyed_state(pl_module.device) != self._keyed:
            self._about["draws"] = True
            self._write_about()
        if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            loss = outputs["loss"].detach().double()
            self._loss = loss if self._loss is None else self._loss + loss

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a step."""
        norm = norm_of(trainer.strategy)(pl_module.parameters())
        line = {"step": trainer.global_step, "loss": self._step_loss(trainer, pl_module), "grad_norm": float(norm)}
        self._write_weights(trainer, pl_module)
        if trainer.is_global_zero:
            append_lines(self._folder / "steps.jsonl", to_json(line) + "\n")
        if 0 < self._stop_at <= trainer.global_step:
            trainer.should_stop = True  # on all ranks at the same step

    def _write_about(self) -> None:
        write_atomically(self._folder / "about.json", to_json(self._about))

    def _step_loss(self, trainer: pl.Trainer, module: pl.LightningModule) -> float:
        """Return the loss of a step over all ranks; if the module is not a task, the mean over its micro batches."""
        local, self._loss = self._loss, None
        if isinstance(module, Task) and self.step_log is not None:
            return self.step_log.latest.get("train/loss", float("nan"))
        if local is None:
            return float("nan")
        return float(trainer.strategy.reduce(local, reduce_op="mean"))

    def _write_weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Gather and write parameters and buffers. Collective if they are sharded."""
        weights = {name: _whole(parameter) for name, parameter in module.named_parameters()}
        buffers = {f"buffer {name}": _whole(buffer) for name, buffer in module.named_buffers()}
        if trainer.is_global_zero:
            path = self._folder / f"weights-{trainer.global_step:06d}.pt"
            torch.save(weights | buffers, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def _keyed_state(device: torch.device) -> bytes:
    """Return the state of the generators that are seeded before every micro batch."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def _generators(module: pl.LightningModule) -> dict[str, str]:
    """Return hashes of the states of the generators that disttrain does not seed, by name."""
    states: dict[str, bytes] = {
        "Python's random": pickle.dumps(random.getstate()),
        "numpy.random": pickle.dumps(np.random.get_state()),
    }
    for name, inner in module.named_modules():
        for attribute, value in vars(inner).items():
            if isinstance(value, torch.Generator):
                states[f"the torch.Generator {'.'.join(filter(None, (name, attribute)))}"] = bytes(
                    value.get_state().tolist()
                )
            elif isinstance(value, np.random.Generator):
                state = value.bit_generator.state
                states[f"the numpy Generator {'.'.join(filter(None, (name, attribute)))}"] = repr(state).encode()
    return {name: hashlib.blake2b(state, digest_size=8).hexdigest() for name, state in states.items()}
