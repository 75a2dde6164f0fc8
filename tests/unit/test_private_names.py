"""Private names of libraries are in `_compat.py` modules alone, and those libraries have bounds."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.unit.trees import nodes, parsed

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src/tidegate").rglob("*.py"))
COMPAT = [path for path in SOURCES if path.name == "_compat.py"]
# These change between releases what we build on: their names, or what a call of theirs does.
BOUNDED = {"uvicorn", "google-genai", "httpx2", "redis", "prometheus-client", "websockets"}
OURS = {"tidegate", "__future__"}
# Private by their spelling, public by their documentation.
DOCUMENTED = {"_exit", "_replace", "_make", "_asdict", "_fields"}


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (one for extra in project["optional-dependencies"].values() for one in extra)
    return [Requirement(text) for text in (*project["dependencies"], *extras)]


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@cache
def _defined(path: Path) -> frozenset[str]:
    """The names that a module defines: functions, classes, variables and attributes."""
    found = set()
    for node in nodes(path):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.Attribute(ctx=ast.Store()):
                found.add(node.attr)
    return frozenset(found)


@cache
def _defined_anywhere() -> frozenset[str]:
    return frozenset().union(*map(_defined, SOURCES))


def _private_names(path: Path) -> Iterator[str]:
    """Private names that a module imports, or reads of what neither it nor, for `self` and `cls`,
    a class of ours that it inherits from has defined."""
    for node in nodes(path):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] not in OURS:
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                names = [] if node.attr in _defined_anywhere() else [node.attr]
            case ast.Attribute():
                names = [] if node.attr in _defined(path) else [node.attr]
            case _:
                names = []
        yield from (name for name in names if _is_private(name) and name not in DOCUMENTED)


@pytest.mark.slow
def test_private_names_of_libraries_are_in_compat_modules_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path not in COMPAT
        for name in _private_names(path)
    }
    assert not found


@pytest.mark.parametrize("path", COMPAT, ids=lambda path: path.parent.name)
def test_a_compat_module_names_its_bounds_and_the_test_that_guards_it(path: Path) -> None:
    said = ast.get_docstring(parsed(path)) or ""
    named = re.search(r"^([a-z0-9-]+) (>= \S+, < \S+?)\. Guarded by `([^`]+)`", said, re.MULTILINE)
    assert named is not None
    package, versions, test = named.groups()
    assert (ROOT / test).is_file()
    bounds = {one.specifier for one in _requirements() if one.name == package}
    assert bounds == {SpecifierSet(versions.replace(" ", ""))}


@pytest.mark.parametrize("package", sorted(BOUNDED))
def test_packages_whose_internals_we_build_on_have_an_upper_bound(package: str) -> None:
    bounds = [one.specifier for one in _requirements() if one.name == package]
    assert bounds
    for specifier in bounds:
        assert any(one.operator == "<" for one in specifier), str(specifier)
