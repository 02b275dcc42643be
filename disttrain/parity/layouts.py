"""Parse layouts from the command line: ``1``, ``2xddp``, ``4xfsdp``, ``2x2hsdp``, ``2x2tp``, ``1@64``.

A layout is a number of ranks, a strategy and, after an @, a micro batch size if it differs from the recipe's. Its
strategy and degrees replace the recipe's; options that only the other strategy has are dropped. Does not import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from disttrain.errors import ConfigError
from disttrain.parallel.config import BatchPlan, ParallelConfig, StrategyName, divisors

_DEGREES: Final = ("replicate", "shard", "tensor")
_FOREIGN: Final[dict[str, dict[str, Any]]] = {
    "ddp": {"offload": False},
    "fsdp": {"static_graph": False, "gradient_as_bucket_view": True},
}
"""Options that a strategy lacks, with the values that request nothing."""


@dataclass(frozen=True)
class Layout:
    """One way to spread a run over ranks.

    Attributes:
        name: as written on the command line.
        num_ranks: number of processes.
        strategy: ``ddp`` or ``fsdp``.
        replicate: copies of the sharded model.
        shard: ranks that share a copy; -1 for all remaining ranks.
        tensor: ranks that share each layer. Splits the sums inside a layer, so rounding depends on it.
        micro_batch_size: in samples; None for the recipe's.
    """

    name: str
    num_ranks: int
    strategy: StrategyName = "ddp"
    replicate: int = 1
    shard: int = -1
    tensor: int = 1
    micro_batch_size: int | None = None

    @property
    def num_parts(self) -> int:
        """Number of parts that a global batch is split into."""
        return self.num_ranks // self.tensor

    def parallel(self, recipe: ParallelConfig) -> ParallelConfig:
        """Return the recipe's settings, adapted to this layout.

        Raises:
            ConfigError: they exclude each other.
        """
        degrees = {name: getattr(self, name) for name in _DEGREES}
        try:
            return replace(recipe, strategy=self.strategy, **degrees, **_FOREIGN[self.strategy])
        except ConfigError as error:
            raise ConfigError(f"layout {self.name}: {error.what}", hint=error.hint) from None


def parse_layouts(text: str) -> list[Layout]:
    """Parse a list of layouts such as ``1,2xddp,2x2hsdp``; the first one is the reference.

    Raises:
        ConfigError: a layout is invalid, or there are fewer than two.
    """
    layouts = [parse_layout(part.strip()) for part in text.split(",") if part.strip()]
    names = [layout.name for layout in layouts]
    if len(set(names)) < 2:
        raise ConfigError(
            f"--layouts {text!r} names fewer than two layouts", hint="give several, such as 1,2xddp,2xfsdp"
        )
    return list({layout.name: layout for layout in layouts}.values())


def parse_layout(text: str) -> Layout:
    """Parse one layout.

    Raises:
        ConfigError: it is invalid.
    """
    found = re.fullmatch(r"(\d+)(?:x(?:(\d+)x?)?(ddp|fsdp|hsdp|tp))?(?:@(\d+))?", text)
    if found is None:
        raise _not_a_layout(text)
    size = int(found[4]) if found[4] else None
    ranks, second, strategy = int(found[1]), int(found[2] or 1), found[3]
    if ranks < 1 or second < 1 or size == 0 or (found[2] is not None) != (strategy in ("hsdp", "tp")):
        raise _not_a_layout(text)
    if strategy is None and ranks > 1:
        raise _not_a_layout(text)
    if strategy == "hsdp":
        return Layout(text, ranks * second, "fsdp", replicate=ranks, shard=second, micro_batch_size=size)
    if strategy == "tp":
        return Layout(text, ranks * second, "fsdp", tensor=second, micro_batch_size=size)
    return Layout(text, ranks, "fsdp" if strategy == "fsdp" else "ddp", micro_batch_size=size)


def common_size(layouts: Sequence[Layout], global_batch_size: int) -> int:
    """Return the largest micro batch size that fits every layout.

    Raises:
        ConfigError: a layout cannot split the global batch at all.
    """
    return math.gcd(*(_plan(layout, global_batch_size, 1).rank_batch_size for layout in layouts))


def fitting_size(layouts: Sequence[Layout], global_batch_size: int, micro_batch_size: int) -> int:
    """Return the recipe's micro batch size if it fits all layouts that do not set one, else the next smaller that does.

    Raises:
        ConfigError: a layout cannot split the global batch at all.
    """
    open_ones = [layout for layout in layouts if layout.micro_batch_size is None]
    largest = common_size(open_ones, global_batch_size) if open_ones else micro_batch_size
    return max(size for size in divisors(largest) if size <= micro_batch_size)


def check_sizes(layouts: Sequence[Layout], global_batch_size: int, micro_batch_size: int) -> None:
    """Check that every layout can split the global batch.

    Raises:
        ConfigError: one cannot; the message names it and what works.
    """
    for layout in layouts:
        _plan(layout, global_batch_size, layout.micro_batch_size or micro_batch_size)


def another_size(global_batch_size: int, micro_batch_size: int) -> int | None:
    """Return another micro batch size for a single process: the next smaller one, else the next larger one, if any."""
    sizes = divisors(global_batch_size)
    smaller = [size for size in sizes if size < micro_batch_size]
    larger = [size for size in sizes if size > micro_batch_size]
    return smaller[-1] if smaller else larger[0] if larger else None


def replaced_settings(layouts: Sequence[Layout], recipe: ParallelConfig) -> list[str]:
    """Describe which of the recipe's settings the layouts override."""
    usual = {field.name: field.default for field in fields(ParallelConfig)}
    told = [
        f"the recipe's trainer.parallel.{name} {getattr(recipe, name)} is replaced by that of each layout"
        for name in _DEGREES
        if getattr(recipe, name) != usual[name]
    ]
    for strategy, options in _FOREIGN.items():
        names = ", ".join(layout.name for layout in layouts if layout.strategy == strategy)
        told += [
            f"the recipe's trainer.parallel.{name} {str(getattr(recipe, name)).lower()} is dropped in {names}, because"
            f" {strategy} has no such option"
            for name, off in options.items()
            if names and getattr(recipe, name) != off
        ]
    return told


def _plan(layout: Layout, global_batch_size: int, micro_batch_size: int) -> BatchPlan:
    try:
        return BatchPlan(global_batch_size, micro_batch_size, layout.num_parts)
    except ConfigError as error:
        raise ConfigError(f"layout {layout.name}: {error.what}", hint=error.hint) from None


def _not_a_layout(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is not a layout",
        hint="write 1, RANKSxddp, RANKSxfsdp, COPIESxRANKShsdp (each copy sharded over that many ranks) or"
        " PARTSxRANKStp (FSDP over that many parts of the data, each shared by that many ranks), followed by"
        " @SIZE for another micro batch size",
    )
