"""A small convolutional network for small images.

Uses group norm instead of batch norm: a sample's output does not depend on the other samples of the micro batch,
hence not on how a batch is split over ranks. Uses GELU and average pooling instead of ReLU and max pooling: those
have kinks, where a difference in the last bit of a sum, which may depend on the number of ranks, occasionally selects
a different gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


class ConvNet(nn.Module):
    """Stages of two 3x3 convolutions each, then global average pooling, dropout and a linear layer.

    Each stage but the last halves height and width.

    Args:
        in_channels: channels of an image.
        widths: channels of each stage; each must be a multiple of ``groups``.
        num_classes: number of logits.
        dropout: probability of zeroing a pooled feature.
        groups: groups of the group norms.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64),
        num_classes: int = 10,
        dropout: float = 0.2,
        groups: int = 8,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = in_channels
        for place, width in enumerate(widths):
            last = place == len(widths) - 1
            stages.append(_stage(before, width, groups=groups, pool=not last))
            before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(before, num_classes)
        )

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Return the tensor-parallel plan: the linear layer is row-wise; convolutions are replicated."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import RowwiseParallel

        return {"head.3": RowwiseParallel(input_layouts=Replicate())}

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape (samples, channels, height, width), to logits, shape (samples, num_classes)."""
        out: Tensor = self.head(self.stages(images))
        return out


def _stage(before: int, after: int, *, groups: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.GroupNorm(groups, after), nn.GELU()]
    if pool:
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers)
