"""Plain PyTorch modules, independent of trainer, parallelism and data."""

from disttrain.models.convnet import ConvNet
from disttrain.models.mlp import MLP

__all__ = ["MLP", "ConvNet"]
