"""``16-mixed`` for whole and sharded gradients: one loss scale, and one decision to skip a step, for all ranks.

Gradients are unscaled before anything looks at them, so that weighting and clipping see their true size, with fused
optimizers too (Lightning leaves unscaling to those, and then clips scaled gradients). Where gradients are sharded, one
rank's infinity is all ranks' infinity: they skip the step together and halve the scale together. The scale is part of
a checkpoint. Cost: a maximum of one number over the ranks a step where gradients are sharded; with a fused optimizer
the device decides and nothing waits for it.
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
    """A loss scaler for gradients of which each rank may hold a part."""

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
    """Lightning's ``16-mixed`` that unscales first, whatever the optimizer.

    Args:
        device: kind of device.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device, ShardedScaler(device))

    def teardown(self) -> None:
        """Forget a step that was broken off: the scaler keeps it by the identity of an optimizer that is gone."""
        super().teardown()
        scale = self.scaler.state_dict()
        self.scaler = ShardedScaler(self.device)
        if scale:  # it is empty where the device has none
            self.scaler.load_state_dict(scale)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizable, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the backward passes, unscale, weigh and clip, and step unless an infinity was found."""
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
        """Whether unscaling found one, as the scaler itself asks of an optimizer that is not fused. Waits."""
        return any(bool(found) for found in self.scaler._found_inf_per_device(optimizer).values())

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip gradients, which have been unscaled."""
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


def shard_policy(precision: str, reduce_dtype: ReduceTypeName) -> MixedPrecisionPolicy:
    """In which type FSDP adds micro batches and ranks: that of the gradients, or float32 where they are bfloat16."""
    wide = precision == "bf16-true" and reduce_dtype == "fp32"
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if wide else None)


def use_tensor_cores(allowed: bool) -> None:
    """Let CUDA round the factors of float32 products to TF32's ten bits, or not. For the whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def device_kind(accelerator: str) -> str:
    """The device that ``trainer.accelerator`` names: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if accelerator == "cuda" and not available:
        raise ConfigError("trainer.accelerator is cuda, but PyTorch sees no CUDA device", hint="use auto or cpu")
    return "cuda" if accelerator != "cpu" and available else "cpu"


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that a device does not have.

    Raises:
        ConfigError: it has not.
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
