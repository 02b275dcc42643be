"""How a global batch is divided into ranks and micro batches, and which strategy runs it.

Frozen, self-validating dataclasses: no torch, no process group. The arithmetic is exact, or an error lists sizes that
work; nothing is rounded down silently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from disttrain.errors import ConfigError

StrategyName = Literal["ddp", "fsdp"]
ReductionName = Literal["fast", "tree"]
ReduceTypeName = Literal["fp32", "bf16"]
CompileName = Literal["none", "blocks"]
RecomputeName = Literal["none", "blocks", "selective"]

_BUCKET_MIB: Final = 25
_USUAL_SIZE: Final = 32


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch: ``global_batch_size = ranks x accumulation x micro_batch_size``.

    Rank ``r`` takes positions ``[r * G / R, (r + 1) * G / R)`` of the global batch, in ``accumulation`` micro batches
    of ``micro_batch_size`` positions each.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks (a hyper-parameter).
        micro_batch_size: samples per rank and forward pass (limited by memory).
        num_ranks: data-parallel ranks.

    Raises:
        ConfigError: the sizes do not divide; the message lists those that do.
    """

    global_batch_size: int
    micro_batch_size: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        g, b, r = self.global_batch_size, self.micro_batch_size, self.num_ranks
        for name, value in (("global_batch_size", g), ("micro_batch_size", b), ("num_ranks", r)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", hint=f"set {name} to a positive number")
        if g % r:
            nearest_below, nearest_above = g - g % r, g + r - g % r
            sizes = [str(size) for size in (nearest_below, nearest_above) if size > 0]
            raise ConfigError(
                f"global_batch_size {g} cannot be divided evenly over {r} ranks",
                hint=f"use {_listed(divisors(g))} ranks, or global_batch_size {' or '.join(sizes)}",
            )
        if (g // r) % b:
            raise ConfigError(
                f"micro_batch_size {b} does not divide the {g // r} samples that each of {r} ranks takes from"
                f" global_batch_size {g}",
                hint=f"use micro_batch_size {_listed(divisors(g // r))}",
            )

    @property
    def rank_batch_size(self) -> int:
        """Samples per rank in a global batch."""
        return self.global_batch_size // self.num_ranks

    @property
    def accumulation(self) -> int:
        """Micro batches per rank in an optimizer step."""
        return self.rank_batch_size // self.micro_batch_size


class Degrees(NamedTuple):
    """Degree of each mesh axis; their product is the number of ranks."""

    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Number of parts a global batch is divided into: all ranks of a tensor group take the same part."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is distributed over the ranks. Names no hardware: the launcher determines the ranks.

    Attributes:
        strategy: ``ddp`` (every rank holds the whole model) or ``fsdp`` (FSDP2: parameters, gradients and optimizer
            state are sharded over the ranks).
        bucket_mib: size of DDP's gradient buckets, in MiB.
        find_unused_parameters: let DDP search for parameters that a forward pass did not use.
        reshard_after_forward: let FSDP free gathered parameters after the forward pass (less memory, one more
            all-gather in the backward pass).
        reduction: ``fast`` (the communication library chooses the order of summation) or ``tree`` (one fixed order
            over the micro batches of the global batch: weights are bit-identical on any number of ranks).
        reduce_dtype: dtype in which gradients are reduced between ranks: ``fp32`` or ``bf16`` (half the bytes, two to
            three significant digits).
        replicate: number of copies of the sharded model, FSDP only; each is sharded over ``shard`` ranks. -1 derives
            it.
        shard: number of ranks over which FSDP shards each copy. -1 derives it from the number of ranks.
        tensor: number of ranks that share the work of each layer, FSDP only, by the model's ``tensor_plan()``:
            consecutive ranks, which see the same samples. -1 derives it.
        activation_checkpointing: ``none``, ``blocks`` (the model's blocks keep only their inputs and run again in the
            backward pass: less memory, one more forward pass, the same bits) or ``selective`` (they also keep the
            results of matrix products and attention, and recompute only the rest).
        meta_init: build the model on the meta device, and allocate and initialize it when it is sharded; initial
            values depend only on seed and module name, not on the layout.
        offload: let FSDP keep parameters, gradients and optimizer state in CPU memory (pinned, for CUDA), and run the
            optimizer there. No effect on a CPU.
        gradient_as_bucket_view: make DDP's gradients views of its buckets: less memory, one copy fewer.
        static_graph: let DDP assume that every step runs the same graph: parameters unused in the first step are
            skipped without a search.
        compile: ``none`` or ``blocks`` (``torch.compile`` each block of the model).
        sync_batchnorm: compute batch norm statistics over the micro batches of all ranks.
    """

    strategy: StrategyName = "ddp"
    bucket_mib: int = _BUCKET_MIB
    find_unused_parameters: bool = False
    reshard_after_forward: bool = True
    reduction: ReductionName = "fast"
    reduce_dtype: ReduceTypeName = "fp32"
    replicate: int = 1
    shard: int = -1
    tensor: int = 1
    activation_checkpointing: RecomputeName = "none"
    meta_init: bool = False
    offload: bool = False
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    compile: CompileName = "none"
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp"):
            raise ConfigError(f"parallel.strategy is {self.strategy!r}", hint="set it to 'ddp' or 'fsdp'")
        if self.bucket_mib < 1:
            raise ConfigError(f"parallel.bucket_mib is {self.bucket_mib}", hint="set it to at least 1 (MiB)")
        if self.reduction not in ("fast", "tree"):
            raise ConfigError(f"parallel.reduction is {self.reduction!r}", hint="set it to 'fast' or 'tree'")
        if self.reduce_dtype not in ("fp32", "bf16"):
            raise ConfigError(f"parallel.reduce_dtype is {self.reduce_dtype!r}", hint="set it to 'fp32' or 'bf16'")
        if self.reduce_dtype == "bf16" and self.reduction == "tree":
            raise ConfigError(
                "parallel.reduction is tree, and parallel.reduce_dtype is bf16, which rounds each rank's sum",
                hint="set reduce_dtype to fp32, or reduction to fast",
            )
        if self.activation_checkpointing not in ("none", "blocks", "selective"):
            raise ConfigError(
                f"parallel.activation_checkpointing is {self.activation_checkpointing!r}",
                hint="set it to 'none', 'blocks' or 'selective'",
            )
        if self.reduction == "tree" and self.find_unused_parameters:
            raise ConfigError(
                "parallel.reduction is tree, which needs a gradient of every parameter, and"
                " parallel.find_unused_parameters is true",
                hint="freeze unused parameters and set find_unused_parameters to false, or reduction to fast",
            )
        axes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        for name, degree in axes.items():
            if degree != -1 and degree < 1:
                raise ConfigError(f"parallel.{name} is {degree}", hint="set it to at least 1, or to -1 to derive it")
        derived = [f"parallel.{name}" for name, degree in axes.items() if degree == -1]
        if len(derived) > 1:
            hint = "set one of them" if len(derived) == 2 else "set two of them"
            raise ConfigError(f"{' and '.join(derived)} are {'both' if len(derived) == 2 else 'all'} -1", hint=hint)
        if self.strategy == "ddp" and (self.replicate, self.shard, self.tensor) != (1, -1, 1):
            raise ConfigError(
                "parallel.replicate, parallel.shard and parallel.tensor are for fsdp, but parallel.strategy is ddp",
                hint="set parallel.strategy to fsdp, or remove them",
            )

        self._check_options()

    def _check_options(self) -> None:
        """Reject options of the other strategy, and options that exclude each other."""
        others = {"offload": self.offload, "reshard_after_forward": not self.reshard_after_forward}
        if self.strategy == "fsdp":
            others = {
                "static_graph": self.static_graph,
                "gradient_as_bucket_view": not self.gradient_as_bucket_view,
                "find_unused_parameters": self.find_unused_parameters,
                "bucket_mib": self.bucket_mib != _BUCKET_MIB,
            }
        for name, changed in others.items():
            if changed:
                home = "fsdp" if self.strategy == "ddp" else "ddp"
                raise ConfigError(
                    f"parallel.{name} is for {home}, but parallel.strategy is {self.strategy}",
                    hint=f"set parallel.strategy to {home}, or remove {name}",
                )
        if self.compile not in ("none", "blocks"):
            raise ConfigError(f"parallel.compile is {self.compile!r}", hint="set it to 'none' or 'blocks'")
        if self.static_graph and (self.find_unused_parameters or self.reduction == "tree"):
            which = "parallel.find_unused_parameters" if self.find_unused_parameters else "parallel.reduction: tree"
            why = (
                "searches again in every step" if self.find_unused_parameters else "needs a gradient of every parameter"
            )
            raise ConfigError(
                f"parallel.static_graph is true, but {which} {why}",
                hint="use one of the two",
            )
        if self.sync_batchnorm and self.tensor != 1:
            raise ConfigError(
                "parallel.sync_batchnorm is true, and with parallel.tensor several ranks count the same samples",
                hint="set sync_batchnorm to false, or tensor to 1",
            )
        if self.offload and self.reduction == "tree":
            raise ConfigError(
                "parallel.reduction is tree, which adds gradients on the device, and parallel.offload is true",
                hint="set offload to false, or reduction to fast",
            )

    def degrees(self, num_ranks: int) -> Degrees:
        """Return the mesh degrees for a number of ranks.

        Raises:
            ConfigError: they do not fit the number of ranks; the message lists degrees that do.
        """
        if self.strategy == "ddp":
            return Degrees(num_ranks, 1, 1)
        wanted = (self.replicate, self.shard, self.tensor)
        known = math.prod(degree for degree in wanted if degree != -1)
        found = Degrees(*(num_ranks // known if degree == -1 else degree for degree in wanted))
        fills = math.prod(found) == num_ranks
        if fills and (found.shard > 1 or found.data == 1):
            return found
        # Suggest degrees that keep the tensor axis, if possible.
        tensors = [found.tensor] if found.tensor and num_ranks % found.tensor == 0 else divisors(num_ranks)
        with_tensor = tensors != [1]
        fits = [
            f"{data // shard} x {shard}" + f" x {tensor}" * with_tensor
            for tensor, data in ((tensor, num_ranks // tensor) for tensor in tensors)
            for shard in divisors(data)
            if shard > 1 or data == 1
        ]
        names = ("replicate", "shard", "tensor")[: 2 + with_tensor]
        said = " x ".join(f"parallel.{name} {degree}" for name, degree in zip(names, wanted, strict=False))
        ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
        raise ConfigError(
            f"{said} " + (f"leaves nothing to shard on {ranks}" if fills else f"does not equal {ranks}"),
            hint=f"use {' x '.join(names)} of {_or(fits)}"
            + (", or parallel.strategy: ddp" if fills and not with_tensor else ""),
        )


def usual_micro_batch_size(global_batch_size: int) -> int:
    """Return the default micro batch size: the largest divisor of the global batch size up to 32.

    It does not depend on the number of ranks, which would otherwise silently affect batch norm and dropout.
    """
    return max((size for size in divisors(max(1, global_batch_size)) if size <= _USUAL_SIZE), default=1)


def divisors(n: int) -> list[int]:
    """Return all divisors of ``n`` in ascending order."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers]
    if len(shown) > 12:
        shown = [*shown[:6], "...", *shown[-5:]]
    return _or(shown)


def _or(shown: list[str]) -> str:
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
