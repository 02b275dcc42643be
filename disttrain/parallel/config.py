"""How a global batch is cut over ranks and micro batches, and which strategy runs it.

Pure decisions over frozen, self-validating dataclasses: no torch, no process group. The arithmetic is exact
or an error that lists the sizes that work; nothing is rounded down silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from disttrain.errors import ConfigError

StrategyName = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class BatchPlan:
    """The cut of a global batch: ``global_batch_size = ranks x accumulation x micro_batch_size``.

    Rank ``r`` takes positions ``[r * G / R, (r + 1) * G / R)`` of the global batch, in ``accumulation``
    micro batches of ``micro_batch_size`` positions each.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks (a hyper-parameter).
        micro_batch_size: samples per rank per forward pass (a memory figure).
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
                raise ConfigError(f"{name} is {value}; it must be at least 1", mend=f"set {name} to a positive number")
        if g % r:
            nearest_below, nearest_above = g - g % r, g + r - g % r
            sizes = [str(size) for size in (nearest_below, nearest_above) if size > 0]
            raise ConfigError(
                f"global_batch_size {g} cannot be cut evenly over {r} ranks",
                mend=f"use {_listed(divisors(g))} ranks, or global_batch_size {' or '.join(sizes)}",
            )
        if (g // r) % b:
            raise ConfigError(
                f"micro_batch_size {b} does not divide the {g // r} samples that each of {r} ranks takes of"
                f" global_batch_size {g}",
                mend=f"use micro_batch_size {_listed(divisors(g // r))}",
            )

    @property
    def rank_batch_size(self) -> int:
        """Samples of a global batch that one rank takes."""
        return self.global_batch_size // self.num_ranks

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step on each rank."""
        return self.rank_batch_size // self.micro_batch_size


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over the ranks. It names no hardware: ranks come from the launcher.

    Attributes:
        strategy: ``ddp`` (every rank holds the whole model) or ``fsdp`` (FSDP2: parameters, gradients and
            optimizer state are sharded over the ranks).
        bucket_mib: size of DDP's gradient buckets, in MiB.
        find_unused_parameters: let DDP search for parameters that took no part in a forward pass.
        reshard_after_forward: let FSDP free the gathered parameters after the forward pass (less memory,
            one more all-gather in the backward pass).
    """

    strategy: StrategyName = "ddp"
    bucket_mib: int = 25
    find_unused_parameters: bool = False
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp"):
            raise ConfigError(f"parallel.strategy is {self.strategy!r}", mend="set it to 'ddp' or 'fsdp'")
        if self.bucket_mib < 1:
            raise ConfigError(f"parallel.bucket_mib is {self.bucket_mib}", mend="set it to at least 1 (MiB)")


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers]
    if len(shown) > 12:
        shown = [*shown[:6], "...", *shown[-5:]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
