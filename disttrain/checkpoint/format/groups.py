"""Extra tensor groups in a checkpoint, contributed by callbacks in addition to the model and optimizers.

A callback registers a :class:`TensorGroup` under a name in its strategy's ``tensor_groups``. Its tensors are keyed by
parameter name, saved sharded like the model's, and load into any layout. If a group is *evaluated*, loading the
checkpoint for evaluation puts the group's tensors in place of the parameters of the same names. No cost without a
group.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class TensorGroup(Protocol):
    """What a callback implements to add tensors to checkpoints. Every rank must call each method at the same point."""

    @property
    def evaluated(self) -> bool:
        """Whether evaluation uses these tensors in place of the parameters of the same names."""

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's part of the tensors by parameter name, to save or fill in place; empty to save nothing."""

    def state(self) -> dict[str, Any]:
        """Return plain values to save along with them, the same on all ranks."""

    def resume(self, found: set[str], state: dict[str, Any]) -> None:
        """Resume training after a checkpoint was loaded into model and optimizers.

        Args:
            found: names of the tensors it held; the others are unchanged.
            state: what :meth:`state` returned, empty if the checkpoint has no such group.
        """

    def replaced(self, found: bool) -> None:
        """Handle that the model now holds a checkpoint's weights for evaluation.

        Args:
            found: whether the checkpoint held this group.
        """

    def training_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the trained weights, even during an evaluation."""


def parameters_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters by their names in checkpoints; a tied parameter once per name."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name.replace("_orig_mod.", ""), parameter  # torch.compile adds this prefix to a wrapped submodule


def trained_names(module: nn.Module) -> frozenset[str]:
    """Return the names in a checkpoint of the trained weights; buffers are excluded, since they may hold infinities."""
    return frozenset(f"model.{name}" for name, value in parameters_by_name(module) if value.requires_grad)


def freeze_as_saved(module: nn.Module, frozen: Iterable[str]) -> None:
    """Freeze and unfreeze parameters as in the checkpoint: the code that did so may not run again.

    Args:
        module: the module.
        frozen: names of the parameters that were frozen.
    """
    before, changed = set(frozen), []
    for name, parameter in parameters_by_name(module):
        if parameter.requires_grad == (name in before):
            parameter.requires_grad_(name not in before)
            changed.append(name)
    if changed:
        kind = "frozen" if changed[0] in before else "trained"
        warnings.warn(
            f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} changed to {kind}, as in"
            " the checkpoint",
            stacklevel=4,
        )
