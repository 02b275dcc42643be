"""Clip gradients by Lightning's options, using the norm of the whole gradient under every strategy.

PyTorch's clipping cannot compute the norm of gradients sharded along different mesh axes, as with tensor parallelism,
and its norm differs in the last bits between layouts. So Lightning's precision plugin calls disttrain's clipping
(:mod:`disttrain.parallel.gradients`), which with ``reduction: tree`` is bit-identical in all layouts. A ``Task`` calls
those functions directly.

Cost: see :mod:`disttrain.parallel.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from disttrain.errors import ConfigError
from disttrain.parallel.config import ParallelConfig
from disttrain.parallel.gradients import clip_gradient_norm, clip_gradient_value

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class ClippingMixin(_Base):
    """Clips gradients of any LightningModule; list it before the base in a Lightning strategy."""

    config: ParallelConfig
    grad_norm: Tensor | None = None
    """Norm, before clipping, of the last gradient that Lightning asked to clip. float64 scalar."""

    def setup_precision_plugin(self) -> None:
        """Attach the precision plugin, with disttrain's clipping."""
        super().setup_precision_plugin()
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by(clip_gradient_norm)
        plugin.clip_grad_by_value = self._clip_by(clip_gradient_value)

    def _clip_by(self, clip: Callable[..., Tensor]) -> Callable[..., None]:
        def clip_gradients(optimizer: Any, clip_val: int | float) -> None:
            parameters = self.precision_plugin.main_params(optimizer)
            self.grad_norm = clip(parameters, float(clip_val), ordered=self.config.reduction == "tree")

        return clip_gradients


def check_clipping(norm: float | None, value: float | None) -> None:
    """Reject invalid clipping bounds.

    Raises:
        ConfigError: both are given, or a bound is negative or NaN, or ``value`` is 0.
    """
    if norm is not None and value is not None:
        raise ConfigError(
            f"trainer.gradient_clip_norm is {norm} and gradient_clip_value {value}", hint="set one of them to null"
        )
    # Lightning does not clip for a norm of 0, and gradient_clip_norm: 0 has always meant that.
    if (norm is not None and not norm >= 0) or (value is not None and not value > 0):
        name, bound = ("norm", norm) if value is None else ("value", value)
        raise ConfigError(f"trainer.gradient_clip_{name} is {bound}", hint="use a positive number, or null for none")
