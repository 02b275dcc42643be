"""How far apart are the weights of one recipe in different layouts? By ``disttrain parity``, on three recipes.

Claim: over 1, 2 and 4 ranks, DDP, FSDP, HSDP and FSDP with tensor parallelism, ``max|w - w'| / max|w|`` after 20 steps
is at most 1e-6 with SGD and 1e-5 with AdamW (ten times that for tensor parallelism), and 0 with ``reduction: tree``
(but for tensor parallelism), every run killed half-way and resumed, but for the one that they are compared with.

Method: digits (convolutions), diabetes (a perceptron with dropout) and a language model of two blocks with dropout and
tied weights, global batches of 32 in micro batches of 8, on this machine, one thread a rank, gloo. The reference is
one process.

How to read it: a figure is the distance after the last step. The default sums round differently in every layout, so
their figures are rounding that grew over 20 steps; 0 means that no bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from disttrain.commands import parity, shards
from tests.support.language import write_sentences

LAYOUTS: Final = ("1", "2xddp", "4xddp", "2xfsdp", "4xfsdp", "2x2hsdp", "2x2tp")
OPTIMIZERS: Final = {
    "sgd": ({"name": "sgd", "lr": 0.05, "momentum": 0.9}, 1e-6),
    "adamw": ({"name": "adamw", "lr": 3e-3, "weight_decay": 0.05}, 1e-5),
}
RECIPES: Final = ("digits", "diabetes", "language")


def main() -> None:
    """Run all comparisons and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict[str, Any]] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in arguments.only.split(","):
            config = _config(recipe, Path(folder))
            for optimizer, (settings, tolerance) in OPTIMIZERS.items():
                for reduction in ("fast", "tree"):
                    out = Path(folder) / f"{recipe}-{optimizer}-{reduction}"
                    words = ["--config", str(config), "--layouts", ",".join(LAYOUTS), "--steps", str(arguments.steps)]
                    words += ["--reduction", reduction, "--tolerance", str(tolerance), "--out", str(out)]
                    words += ["--model.optimizer", json.dumps(settings)]
                    code = parity.main([*words, "--kill"])
                    found = json.loads((out / "parity.json").read_text())
                    row = {"recipe": recipe, "optimizer": optimizer, "reduction": reduction, "passed": code == 0}
                    rows.append(row | {layout["name"]: layout["weights"] for layout in found["layouts"]})
                    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
                    arguments.out.with_suffix(".md").write_text(_page(rows, arguments.steps))
    print(arguments.out.with_suffix(".md").read_text())


def _config(recipe: str, folder: Path) -> Path:
    """A recipe with its data packed beside it."""
    sizes = {"global_batch_size": 32, "micro_batch_size": 8}
    if recipe == "language":
        data = write_sentences(folder / "sentences")
        config = {
            "model": {"class_path": "tests.support.language.LanguageTask"},
            "data": {
                **{"train": f"{data}/train-{{0..2}}.tar", "val": f"{data}/val-0.tar", "test": f"{data}/test-0.tar"},
                "fields": {"tokens": "tokens.npy", "length": "length.cls"},
            },
        }
    else:
        shards.main(["pack", f"sklearn:{recipe}", str(folder / recipe), "--shards", "2"])
        config = yaml.safe_load(Path(f"recipes/{recipe}.yaml").read_text())
        config["data"] |= {split: f"{folder}/{recipe}/{split}.json" for split in ("train", "val", "test")}
        config["model"]["init_args"].pop("optimizer")
        config.pop("early_stopping")
    config["data"] |= sizes
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _page(rows: list[dict[str, Any]], steps: int) -> str:
    others = ("1-killed", *LAYOUTS[1:])
    lines = [
        "# Distances of weights between layouts",
        "",
        f"`max|w - w'| / max|w|` after {steps} steps, against one process that nothing disturbed; every other run was"
        " killed half-way and resumed (`1-killed`: in one process, too).",
        "",
        f"| recipe | optimizer | reduction | {' | '.join(others)} | within its bounds |",
        "|-|-|-|" + "-|" * (len(others) + 1),
    ]
    for row in rows:
        figures = " | ".join("0" if row[name] == 0 else f"{row[name]:.1e}" for name in others)
        passed = "yes" if row["passed"] else "**no**"
        lines.append(f"| {row['recipe']} | {row['optimizer']} | {row['reduction']} | {figures} | {passed} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    lines += [
        "",
        "Bounds: with `fast` 1e-6 for SGD, 1e-5 for AdamW, ten times that for `2x2tp`; with `tree` 0, but for `2x2tp`.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, {versions}; command: `python benchmarks/parity.py`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
