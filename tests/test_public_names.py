"""The public names, what importing them costs, and which module may import which."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import disttrain

ROOT = Path(disttrain.__file__).parent

PUBLIC = [
    "DDP",
    "EMA",
    "FSDP",
    "BadSampleError",
    "BatchPlan",
    "CacheConfig",
    "Callback",
    "Checkpointing",
    "ClassificationTask",
    "DisttrainError",
    "EarlyStopping",
    "Field",
    "FilteredSampleError",
    "HooksConfig",
    "LoaderConfig",
    "MirrorConfig",
    "OptimizerConfig",
    "Order",
    "OrderConfig",
    "ParallelConfig",
    "Preempted",
    "RandomResizedCrop",
    "RegressionTask",
    "SampleLedger",
    "ScheduleConfig",
    "ShardIndex",
    "ShardedDataModule",
    "ShardedDropout",
    "ShuffleConfig",
    "SourceConfig",
    "Task",
    "Trainer",
    "UpdateGuard",
    "__version__",
]

LAYERS: dict[str, int] = {
    **dict.fromkeys(
        [
            "beats",
            "durations",
            "endings",
            "errors",
            "files",
            "launcher",
            "meeting",
            "output",
            "reading",
            "signals",
            "terminal",
            "version",
            "whereabouts",
            "world",
        ],
        0,
    ),
    **dict.fromkeys(
        [
            *(f"data.{name}" for name in ("tar", "index", "order", "samples", "write", "tables", "sources", "pack")),
            *(f"data.{name}" for name in ("tar_header", "patterns", "evidence")),
            *(f"data.{name}" for name in ("mixture", "objects", "remote", "remote_index", "sidecar", "transport")),
            *(f"data.{name}" for name in ("indexing", "statistics", "stream", "together", "http_range")),
            "data.verify",
            "data.verify_keys",
            "metrics_file",
            *(
                f"slurm.{name}"
                for name in ("agent", "commands", "job", "render", "requeue", "runs", "site", "snapshot")
            ),
            "checkpoint.checksum",
            "checkpoint.fence",
            "checkpoint.folder",
            "checkpoint.marker",
            "checkpoint.mirror",
            "checkpoint.prune",
            "parallel.config",
            "parallel.tree",
        ],
        1,
    ),
    **dict.fromkeys(
        [
            "data.cache",
            "data.checks",
            "data.decode",
            "data.field",
            "data.draws",
            "data.foreign",
            "data.images",
            "data.values",
            "data.bad_samples",
            "data.device",
            "data.batches",
            "data.hooks",
            "data.open_shards",
            "data.shard_files",
            "data.mapped_shards",
            "data.bus_errors",
            "data.spans",
            "data.workers",
            "data.verify_decode",
            "data.plan",
            "data.reader",
            "data.store",
            "models.*",
            "optim",
            "runs",
            "metrics_log",
            "report.*",
        ],
        2,
    ),
    **dict.fromkeys(
        [f"parallel.{name}" for name in ("agree", "alike", "gradients", "optimizers", "randomness", "shard")], 2
    ),
    **dict.fromkeys(["parallel.compiling", "parallel.initialize", "parallel.precision", "parallel.synced_norm"], 2),
    **dict.fromkeys(
        [
            "parallel.collectives",
            "parallel.determinism",
            "parallel.fsdp_internals",
            "parallel.narrow",
            "parallel.recompute",
        ],
        2,
    ),
    **dict.fromkeys(["data.padding", "parallel.trained"], 2),
    **dict.fromkeys(["lightning.*", "parallel.joining", "parallel.store", "parallel.votes"], 2),
    **dict.fromkeys(["parallel.ranks", "parallel.reduction", "parallel.summation", "parallel.tensor"], 2),
    **dict.fromkeys([f"checkpoint.{name}" for name in ("store", "groups", "optimizers", "state")], 2),
    **dict.fromkeys(
        [f"checkpoint.{name}" for name in ("mirroring", "saver", "staging", "verify", "weights", "write")], 2
    ),
    **dict.fromkeys(["parallel.buckets", "parallel.clipping", "parallel.memory_errors"], 2),
    **dict.fromkeys(["parallel.strategies", "data.loader", "data.module", "data.splits", "tasks.*"], 3),
    **dict.fromkeys(["checkpoint.contents", "parallel.module_tensors"], 2),
    **dict.fromkeys(["parallel.base_strategy", "data.user_loaders"], 3),
    **dict.fromkeys(["attempts", "callbacks.*"], 4),
    "lightning_advice": 4,
    **dict.fromkeys(["doctor.*", "parity.*"], 4),
    **dict.fromkeys(["trainer", "commands.*"], 5),
    **dict.fromkeys(["cli", "__main__"], 6),
}
WITHOUT_TORCH = [name for name, layer in LAYERS.items() if layer <= 1]
"""Modules that a command may load without waiting seconds for torch."""


def test_the_public_names() -> None:
    assert disttrain.__all__ == PUBLIC
    assert dir(disttrain) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_can_be_imported(name: str) -> None:
    value = getattr(disttrain, name)
    assert value is not None
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("disttrain."), f"{name} comes from {value.__module__}"
        assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'disttrain' has no attribute 'Trainor'"):
        _ = disttrain.Trainor


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh Python holds after some imports."""
    code = f"import json, sys; {'; '.join(f'import {name}' for name in modules)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


HEAVY = {"torch", "lightning", "torchmetrics", "webdataset", "matplotlib", "PIL", "sklearn", "pyarrow"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("disttrain", "disttrain.cli") & HEAVY == set()
    assert loaded_by("disttrain") & {"numpy"} == set()


def test_the_lowest_layers_load_no_torch() -> None:
    assert loaded_by(*(f"disttrain.{name}" for name in WITHOUT_TORCH)) & HEAVY == set()


@cache
def modules() -> dict[str, Path]:
    """All modules by name below the package; a package is named as its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of the package, wherever in it the import stands."""
    known = set(modules())
    graph = {}
    for name, path in modules().items():
        if not name:  # the package itself imports its names when they are first used
            continue
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        targets = set()
        for target in found:
            package, _, rest = target.partition(".")
            if package == "disttrain":
                # the longest prefix that is a module: `a.b.Name` is the name of `a.b`
                parts = rest.split(".")
                prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
                own = next((prefix for prefix in prefixes if prefix in known), "")
                targets.add(own)
        graph[name] = targets
    return graph


def layer(module: str) -> int | None:
    """A module's layer; a package of several has that of its ``*``."""
    if module in LAYERS:
        return LAYERS[module]
    return LAYERS.get(f"{module}.*", LAYERS.get(f"{module.partition('.')[0]}.*"))


def is_bare_package(module: str) -> bool:
    """A package whose ``__init__.py`` imports nothing of ours belongs to no layer."""
    return modules()[module].name == "__init__.py" and not imports()[module]


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    missing = [name for name in imports() if layer(name) is None and not is_bare_package(name)]
    assert not missing, f"add {missing} to LAYERS"
    gone = [name for name in LAYERS if not name.endswith(".*") and name not in modules()]
    assert not gone, f"take {gone} out of LAYERS"


def test_modules_import_from_their_own_layer_or_lower_ones_only() -> None:
    wrong = []
    for module, targets in imports().items():
        for target in targets:
            assert target, f"disttrain.{module} imports from the package's own facade"
            above, below = layer(module), layer(target)
            if above is not None and below is not None and below > above:
                wrong.append(f"disttrain.{module} (layer {above}) imports disttrain.{target} (layer {below})")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Importing a module of another package runs that package's ``__init__.py`` too, which counts as an import."""
    graph = {}
    for module, targets in imports().items():
        packages = {t.rpartition(".")[0] for t in targets} & set(imports())
        graph[module] = (targets | {p for p in packages if not module.startswith(f"{p}.")}) - {module}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


@pytest.mark.parametrize("module", [name for name in WITHOUT_TORCH if name.startswith("data.")])
def test_the_lowest_data_modules_name_no_torch(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add((node.module or "").partition(".")[0])
    assert named & {"torch", "lightning", "torchmetrics"} == set()


@pytest.mark.parametrize(
    "module", ["errors", "world", "data.order", "data.mixture", "data.index", "parallel.config", "optim"]
)
def test_modules_open_with_a_docstring(module: str) -> None:
    assert importlib.import_module(f"disttrain.{module}").__doc__
