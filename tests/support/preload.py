"""What the fork server imports once, for all ranks of all tests: all that a training imports on its way."""

import gc

import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
import torch.utils.tensorboard  # noqa: F401
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import _is_object_storage

import disttrain.commands.training
import disttrain.report  # noqa: F401
import recipes.digits  # noqa: F401

_is_object_storage(LocalFileSystem())  # which imports the clients of s3, gs and Azure that are installed

# A rank's garbage collections pass over what is here already, and do not copy its pages.
gc.collect()
gc.freeze()
