"""Makes the small checkpoint that tests keep of each format: ``python -m tests.checkpoint.make_format FOLDER``.

Run once, with the code that wrote the format, before the format changes; what it made stays as it is for good.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def tensors() -> dict[str, Any]:
    """Tensors of several kinds, the same on every call."""
    return {
        "model": {
            "layer.weight": torch.arange(12.0).reshape(3, 4) / 7,
            "layer.bias": torch.arange(3).to(torch.bfloat16),
            "scale": torch.tensor(0.1, dtype=torch.float64),
        },
        "optimizer0": {"layer.weight": {"exp_avg": torch.arange(12.0).reshape(3, 4) / 11, "step": torch.tensor(5.0)}},
    }


META = {"progress": {"epoch": 1, "step": 2, "global_step": 5}, "param_groups": [], "trainer": {"names": ["a", None]}}


def make(folder: Path) -> Path:
    """Write the checkpoint with the present code."""
    try:
        from disttrain.checkpoint.format.writer import write
    except ImportError:  # the code of format 1
        from disttrain.checkpoint.format.reader import write  # type: ignore[attr-defined,no-redef]
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return write(folder, "step-00000005", tensors=tensors(), meta=META, global_step=5)


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
