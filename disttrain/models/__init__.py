"""Plain PyTorch modules: no trainer, no parallelism, no data in them."""

from disttrain.models.convnet import ConvNet
from disttrain.models.mlp import MLP

__all__ = ["MLP", "ConvNet"]
