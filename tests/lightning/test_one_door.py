"""Protected parts of Lightning are named in ``disttrain/lightning`` alone, and there by no more than so many places."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import disttrain

PACKAGE = Path(disttrain.__file__).parent
MOST_INSIDE = 45
DEFINED = re.compile(r"(?:def|class) (_\w+)|self\.(_\w+)(?:, self\._\w+)* *[:=]|^(_\w+) *[:=]", re.MULTILINE)
ELSEWHERE = {
    *("_C", "_apply", "_asdict", "_replace", "_exit", "_version", "_actions", "_lengths", "_spec", "_timeout"),
    *("_check_input_dim", "_ddp_params_and_buffers_to_ignore"),
}
"""Names of Python's and torch's own that Lightning happens to use for something, too."""


def is_protected(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree: ast.AST, *, fields: bool = True) -> set[str]:
    """What a module defines: functions, classes, globals and fields of ``self`` or a class."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif fields and isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_protected(name)}


def is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def lightnings_names() -> frozenset[str]:
    """The protected names that Lightning's own sources define; by pattern, as parsing them all takes long."""
    spec = importlib.util.find_spec("lightning")
    assert spec is not None
    assert spec.origin is not None
    names: set[str] = set()
    for part in ("pytorch", "fabric"):
        for path in (Path(spec.origin).parent / part).rglob("*.py"):
            names |= {name for groups in DEFINED.findall(path.read_text()) for name in groups if is_protected(name)}
    return frozenset(names - ELSEWHERE)


@cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def disttrains_names() -> frozenset[str]:
    return frozenset().union(*(own_names(tree) for tree in trees().values()))


def references(name: str, tree: ast.Module, lightnings: frozenset[str], ours: frozenset[str]) -> Iterator[str]:
    """Where a module of ours names a protected part of Lightning.

    Such a name on another object than ``self`` is ours if this module defines it; on ``self``, if any of ours does,
    since it may be inherited. What a class overrides is found by running :func:`test_no_class_overrides` instead.
    """
    here = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{name}:{node.lineno} imports {part}" for part in parts if is_protected(part))
        elif isinstance(node, ast.Attribute) and is_protected(node.attr) and node.attr in lightnings:
            if node.attr not in (ours if is_self(node.value) else here):
                yield f"{name}:{node.lineno} names {node.attr}"
            elif isinstance(node.value, ast.Call) and name.startswith("lightning/"):
                yield f"{name}:{node.lineno} calls {node.attr}"
        elif isinstance(node, ast.Constant) and node.value in lightnings and node.value not in ours:
            yield f"{name}:{node.lineno} names {node.value!r} in a string"


def found_in(tree: dict[str, ast.Module], *, inside: bool) -> list[str]:
    return [
        place
        for name, module in tree.items()
        if name.startswith("lightning/") is inside
        for place in references(name, module, lightnings_names(), disttrains_names())
    ]


def overridden(tree: ast.Module, lightnings: frozenset[str]) -> list[str]:
    """Protected methods of Lightning that classes of the door override."""
    return [
        f"{node.lineno} overrides {node.name}"
        for each in ast.walk(tree)
        if isinstance(each, ast.ClassDef)
        for node in each.body
        if isinstance(node, ast.FunctionDef) and is_protected(node.name) and node.name in lightnings
    ]


def test_nothing_outside_names_a_protected_part_of_lightning() -> None:
    outside = found_in(trees(), inside=False)
    told = "\n".join(outside)
    assert not outside, f"{told}\ngive disttrain/lightning/internals.py a function for it, with a contract test"


def test_no_class_outside_overrides_a_protected_method_of_lightning() -> None:
    wrong = []
    for name in trees():
        if name.startswith("lightning/") or name.endswith("__main__.py"):
            continue
        module = importlib.import_module(f"disttrain.{name.removesuffix('.py').replace('/', '.')}")
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("lightning.")]
            names = {each for each in vars(kind) if is_protected(each) and each != "_abc_impl"}
            wrong += [f"{name}: {kind.__name__}.{each}" for each in names if any(each in vars(base) for base in bases)]
    assert not wrong, f"{wrong}: give a class of disttrain/lightning/bases.py a public method for it"


def test_the_door_is_no_wider_than_it_was() -> None:
    inside = found_in(trees(), inside=True)
    for name, tree in trees().items():
        if name.startswith("lightning/"):
            inside += [f"{name}:{place}" for place in overridden(tree, lightnings_names())]
    told = "\n".join(inside)
    assert len(inside) <= MOST_INSIDE, f"{len(inside)} references, more than {MOST_INSIDE}:\n{told}"


@pytest.mark.parametrize(
    "line",
    [
        "trainer.fit_loop._should_accumulate()",
        "trainer._signal_connector = None",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "from lightning.fabric.utilities.types import _Stateful",
        "self._combined_loader",
        "getattr(trainer, '_checkpoint_connector')",
    ],
)
def test_a_new_reference_is_found(line: str) -> None:
    assert list(references("callbacks/new.py", ast.parse(line), lightnings_names(), disttrains_names()))


@pytest.mark.parametrize("line", ["torch._foreach_add_(a, b)", "os._exit(1)", "self._trainer", "super()._position()"])
def test_other_names_pass(line: str) -> None:
    assert not list(references("callbacks/new.py", ast.parse(line), lightnings_names(), disttrains_names()))
