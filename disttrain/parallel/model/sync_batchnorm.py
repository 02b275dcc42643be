"""``sync_batchnorm: true``: batch normalization over the micro batches of all ranks.

The statistics are those of the micro batches that all ranks run at the same time, with each sample counted once. Means,
variances and counts are gathered and combined in float64 in a fixed order, so all ranks normalize with identical bits,
and the gradient flows through the statistics of all ranks. Works on CUDA and the CPU without synchronizing with the
device. Layers keep their names and remain instances of their classes, whose own code runs in evaluation and on one
rank.

Cost: per layer and micro batch, two small collectives (one in each direction) and a few more passes over the
activations than PyTorch's fused layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.distributed.collectives import all_gather_single
from disttrain.distributed.synchronize_errors import is_distributed


def sync_batch_norms(module: nn.Module) -> int:
    """Make a module's batch norms compute statistics over all ranks; return how many there are.

    Each is replaced by an instance of a subclass with the same class name, parameters, buffers and hooks. Layers that
    already synchronize are skipped, including PyTorch's ``SyncBatchNorm``. A norm that the module also holds in a plain
    list, outside of its submodules, is not found, as in PyTorch's own conversion.
    """
    synced: dict[Any, _Synced] = {}  # a norm may have several names
    for name, norm in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
            continue
        if norm not in synced:
            synced[norm] = norm if isinstance(norm, _Synced) else _synced(norm)
        if synced[norm] is not norm:
            module.set_submodule(name, synced[norm])
    return len(synced)


class _Synced(_BatchNorm):
    """A batch norm over all ranks; a mixin for single-rank batch norm classes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle cannot find a class by name that was made at run time. Its bases are this one and the original.
        return _blank, (type(self).__mro__[2],), vars(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives inside a compiled block are a graph break
    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize over all ranks; in evaluation and on one rank, use the forward pass of the original class."""
        if not self.training or not is_distributed():
            return super().forward(inputs)
        self._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            mean, variance, total = _statistics(inputs)
            if self.track_running_stats:
                _track(self, mean, variance, total)
        out: Tensor = _Normalize.apply(inputs, self.weight, self.bias, mean, variance, total, self.eps)  # type: ignore[no-untyped-call]
        return out


def _synced(norm: _BatchNorm) -> _Synced:
    """Return the same norm over all ranks: it shares the original's parameters, buffers and hooks."""
    made = _blank(type(norm))
    vars(made).update(vars(norm))
    return made


def _blank(kind: Any) -> _Synced:
    mixed = _mixed(kind)
    made: _Synced = mixed.__new__(mixed)
    return made


@cache
def _mixed(kind: Any) -> Any:
    return type(kind.__name__, (_Synced, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per-channel mean and biased variance over all ranks, and the number of values; float64. Collective."""
    dims = [dim for dim in range(inputs.ndim) if dim != 1]
    variance, mean = torch.var_mean(inputs.to(_wide(inputs)), dim=dims, correction=0)
    own = torch.cat([mean.double(), variance.double(), mean.new_full((1,), inputs.numel() // inputs.shape[1]).double()])
    gathered = own.new_empty(dist.get_world_size() * own.numel())
    all_gather_single(gathered, own)
    means, variances, counts = gathered.view(-1, own.numel()).split([len(mean), len(mean), 1], dim=1)  # type: ignore[no-untyped-call]
    # A rank without samples contributes NaN, which a count of 0 would not cancel.
    means, variances = torch.where(counts > 0, means, 0.0), torch.where(counts > 0, variances, 0.0)
    total = counts.sum()
    whole = (means * counts).sum(dim=0) / total
    return whole, ((variances + (means - whole).square()) * counts).sum(dim=0) / total, total


def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor, total: Tensor) -> None:
    """Update the running statistics like PyTorch, with the unbiased variance."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: Any = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
    for running, now in ((norm.running_mean, mean), (norm.running_var, variance * total / (total - 1))):
        assert running is not None
        running.copy_(running.double() * (1 - share) + now * share)


class _Normalize(torch.autograd.Function):
    """Normalizes by given statistics; the backward pass differentiates through them, over all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        total: Tensor,
        eps: float,
    ) -> Tensor:
        wide = _wide(inputs)
        inverse = (variance + eps).rsqrt()
        normal = (inputs.to(wide) - _channels(mean.to(wide), inputs)) * _channels(inverse.to(wide), inputs)
        ctx.save_for_backward(inputs, weight, mean, inverse, total)
        if weight is not None and bias is not None:
            normal = normal * _channels(weight.to(wide), inputs) + _channels(bias.to(wide), inputs)
        return normal.to(inputs.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients. Collective: all ranks must run their backward passes in the same order."""
        inputs, weight, mean, inverse, total = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = _wide(inputs)
        grad, inverse = gradients[0].to(wide), inverse.to(wide)
        normal = (inputs.to(wide) - _channels(mean.to(wide), inputs)) * _channels(inverse, inputs)
        dims = [dim for dim in range(inputs.ndim) if dim != 1]
        sums = torch.stack([grad.sum(dim=dims), (grad * normal).sum(dim=dims)])
        all_sums = sums.to(torch.float64, copy=True)
        dist.all_reduce(all_sums)
        of_grad, of_product = (all_sums / total).to(wide).unbind()
        grad_inputs = grad - _channels(of_grad, inputs) - normal * _channels(of_product, inputs)
        if weight is None:
            return (grad_inputs * _channels(inverse, inputs)).to(inputs.dtype), None, None, None, None, None, None
        scale = _channels(inverse * weight.to(wide), inputs)
        own = sums.to(weight.dtype)
        return (grad_inputs * scale).to(inputs.dtype), own[1], own[0], None, None, None, None


def _wide(inputs: Tensor) -> torch.dtype:
    return torch.promote_types(inputs.dtype, torch.float32)


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-channel values to broadcast with a batch: (channels,) becomes (1, channels, 1, ...)."""
    return values.view(1, -1, *(1 for _ in range(like.ndim - 2)))
