"""Clipping for modules that leave it to Lightning: one norm over the whole gradient, under every strategy.

PyTorch's own clipping cannot take the norm of gradients that are divided along different axes, as with tensor
parallelism, and its norm has other bits in every layout. So Lightning's precision plugin is given disttrain's own
(:mod:`disttrain.parallel.gradients`): with ``reduction: tree`` the same bits in all layouts. A ``Task`` calls that
itself.

Cost: as there.
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
    """Clips for any LightningModule; to be mixed into a Lightning strategy, before its base."""

    config: ParallelConfig
    grad_norm: Tensor | None = None
    """Norm before clipping of the last gradient that Lightning asked to clip. float64 scalar."""

    def setup_precision_plugin(self) -> None:
        """Attach the plugin, with clipping of disttrain's."""
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
    """Refuse bounds of the gradient that cannot be.

    Raises:
        ConfigError: both are given, or one is not positive.
    """
    if norm is not None and value is not None:
        raise ConfigError(
            f"trainer.gradient_clip_norm is {norm} and gradient_clip_value {value}", mend="set one of them to null"
        )
    # Lightning does not clip by 0; gradient_clip_norm: 0 has meant that from the start.
    if (norm is not None and not norm >= 0) or (value is not None and not value > 0):
        name, bound = ("norm", norm) if value is None else ("value", value)
        raise ConfigError(f"trainer.gradient_clip_{name} is {bound}", mend="use a positive number, or null for none")
