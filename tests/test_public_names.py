"""The public names, what importing them costs, and which folder may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

import disttrain

ROOT = Path(disttrain.__file__).parent

LAYERS = [
    ["errors", "version"],
    ["system"],
    ["lightning"],
    ["distributed", "optim"],
    ["parallel"],
    ["data", "models"],
    ["checkpoint", "slurm"],
    ["run", "tasks"],
    ["strategies", "report"],
    ["callbacks"],
    ["doctor", "parity", "trainer"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
"""Folders and top-level modules, lowest first. Each imports from lower ones only."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

WITHOUT_TORCH = (
    *("cli", "errors", "version", "run.metrics_file", "run.listing", "parallel.config", "parallel.reduction.tree"),
    *("checkpoint.cleanup", "checkpoint.remote.copies", "data.order.*", "data.pack.*", "data.index.*", "data.remote.*"),
    *(f"checkpoint.format.{name}" for name in ("checksum", "fence", "marker", "retention")),
    *(f"data.verify.{name}" for name in ("shards", "keys", "statistics")),
    *(f"system.{name}" for name in ("durations", "files", "heartbeat", "output", "reading", "signals", "terminal")),
    *(f"distributed.{name}" for name in ("exit_codes", "parent_process", "rendezvous", "world")),
    "slurm.*",
)
"""Modules that a command may load without waiting seconds for torch."""


def test_each_public_name_can_be_imported_and_is_documented() -> None:
    for name in disttrain.__all__:
        value = getattr(disttrain, name)
        assert value is not None
        if name != "__version__":
            assert value.__name__ == name
            assert value.__module__.startswith("disttrain."), f"{name} comes from {value.__module__}"
            assert value.__doc__, f"{name} has no docstring"
    assert dir(disttrain) == disttrain.__all__


def test_type_checkers_see_the_public_names() -> None:
    """What stands under TYPE_CHECKING cannot be derived; it is compared with the table instead."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    named = {
        (node.module, alias.asname) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert named == {(module, name) for module, names in disttrain._PUBLIC.items() for name in names}


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


@cache
def modules() -> dict[str, Path]:
    """All modules by name below the package; a package is named as its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def without_torch() -> list[str]:
    """The modules of :data:`WITHOUT_TORCH`."""
    names = [pattern for pattern in WITHOUT_TORCH if not pattern.endswith(".*")]
    folders = tuple(pattern.removesuffix("*") for pattern in WITHOUT_TORCH if pattern.endswith(".*"))
    return names + [name for name in modules() if name.startswith(folders)]


def test_modules_for_quick_commands_load_no_torch() -> None:
    assert loaded_by(*(f"disttrain.{name}" for name in without_torch())) & HEAVY == set()


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
                assert own, f"disttrain.{name} imports from the package's own facade"
                targets.add(own)
        graph[name] = targets
    return graph


def test_every_folder_has_a_layer() -> None:
    tops = {name.partition(".")[0] for name in modules() if name}
    assert tops == set(LAYER)


def test_imports_point_down_only() -> None:
    wrong = []
    for module, targets in imports().items():
        above = module.partition(".")[0]
        for target in targets:
            below = target.partition(".")[0]
            if above != below and LAYER[below] >= LAYER[above]:
                wrong.append(f"disttrain.{module} imports disttrain.{target}, which is not in a lower layer")
    assert not wrong, "\n".join(wrong)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead to each other in a circle; empty where none do."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph.get(name, ())):
                if circle := visit(target, [*path, name]):
                    return circle
            done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def folded(name_of: Callable[[str], str | None]) -> dict[str, set[str]]:
    """The graph of imports with modules put together by a name; None leaves a module out."""
    graph: dict[str, set[str]] = {}
    for module, targets in imports().items():
        if (above := name_of(module)) is not None:
            found = {below for target in targets if (below := name_of(target)) is not None}
            graph[above] = graph.get(above, set()) | (found - {above})
    return graph


def inside(folder: str) -> Callable[[str], str | None]:
    """Names subfolders of a folder, and modules right in it; its ``__init__`` and the rest have none."""
    return lambda module: (
        module.removeprefix(f"{folder}.").partition(".")[0] if module.startswith(f"{folder}.") else None
    )


def test_no_folders_import_each_other_in_a_circle() -> None:
    assert not (circle := find_circle(folded(lambda module: module.partition(".")[0]))), " -> ".join(circle)
    for folder in LAYER:
        assert not (circle := find_circle(folded(inside(folder)))), f"in {folder}: {' -> '.join(circle)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Importing a module of another package runs that package's ``__init__.py`` too, which counts as an import."""
    graph = {}
    for module, targets in imports().items():
        packages = {t.rpartition(".")[0] for t in targets} & set(imports())
        graph[module] = (targets | {p for p in packages if not module.startswith(f"{p}.")}) - {module}
    assert not (circle := find_circle(graph)), " -> ".join(circle)


def test_folders_and_the_top_stay_small() -> None:
    folders: dict[Path, list[str]] = {}
    for path in modules().values():
        folders.setdefault(path.parent, []).append(path.name)
    assert len(folders.pop(ROOT)) <= 8
    assert not {folder: names for folder, names in folders.items() if len(set(names) - {"__init__.py"}) > 15}


def test_modules_open_with_a_docstring() -> None:
    assert not [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]


def named_packages(module: str) -> Iterable[str]:
    """The top-level packages that a module names in imports, wherever they stand."""
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_the_data_modules_without_torch_name_none() -> None:
    for module in without_torch():
        if module.startswith("data."):
            assert not set(named_packages(module)) & {"torch", "lightning", "torchmetrics"}, module
