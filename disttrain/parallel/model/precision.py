"""``16-mixed`` for replicated and sharded gradients: all ranks share one loss scale and skip the same steps.

Gradients are unscaled before weighting and clipping, even with fused optimizers (Lightning leaves unscaling to those,
so hooks see scaled gradients and clipping raises). If gradients are sharded, an infinity on one rank counts on all:
they skip the step and halve the scale together. The scale is saved in checkpoints. Cost: one max-all-reduce of one
number per step if gradients are sharded; with a fused optimizer, nothing synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from disttrain.distributed.synchronize_errors import is_distributed
from disttrain.errors import ConfigError
from disttrain.lightning.bases import PrecisionBase
from disttrain.optim import can_skip_on_device
from disttrain.parallel.config import ReduceTypeName
from disttrain.parallel.gradients import local_gradients


class ShardedScaler(torch.amp.GradScaler):
    """A loss scaler that supports sharded gradients."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in local_gradients(parameters):
            kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        found: dict[torch.device, Tensor] = {}
        for (device, _), gradients in kinds.items():
            found.setdefault(device, found_inf.to(device, copy=True))
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found[device], inv_scale.to(device))
        sharded = any(isinstance(p.grad, DTensor) for p in parameters)
        if sharded and is_distributed():
            for flag in found.values():
                dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return found


class ScaledPrecision(PrecisionBase):
    """Lightning's ``16-mixed``, but always unscales first, whatever the optimizer.

    Args:
        device: device type.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device, ShardedScaler(device))

    def teardown(self) -> None:
        """Drop the state of an interrupted step: the scaler keys it by the id of an optimizer that may be gone."""
        super().teardown()
        scale = self.scaler.state_dict()
        self.scaler = ShardedScaler(self.device)
        if scale:  # empty if the scaler is disabled on this device
            self.scaler.load_state_dict(scale)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizable, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the backward passes, unscale, weight and clip the gradients, and step unless there is an infinity."""
        result = closure()
        if result is None and model.automatic_optimization:
            self.before_step(model, optimizer)
            return result
        self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        self.before_step(model, optimizer)
        assert isinstance(optimizer, Optimizer)
        out = None
        if can_skip_on_device(optimizer) or not self._found_infinity(optimizer):
            out = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return out

    def _found_infinity(self, optimizer: Optimizer) -> bool:
        """Return whether unscaling found an infinity, as ``GradScaler`` does for non-fused optimizers. Synchronizes."""
        return any(bool(found) for found in self.scaler._found_inf_per_device(optimizer).values())

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip gradients, which are already unscaled; Lightning raises an error here for fused optimizers."""
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


def shard_policy(precision: str, reduce_dtype: ReduceTypeName) -> MixedPrecisionPolicy:
    """Return FSDP's policy: reduce in float32 for ``bf16-true`` with ``reduce_dtype: fp32``, else as the gradients."""
    wide = precision == "bf16-true" and reduce_dtype == "fp32"
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if wide else None)


def use_tensor_cores(allowed: bool) -> None:
    """Allow or forbid TF32 (inputs rounded to 10-bit mantissas) in float32 matrix products, process-wide."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def device_kind(accelerator: str) -> str:
    """Return the device type for ``trainer.accelerator``: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: CUDA is requested but not available.
    """
    available = torch.cuda.is_available()
    if accelerator == "cuda" and not available:
        raise ConfigError("trainer.accelerator is cuda, but PyTorch sees no CUDA device", hint="use auto or cpu")
    return "cuda" if accelerator != "cpu" and available else "cpu"


def check_precision(precision: str, device: str) -> None:
    """Reject a precision that the device does not support.

    Raises:
        ConfigError: the device does not support it.
    """
    if precision == "16-mixed" and device == "cpu":
        raise ConfigError(
            "trainer.precision is 16-mixed, which needs a CUDA device", hint="use bf16-mixed or 32-true on the CPU"
        )
    if "bf16" in precision and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"trainer.precision is {precision}, which {torch.cuda.get_device_name()} cannot do",
            hint="use 16-mixed or 32-true",
        )
