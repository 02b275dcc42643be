"""Check that all ranks run the same thing: library versions, source code, settings.

A node with a different environment, an outdated checkout, or an override that only some ranks received would silently
train something nobody asked for. The ranks compare short digests once, after they have joined. Only if the digests
differ do they exchange the underlying facts, and all raise the same error with the ranks and the differences. Cost:
reading the sources of the package and of the user's modules (15 ms for 154 files), and one small all-gather.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import socket
import sys
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from disttrain.distributed.synchronize_errors import gather, is_distributed
from disttrain.errors import ConfigError
from disttrain.system.terminal import redacted
from disttrain.version import __version__

OWN_TO_A_NODE: Final = ("config", "data.cache.directory")
"""Settings that may differ between nodes: where files are."""
_SHOWN: Final = 6
_SHOWN_CHARACTERS: Final = 160
_MODULE: Final = "code of module "


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raise on every rank if any rank runs something different. Collective.

    Args:
        settings: this rank's settings by dotted name.

    Raises:
        ConfigError: versions, sources or settings differ.
    """
    if not is_distributed():
        return
    facts = {**versions(), **_sources(), **_texts(settings)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    told = gather(digest)
    if len(set(told)) == 1:
        return
    every = gather((socket.gethostname(), facts))
    differing = describe_differences([each for _, each in every], [host for host, _ in every])
    if not differing:
        return
    raise ConfigError(
        f"the ranks differ in versions, code or settings:\n    {differing}",
        hint="install the same versions and the same code on every node, and give every rank the same settings",
    )


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a rank computes with, by name."""
    found = {
        "disttrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "numpy": np.__version__,
    }
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        nccl: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found["NCCL"] = ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)
    return found


def describe_differences(every: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Describe differences between ranks, one per line: ``torch: 2.13.0 on rank 0; 2.12.0 on rank 1 (node7)``.

    Args:
        every: each rank's facts by name.
        hosts: each rank's node.
    """
    lines = []
    for name in sorted({name for facts in every for name in facts}, key=_order):
        by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(every):
            by_value.setdefault(facts.get(name, "missing"), []).append(rank)
        if name.startswith(_MODULE):
            by_value.pop("missing", None)  # not a difference: ranks may have loaded different sets of modules
        if len(by_value) > 1:
            shown = around_the_difference([redacted(value) for value in by_value])
            if len(set(shown)) == 1:
                shown = [f"secret {number}" for number, _ in enumerate(by_value, start=1)]
            kinds = (
                f"{text} on {name_ranks(ranks, hosts)}" for text, ranks in zip(shown, by_value.values(), strict=True)
            )
            lines.append(f"{name}: {'; '.join(kinds)}")
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n    ".join([*lines[:_SHOWN], *more])


def around_the_difference(values: Sequence[str]) -> list[str]:
    """Return differing values unchanged if short, otherwise excerpts around the first differing character."""
    if max(map(len, values)) <= _SHOWN_CHARACTERS:
        return list(values)
    pairs = zip(min(values), max(values), strict=False)  # of all values, these two share the shortest prefix
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(map(len, values)))
    start = max(0, same - _SHOWN_CHARACTERS // 3)
    end = start + _SHOWN_CHARACTERS
    return [f"{'...' * (start > 0)}{value[start:end]}{'...' * (len(value) > end)}" for value in values]


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Format ranks for a message: ``rank 0-3, 5 (n1, n2)``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    numbers = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks)))
    where = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"rank {numbers} ({where})"


def _order(name: str) -> tuple[int, str]:
    """Sort key: versions first, then code, then settings."""
    return (1 if name.startswith("code ") else 2 if name.startswith("setting ") else 0, name)


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in settings.items() if not name.startswith(OWN_TO_A_NODE)}
    # A function's repr ends with its address, which differs between processes.
    return {f"setting {name}": re.sub(r" at 0x\w+", "", repr(value)) for name, value in kept.items()}


def package_checksum() -> str:
    """Return one checksum over all sources of this package."""
    own = {name: text for name, text in _sources().items() if not name.startswith(_MODULE)}
    return f"{zlib.crc32(json.dumps(own).encode()):08x}"


def _sources() -> dict[str, str]:
    """Return checksums of this package's sources, and of loaded modules outside the stdlib and site-packages."""
    root = Path(__file__).parents[1]
    files = {f"code of {root.name}/{path.relative_to(root)}": path for path in root.rglob("*.py")}
    paths = sysconfig.get_paths()
    installed = tuple({paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.endswith(".py") and name != "__main__" and not file.startswith((*installed, str(root))):
            files[f"{_MODULE}{name}"] = Path(file)
    return {name: _checksum(path) for name, path in sorted(files.items())}


def _checksum(path: Path) -> str:
    try:
        return f"{zlib.crc32(path.read_bytes()):08x}"
    except OSError as error:
        return f"unreadable ({error.strerror})"
