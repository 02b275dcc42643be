"""Weights without a run: export them from a checkpoint, or initialize a new run from them.

Needs no model class, GPU or process group. Files are safetensors or a plain PyTorch ``state_dict``; both are read
without executing anything from them. Files are written under a temporary name first. Needs memory for one copy of
the weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from disttrain.checkpoint.format.marker import faults
from disttrain.checkpoint.format.reader import cause, check, groups, no_group, read_group
from disttrain.errors import CheckpointError, nearest
from disttrain.system.files import make_folder, publish

_SHOWN = 5


@dataclass(frozen=True)
class Taken:
    """What a model loaded from a file.

    Attributes:
        loaded: names of tensors that were loaded.
        missing: tensors that only the model has.
        unexpected: tensors that only the file has.
        mismatched: tensors of a different shape, as ``name (file's shape) where the model has (model's shape)``.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether file and model hold the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names: list[str] = getattr(self, kind)
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
        return "; ".join(parts)


def refuse_folder(path: object) -> None:
    """Reject a checkpoint folder where a file of weights is expected.

    Raises:
        CheckpointError: the path is a folder.
    """
    if isinstance(path, str | Path) and Path(path).is_dir():
        raise CheckpointError(
            f"load_from_checkpoint reads a Lightning file, but {path} is a folder",
            hint=f"disttrain checkpoints export {path} weights.pt, then"
            " module.load_state_dict(torch.load('weights.pt')); or Trainer.test(module, ckpt_path=...), which reads it",
        )


def read_weights(path: Path, *, group: str = "model") -> dict[str, Tensor]:
    """Read unsharded tensors by name from a checkpoint, a ``.safetensors`` file, or a ``.pt``/``.pth`` state_dict.

    Args:
        path: the checkpoint directory or file.
        group: which group of tensors to read from a checkpoint.

    Raises:
        CheckpointError: it does not exist, is damaged, or holds something other than tensors.
    """
    if path.is_dir():
        check(path)
        if group not in groups(path):
            raise no_group(path, group, groups(path))
        wrong = faults(path)
        if wrong:
            raise CheckpointError(wrong[0], hint="use another checkpoint")
        return read_group(path, group)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint or file at {path}", hint="correct the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise almost anything
        raise CheckpointError(
            f"{path} cannot be read as weights: {cause(error)}",
            hint="give a .safetensors file, or a state_dict of tensors saved by torch.save",
        ) from None
    inner = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(inner, dict):
        raise CheckpointError(
            f"{path} is not a state_dict: it is of type {type(inner).__name__}", hint="save a dictionary of tensors"
        )
    other = next((name for name, value in inner.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise CheckpointError(
            f"{path} is not a state_dict: {other!r} is of type {type(inner[other]).__name__}",
            hint="save a dictionary of tensors only, as model.state_dict() returns",
        )
    return {str(name): value for name, value in inner.items()}


def write_weights(path: Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> None:
    """Write tensors as ``.safetensors``, or as a ``.pt`` or ``.pth`` state_dict.

    Args:
        path: the file; replaced if it exists.
        tensors: the tensors by name.
        about: extra metadata strings, for safetensors.

    Raises:
        CheckpointError: the extension is unknown, or the file cannot be written.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"{path} does not end in a known suffix", hint="name it .safetensors, .pt or .pth")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(whole, temporary, metadata={"format": "pt", **(about or {})})
        else:
            torch.save(whole, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{path.parent} is not a folder" if no_folder else error.strerror or error
        raise CheckpointError(
            f"{path} cannot be written: {reason}",
            hint="give a path inside a folder" if no_folder else "check space and permissions",
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def initialize(model: nn.Module, path: Path, *, strict: bool = True) -> Taken:
    """Initialize a model that is not yet sharded from saved weights; all other state stays that of a new run.

    Args:
        model: the model; its tensors keep their dtype and device.
        path: a checkpoint directory or a file of weights.
        strict: require identical names and shapes; otherwise load whatever fits.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: the weights cannot be read; nothing fits; or, with ``strict``, something is missing,
            unexpected or of a different shape. The model is then unchanged.
    """
    there, own = read_weights(path), model.state_dict(keep_vars=True)
    fitting = {name: value for name, value in there.items() if name in own and own[name].shape == value.shape}
    filled = {own[name].data_ptr() for name in fitting if own[name].numel()}
    taken = Taken(
        loaded=sorted(fitting),
        # A tied weight has two names; files often store it under one of them.
        missing=sorted(name for name in own if name not in there and own[name].data_ptr() not in filled),
        unexpected=sorted(name for name in there if name not in own),
        mismatched=[
            f"{name} (shape {tuple(value.shape)}, expected {tuple(own[name].shape)})"
            for name, value in sorted(there.items())
            if name in own and own[name].shape != value.shape
        ],
    )
    if not fitting or (strict and not taken.complete):
        hint = nearest(taken.missing[0], taken.unexpected) if taken.missing and taken.unexpected else ""
        raise CheckpointError(
            f"the weights in {path} do not match this model: {taken}",
            hint="use the model that they were made with, or --initialize_strict false to load what fits"
            + (f"; for {taken.missing[0]}, {hint}" if hint.startswith("did") else ""),
        )
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return taken
