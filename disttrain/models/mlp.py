"""A multi-layer perceptron with dropout. Cost: the matrix products of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


class MLP(nn.Module):
    """Linear layers with ReLU and dropout between them.

    Args:
        in_features: features of an input.
        hidden: sizes of the hidden layers.
        out_features: features of an output.
        dropout: probability of zeroing a hidden unit.
    """

    def __init__(
        self, in_features: int, *, hidden: Sequence[int] = (64,), out_features: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_features))

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Return the tensor-parallel plan: layers in pairs, the first column-wise and the second row-wise."""
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        from disttrain.parallel.model.tensor_parallel import ShardedDropout

        plan: dict[str, ParallelStyle] = {}
        for first in range(0, len(self.layers) - 3, 6):  # linear, ReLU, dropout, linear, ReLU, dropout, ...
            plan[f"layers.{first}"] = ColwiseParallel()
            plan[f"layers.{first + 2}"] = ShardedDropout(-1)
            plan[f"layers.{first + 3}"] = RowwiseParallel()
        return plan

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs, shape (samples, in_features), to outputs, shape (samples, out_features)."""
        out: Tensor = self.layers(inputs.flatten(1))
        return out
