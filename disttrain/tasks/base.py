"""The base task: the same gradient and metrics however a global batch is divided.

A subclass defines :meth:`Task.forward`, :meth:`Task.losses` (one unreduced loss per sample or token) and its metrics,
without any code for ranks. The base class guarantees:

- A step's gradient is that of ``sum(w_i * loss_i) / sum(w_i)`` over the *global* batch. Micro batches add weighted
  sums, the weights are gathered from the ranks once per step during the backward pass, and one division follows.
  Averaging the micro batches' means would give a different gradient whenever their weights differ.
- An evaluation metric counts every sample once. Padding has weight 0 and is removed before the metrics see it, and
  every rank runs the same number of forward passes.

Cost: per step, one gather of two numbers per micro batch and one pass over the gradients; no device synchronization.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from disttrain.checkpoint.format.export import refuse_folder
from disttrain.data.decode.allowed_values import Allowed, check_names
from disttrain.data.loader.batches import COUNT, KEY, WEIGHT, Batch, check_batch
from disttrain.data.loader.padding import Rows, real_rows
from disttrain.data.module import sharded_data
from disttrain.distributed.collectives import all_gather_single
from disttrain.distributed.synchronize_errors import gather
from disttrain.errors import ConfigError, DataError, nearest
from disttrain.lightning.internals import ends_step
from disttrain.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule, fit_warmup
from disttrain.parallel.gradients import (
    adds_in_tree,
    clip_gradient_norm,
    clip_gradient_value,
    norm_of,
    scale_gradients,
)
from disttrain.parallel.model.trained_parameters import class_name
from disttrain.parallel.ranks import data_ranks
from disttrain.system.stack_summary import waiting_for
from disttrain.system.terminal import tell
from disttrain.tasks.metrics import WeightedMean

LOSS = "loss"


class Task(pl.LightningModule):
    """A LightningModule whose gradient and metrics do not depend on the run's layout.

    Args:
        optimizer: the optimizer; alternatively, override :meth:`configure_optimizers`.
        schedule: the learning-rate schedule.
    """

    def __init__(self, *, optimizer: OptimizerConfig | None = None, schedule: ScheduleConfig | None = None) -> None:
        super().__init__()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule_config = schedule or ScheduleConfig()
        self.evaluation = nn.ModuleDict()  # metrics by split, created when a split is first evaluated
        self.grad_norm: Tensor | None = None
        """Norm of the last step's gradient before clipping, if computed. float64 scalar."""
        self.judge: Callable[[Optimizer, Tensor, Tensor], None] | None = None
        """Called before each optimizer step with the loss over the global batch and the gradient norm (float64
        scalars)."""
        self.last_evaluation: dict[str, float] = {}
        """Metrics of the last validation or test, by logged name."""
        self._step_sums: list[Tensor] = []  # [sum of weighted losses, sum of weights] of this step's micro batches
        self._all_sums: Tensor | None = None  # the same for all ranks, in rank order
        self.train_sums: Tensor | None = None
        """Sum of weighted losses and sum of weights, over all ranks and the steps since the last log line. float64,
        shape (2,); None before the first step. Saved in checkpoints."""
        self._step_loss: Tensor | None = None
        self._pending: dist.Work | None = None
        self._nominal = 0.0  # not known yet

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load one of Lightning's checkpoint files; disttrain's checkpoints are folders and are rejected."""
        refuse_folder(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    # To be defined by subclasses.

    def forward(self, batch: Batch) -> Any:
        """Return the model's outputs for a micro batch."""
        raise NotImplementedError(f"{class_name(self)} must define forward(batch)")

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return unreduced losses, shape (samples,) or (samples, tokens)."""
        raise NotImplementedError(f"{class_name(self)} must define losses(outputs, batch)")

    def loss_weights(self, batch: Batch) -> Tensor | None:
        """Return loss weights, in the losses' shape or (samples,); None means equal weights.

        Padding is masked in addition.
        """
        return None

    def allowed_values(self) -> Mapping[str, Allowed]:
        """Return the values allowed in each field in training and evaluation, by field name; by default all.

        A sample with another value is a bad sample: an error names its shard and key, or it is skipped
        (``data.on_bad_sample``). ``{"label": disttrain.data.decode.allowed_values.classes(10)}`` allows the integers
        from 0 to 9.
        """
        return {}

    def build_metrics(self) -> Mapping[str, Metric]:
        """Return evaluation metrics by logged name; the loss is added automatically."""
        return {}

    def update_metrics(self, metrics: Mapping[str, Metric], outputs: Any, batch: Batch) -> None:
        """Update the metrics with real samples; padding has been removed."""

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        """Return what ``disttrain predict`` writes: by name, a sequence with one value per sample."""
        return {"output": outputs}

    # Training: law 3.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a micro batch's weighted loss sum, scaled so that the reduced gradient is a fixed multiple of it."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_sums.clear()  # an attempt interrupted within a step leaves some
        outputs = self(check_batch(batch, self))
        total, weight = self._weighted(outputs, batch)
        self._nominal = self._nominal_weight(batch)
        self._step_sums.append(torch.stack((total.detach().double(), weight.double())))
        if ends_step(self.trainer):
            self._gather_sums()
        # Undo Lightning's division by the accumulation and the strategy's by the ranks. Dividing by a nominal weight
        # keeps gradients at about the scale of a mean until the true weight is known.
        return total * (self.trainer.accumulate_grad_batches * data_ranks(self.trainer).size / self._nominal)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the summed gradient by the global batch's weight."""
        assert self._all_sums is not None
        if self._pending is not None:
            with waiting_for("the gathering of the step's loss"):
                self._pending.wait()
            self._pending = None
        # Summing all micro batches in one fixed order gives the same bits whichever ranks ran them.
        sums, self._all_sums = self._all_sums.sum(dim=0), None
        weight = sums[1]
        # If all weights of a step are zero, the gradient is zero; 0/0 would turn the weights into NaN.
        factor = torch.where(weight > 0, self._nominal / weight.clamp(min=1e-30), torch.zeros_like(weight))
        scale_gradients(self.parameters(), factor)
        self.train_sums = sums if self.train_sums is None else self.train_sums + sums
        self._step_loss = sums[0] / torch.where(weight > 0, weight, 1.0)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the whole gradient under every strategy, and keep its norm before clipping for the log."""
        bound, ordered = float(gradient_clip_val or 0), adds_in_tree(self.trainer.strategy)
        if bound and gradient_clip_algorithm == "value":
            self.grad_norm = clip_gradient_value(self.parameters(), bound, ordered=ordered)
        elif bound:
            self.grad_norm = clip_gradient_norm(self.parameters(), bound, ordered=ordered)
        elif self.judge is not None:
            self.grad_norm = norm_of(self.trainer.strategy)(self.parameters())
        if self.judge is not None and self._step_loss is not None and self.grad_norm is not None:
            self.judge(optimizer, self._step_loss, self.grad_norm)

    def take_train_loss(self) -> Tensor | None:
        """Return the mean loss since the last call, the same on all ranks, and reset it. float64 scalar."""
        if self.train_sums is None:
            return None
        loss = self.train_sums[0] / self.train_sums[1]
        self.train_sums = None
        return loss

    def configure_optimizers(self) -> Any:
        """Build the configured optimizer and its schedule, which steps once per optimizer step."""
        optimizer = build_optimizer(self, self.optimizer_config)
        steps, config = run_steps(self.trainer) or 0, self.schedule_config
        fitted = fit_warmup(config, steps)
        if fitted != config and self.trainer.is_global_zero:
            text = f"the run has {steps} steps, but schedule.warmup_steps is {config.warmup_steps}"
            tell(f"{text}: the warm-up is shortened to {fitted.warmup_steps}")
        schedule = build_schedule(optimizer, fitted, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Evaluation: law 4.

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a micro batch to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a micro batch to the test metrics."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return predictions for the real samples of a micro batch, with their keys."""
        outputs, batch = self._real(self(check_batch(batch, self)), batch)
        found = self.predict(outputs, batch)
        check_names(found, where=f"what {class_name(self)}.predict() returns")
        return {KEY: batch[KEY], **found}

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Reset the test metrics."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; the values are the same on all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics; the values are the same on all ranks."""
        self._log_evaluation("test")

    # Implementation.

    def _weighted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a micro batch's sum of weighted losses and sum of weights, as scalars.

        Raises:
            ConfigError: there is not one loss per sample, or the weights do not match the losses.
        """
        size, losses = batch[WEIGHT].shape[0], self.losses(outputs, batch)
        self._check_losses(losses, size)
        losses = losses if losses.dtype.itemsize >= 4 else losses.float()  # a sum in half precision may overflow
        weights = _like(batch[WEIGHT], losses)
        own = self.loss_weights(batch)
        if own is not None:
            self._check_weights(own, losses)
            weights = weights * _like(own, losses)
        # Padding may hold any value, and NaN times 0 is still NaN, so multiplying by the mask is not enough.
        return torch.where(weights != 0, losses * weights, 0.0).sum(), weights.sum()

    def _check_losses(self, losses: Any, size: int) -> None:
        if isinstance(losses, Tensor) and losses.ndim and losses.shape[0] == size:
            return
        raise ConfigError(
            f"{class_name(self)}.losses() returned {_shape(losses)}, for a micro batch of {size} samples; expected"
            f" one loss per sample, shape ({size},), or one per token, shape ({size}, tokens)",
            hint="return unreduced losses (reduction='none'), not averaged, summed or flattened; the task"
            " weights, masks and averages them over the global batch",
        )

    def _check_weights(self, weights: Any, losses: Tensor) -> None:
        if isinstance(weights, Tensor) and weights.ndim <= losses.ndim:
            fits = (own in (1, wanted) for own, wanted in zip(weights.shape, losses.shape, strict=False))
            if all(fits):
                return
        raise ConfigError(
            f"{class_name(self)}.loss_weights() returned {_shape(weights)}, but losses() {_shape(losses)}",
            hint=f"return weights of shape ({losses.shape[0]},), one per sample, or of the losses' shape, or None",
        )

    def _nominal_weight(self, batch: Batch) -> float:
        """Return the approximate weight of a global batch: its size, the same for all ranks and micro batches.

        Collective in the first step of a run, if the loader is not disttrain's.
        """
        data = sharded_data(self.trainer)
        if data is not None and data.plan is not None:
            return float(data.global_batch_size)
        if self._nominal:
            return self._nominal  # any number works as long as it does not change
        largest = max(gather(int(batch[WEIGHT].shape[0])))
        return float(largest * self.trainer.accumulate_grad_batches * data_ranks(self.trainer).size)

    def _gather_sums(self) -> None:
        """Start gathering this step's losses and weights from all ranks, during the backward pass."""
        own = gathered = torch.stack(self._step_sums)
        ranks = data_ranks(self.trainer)
        if ranks.size > 1:
            gathered = own.new_empty(own.shape[0] * ranks.size, 2)
            self._pending = all_gather_single(gathered, own, group=ranks.group, async_op=True)
        self._all_sums = gathered
        self._step_sums.clear()

    def _reset(self, split: str) -> None:
        if split not in self.evaluation:
            own = self.build_metrics()
            if LOSS in own:
                raise ConfigError(
                    f"{class_name(self)}.build_metrics() has a metric {LOSS!r}, a name reserved for losses()",
                    hint="give it another name",
                )
            metrics = {LOSS: WeightedMean(), **own}
            self.evaluation[split] = nn.ModuleDict(metrics).to(self.device)
        group = data_ranks(self.trainer).group
        for metric in self._metrics(split).values():
            metric.reset()
            for inner in metric.modules():
                if isinstance(inner, Metric) and group is not None:
                    inner.process_group = group

    def _metrics(self, split: str) -> dict[str, Metric]:
        group = self.evaluation[split]
        assert isinstance(group, nn.ModuleDict)
        return {name: metric for name, metric in group.items() if isinstance(metric, Metric)}

    def _evaluate(self, split: str, batch: Batch) -> None:
        outputs = self(check_batch(batch, self))
        if batch[COUNT] == 0:
            return  # only padding: the forward pass ran for the other ranks' collectives
        outputs, batch = self._real(outputs, batch)
        total, weight = self._weighted(outputs, batch)
        metrics = self._metrics(split)
        metrics[LOSS].update(total.double(), weight.double())
        self.update_metrics({name: m for name, m in metrics.items() if name != LOSS}, outputs, batch)

    def _real(self, outputs: Any, batch: Batch) -> tuple[Any, Batch]:
        """Return outputs and batch without trailing padding; the count is on the host, so nothing synchronizes."""
        rows = Rows(batch[WEIGHT].shape[0], batch[COUNT])
        return (outputs, batch) if rows.real == rows.size else (real_rows(outputs, rows), real_rows(batch, rows))

    def _log_evaluation(self, split: str) -> None:
        self.last_evaluation = {}
        for name, metric in self._metrics(split).items():
            with warnings.catch_warnings():
                # torchmetrics warns if update() was not called: on a rank with only padding, which is fine, since
                # compute() reduces the states of all ranks.
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
                value = metric.compute()
            # The values are equal on all ranks, so a maximum leaves them bit-identical (a mean could round).
            # logger=False: Lightning would log them one step too early; StepLog logs them at the right step.
            self.log(f"{split}/{name}", value, sync_dist=True, reduce_fx="max", logger=False)
            self.last_evaluation[f"{split}/{name}"] = float(value)


def tensor_field(batch: Batch, name: str) -> Tensor:
    """Return a field of a batch that must be a tensor.

    Raises:
        DataError: the batch lacks it, or its decoder returned something else.
    """
    if name not in batch:
        fields = [field for field in batch if not field.startswith("__")]
        raise DataError(
            f"the batch has no field {name!r}", hint=f"correct the task's field or data.fields; {nearest(name, fields)}"
        )
    value = batch[name]
    if not isinstance(value, Tensor):
        raise DataError(
            f"field {name!r} is a {type(value).__name__}, not a tensor: its values are not numbers of one shape",
            hint=f"declare another decoder for data.fields.{name}",
        )
    return value


def run_steps(trainer: pl.Trainer) -> int | None:
    """Return a run's total optimizer steps; None if it has no limit or the epoch length is unknown."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    loaded = sharded_data(trainer)
    if loaded is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * loaded.steps_per_epoch)
    return min(limits) if limits else None


def _like(weights: Tensor, losses: Tensor) -> Tensor:
    """Broadcast weights to the losses: shape (samples,) becomes the losses' shape."""
    if weights.ndim < losses.ndim:
        weights = weights.reshape(weights.shape + (1,) * (losses.ndim - weights.ndim)).expand_as(losses)
    return weights.to(losses.dtype)


def _shape(value: Any) -> str:
    """Describe a value for an error message."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}" if value.ndim else "a single number, shape ()"
