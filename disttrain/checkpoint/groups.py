"""Further tensors of a checkpoint, beside the model's and the optimizers', that a callback brings along.

A callback registers a :class:`TensorGroup` under a name in its strategy's ``tensor_groups``. Its tensors are saved
as the model's are, sharded, under the names of parameters, and come back in any layout. A group may be *evaluated*:
whoever loads the checkpoint to evaluate it then gets the group's tensors in place of the parameters of those names.
No cost without a group.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class TensorGroup(Protocol):
    """What a callback gives to checkpoints. Every rank calls every method at the same place."""

    @property
    def evaluated(self) -> bool:
        """Whether evaluation runs with these tensors in place of the parameters of their names."""

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of the tensors, by parameter name; saved, or filled in place. Empty to save nothing."""

    def state(self) -> dict[str, Any]:
        """Plain values to save with them, the same on all ranks."""

    def resume(self, found: set[str], state: dict[str, Any]) -> None:
        """Training goes on from a checkpoint, which has filled model and optimizers.

        Args:
            found: the names whose tensors it held; the others are as they were.
            state: what :meth:`state` gave, empty where the checkpoint has no such group.
        """

    def replaced(self, found: bool) -> None:
        """The model now holds a checkpoint's weights for evaluation.

        Args:
            found: whether the checkpoint held this group.
        """

    def training_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that are trained, even in the midst of an evaluation."""


def parameters_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by the names that checkpoints use; a tied one once for each of its names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name.replace("_orig_mod.", ""), parameter  # as torch.compile wraps a submodule


def trained_names(module: nn.Module) -> frozenset[str]:
    """The dotted names, in a checkpoint, of the weights that training moves; buffers may well hold infinities."""
    return frozenset(f"model.{name}" for name, value in parameters_by_name(module) if value.requires_grad)


def freeze_as_saved(module: nn.Module, frozen: Iterable[str]) -> None:
    """Freeze and thaw parameters as they were when a checkpoint was taken: what did it may not do so again.

    Args:
        module: whose parameters.
        frozen: names of those that were frozen.
    """
    before, changed = set(frozen), []
    for name, parameter in parameters_by_name(module):
        if parameter.requires_grad == (name in before):
            parameter.requires_grad_(name not in before)
            changed.append(name)
    if changed:
        kind = "frozen" if changed[0] in before else "trained"
        warnings.warn(
            f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} began otherwise and is now"
            f" {kind}, as in the checkpoint",
            stacklevel=4,
        )
