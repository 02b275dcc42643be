"""Layouts as they are written on the command line: ``1``, ``2xddp``, ``4xfsdp``, ``2x2hsdp``, ``2x2tp``, ``1@64``.

A layout is a number of ranks, a strategy, and behind an @ a micro batch size where it is not the recipe's. No torch
is loaded here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from disttrain.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """One way to spread a run.

    Attributes:
        name: as it was written.
        num_ranks: processes.
        settings: what the command line of a run says for it, beside the number of processes.
        tensor: ranks that share each layer. It cuts the sums inside a layer, so that rounding depends on it.
    """

    name: str
    num_ranks: int
    settings: tuple[str, ...] = ()
    tensor: int = 1


def parse_layouts(text: str) -> list[Layout]:
    """The layouts of a list such as ``1,2xddp,2x2hsdp``; the first is what the others are compared with.

    Raises:
        ConfigError: one is none, or there are fewer than two.
    """
    layouts = [parse_layout(part.strip()) for part in text.split(",") if part.strip()]
    names = [layout.name for layout in layouts]
    if len(set(names)) < 2:
        raise ConfigError(f"--layouts {text!r} names fewer than two layouts", mend="give some, such as 1,2xddp,2xfsdp")
    return list({layout.name: layout for layout in layouts}.values())


def parse_layout(text: str) -> Layout:
    """One layout.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+)(?:x(?:(\d+)x?)?(ddp|fsdp|hsdp|tp))?(?:@(\d+))?", text)
    if found is None:
        raise _none(text)
    micro = ("--data.micro_batch_size", found[4]) if found[4] else ()
    ranks, second, strategy = int(found[1]), found[2], found[3]
    if ranks < 1 or (second is not None and int(second) < 1) or (second is not None) != (strategy in ("hsdp", "tp")):
        raise _none(text)
    if strategy is None:
        if ranks > 1:
            raise _none(text)
        return Layout(text, 1, ("--trainer.parallel.strategy", "ddp", *micro))
    if strategy == "hsdp":
        degrees = ("--trainer.parallel.replicate", str(ranks), "--trainer.parallel.shard", second)
        return Layout(text, ranks * int(second), ("--trainer.parallel.strategy", "fsdp", *degrees, *micro))
    if strategy == "tp":
        assert second is not None
        settings = ("--trainer.parallel.strategy", "fsdp", "--trainer.parallel.tensor", second, *micro)
        return Layout(text, ranks * int(second), settings, tensor=int(second))
    return Layout(text, ranks, ("--trainer.parallel.strategy", strategy, *micro))


def _none(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is no layout",
        mend="write 1, RANKSxddp, RANKSxfsdp, COPIESxRANKShsdp (each copy sharded over so many ranks) or PARTSxRANKStp"
        " (FSDP over so many parts of the data, each shared by so many ranks), and @SIZE behind it for another micro"
        " batch size",
    )
