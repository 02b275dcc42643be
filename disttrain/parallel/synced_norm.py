"""Batch normalization over the micro batches of all ranks: ``sync_batchnorm: true``.

The statistics are those of the micro batches that all ranks run at the same time, each sample counted once: means,
variances and counts are gathered and combined in float64 in one order, so all ranks normalize by the same bits, and the
gradient flows through the statistics of all ranks. On CUDA and the CPU alike; nothing waits for the device. Names of
the layers stay, and they remain instances of their classes; in evaluation and on one rank they do what those do.

Cost: two small collectives a layer and micro batch, one in each direction, and a few passes over the activations more
than PyTorch's fused layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from disttrain.parallel.agree import is_distributed
from disttrain.parallel.collectives import all_gather_single


def sync_batch_norms(module: nn.Module) -> int:
    """Let a module's batch norms take their statistics over all ranks; gives their number.

    Each is replaced by one of a subclass that has the same name, parameters, buffers and hooks. Those that do so
    already are left as they are, PyTorch's ``SyncBatchNorm`` among them.
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
    """A batch norm over all ranks, mixed into one that is over a single rank."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives inside a compiled block are a graph break
    def forward(self, inputs: Tensor) -> Tensor:
        """In an evaluation, and on one rank, the pass of the class it is mixed into."""
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
    """The same norm over all ranks: it shares parameters, buffers and hooks, whatever class of batch norm it is."""
    kind: Any = type(norm)
    mixed = _mixed(kind)
    made: _Synced = mixed.__new__(mixed)
    vars(made).update(vars(norm))
    return made


@cache
def _mixed(kind: Any) -> Any:
    return type(kind.__name__, (_Synced, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks, and their number of values; float64. A collective."""
    dims = [dim for dim in range(inputs.ndim) if dim != 1]
    variance, mean = torch.var_mean(inputs.to(_wide(inputs)), dim=dims, correction=0)
    own = torch.cat([mean.double(), variance.double(), mean.new_full((1,), inputs.numel() // inputs.shape[1]).double()])
    gathered = own.new_empty(dist.get_world_size() * own.numel())
    all_gather_single(gathered, own)
    means, variances, counts = gathered.view(-1, own.numel()).split([len(mean), len(mean), 1], dim=1)  # type: ignore[no-untyped-call]
    # A rank without samples has the mean of nothing.
    means, variances = torch.where(counts > 0, means, 0.0), torch.where(counts > 0, variances, 0.0)
    total = counts.sum()
    whole = (means * counts).sum(dim=0) / total
    return whole, ((variances + (means - whole).square()) * counts).sum(dim=0) / total, total


def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor, total: Tensor) -> None:
    """Move the running statistics, as PyTorch does: by the unbiased variance."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: Any = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
    for running, now in ((norm.running_mean, mean), (norm.running_var, variance * total / (total - 1))):
        assert running is not None
        running.copy_(running.double() * (1 - share) + now * share)


class _Normalize(torch.autograd.Function):
    """Normalizes by given statistics; the backward pass differentiates through them, on all ranks."""

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
        """A collective, by all ranks in the order of their backward passes."""
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
    """A value a channel, shaped to go with a batch: (channels,) becomes (1, channels, 1, ...)."""
    return values.view(1, -1, *(1 for _ in range(like.ndim - 2)))
