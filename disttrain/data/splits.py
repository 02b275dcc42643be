"""Open the sources of a split, with or without weights, and build the training order over them.

A plain specification (a pattern, a manifest, or a list of these) is one source. Sources without weights are
concatenated, so an epoch takes every sample once; with weights they are mixed. Cost: opening each index.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from disttrain.data.index.evidence import notices
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.order.mixture import Mixture, Portion
from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.remote.ranges import DEFAULT_RETRY, RetryConfig
from disttrain.distributed.world import detect_world
from disttrain.errors import ConfigError

Shards = str | Sequence[str]


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training data.

    Attributes:
        shards: a brace pattern, a glob, a manifest, or a list of these.
        weight: its share of the samples relative to the others'; set it for all sources or for none. Without
            weights an epoch takes every sample of every source once.
        name: its name in reports; ``source 1`` and so on by default.
    """

    shards: str | list[str]
    weight: float | None = None
    name: str = ""


def open_sources(
    spec: Shards | Sequence[SourceConfig], name: str, *, write_sidecars: bool, retry: RetryConfig = DEFAULT_RETRY
) -> list[tuple[SourceConfig, ShardIndex]]:
    """Open the sources of a split and their indexes; ``retry`` applies to servers."""
    open_index = partial(_open_index, write_sidecars=write_sidecars, retry=retry)
    parts = [spec] if isinstance(spec, str) else list(spec)
    if not any(isinstance(part, SourceConfig) for part in parts):
        source = SourceConfig([str(part) for part in parts])
        return [(source, open_index(source.shards, name=name))]
    opened = []
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, SourceConfig):
            raise ConfigError(f"{name} mixes sources and plain patterns", hint="write each as {shards: PATTERN}")
        named = replace(part, name=part.name or f"source {number}")
        index = open_index(part.shards, name=f"{name} ({named.name})")
        opened.append((named, index))
    return opened


def _open_index(spec: Shards, *, name: str, write_sidecars: bool, retry: RetryConfig) -> ShardIndex:
    index = ShardIndex.open(spec, name=name, write_sidecars=write_sidecars, retry=retry)
    if detect_world().rank == 0:
        for notice in notices(index):
            warnings.warn(notice, stacklevel=2)
    return index


def order_of(sources: list[tuple[SourceConfig, ShardIndex]], config: OrderConfig) -> Order | Mixture:
    """Return the order over all samples of the sources, or their mixture if they have weights."""
    weights = [source.weight for source, _ in sources if source.weight is not None]
    if not weights:
        return Order(np.concatenate([index.sizes for _, index in sources]), config)
    if len(weights) < len(sources):
        without = [source.name for source, _ in sources if source.weight is None]
        raise ConfigError(
            f"data.train: {', '.join(without)} has no weight, but others do", hint="give all sources a weight, or none"
        )
    names = [source.name for source, _ in sources]
    if len(set(names)) < len(names):
        raise ConfigError("data.train: two sources have the same name", hint="give each source a unique name")
    return Mixture(
        [
            Portion(source.name, tuple(index.sizes.tolist()), weight)
            for (source, index), weight in zip(sources, weights, strict=True)
        ],
        config,
    )
