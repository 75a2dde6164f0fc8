"""What a test needs, as markers: `valkey`, `postgres`, `browser`. `slow` is given by hand.

They are found in the code that a test can reach, its fixtures and the functions of `tests/` that
either calls, so that no test has to name what it starts, and none can name it wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

Needs = frozenset[str]
STORES = frozenset({"valkey", "postgres"})
# What starts them, by the name that code calls it by, or by its own place.
_STARTS: dict[str, Needs] = {
    "ValkeyServer": frozenset({"valkey"}),
    "PostgresServer": frozenset({"postgres"}),
    "Daemon": frozenset({"valkey"}),
    "ensure": STORES,
    "Keeper": STORES,
    "async_playwright": frozenset({"browser"}),
    "tests.product.started": STORES,
}
# Rooms whose tests start servers or whole deployments by commands.
_ROOMS: dict[str, Needs] = {
    "tests/integration/embedded/": STORES,
    "tests/integration/limiter/": frozenset({"valkey"}),
    "tests/integration/packaging/": STORES,
    "tests/integration/processes/": STORES,
    "tests/integration/runs/": STORES,
    "tests/integration/servers/": frozenset({"valkey"}),
    "chaos/": STORES,
}
_OURS = ("tests.", "chaos.")


def mark(items: list[pytest.Item]) -> None:
    """Mark each test with what it needs."""
    for item in items:
        needs = sorted(needs_of(item))
        for need in needs:
            item.add_marker(need)
        if needs and item.nodeid.startswith("tests/unit/"):
            raise pytest.UsageError(f"{item.nodeid} needs {needs}: its place is not tests/unit")


def needs_of(item: pytest.Item) -> Needs:
    """What the test, or a fixture of it, starts."""
    assert isinstance(item, pytest.Function)
    needs = {
        need for room, needs in _ROOMS.items() if item.nodeid.startswith(room) for need in needs
    }
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    for function in (item.obj, *(fixture.func for several in fixtures for fixture in several)):
        needs |= starts(_plain(function))
    return frozenset(needs)


@cache
def starts(function: FunctionType) -> Needs:
    """What a function starts, itself or through functions of `tests/` and `chaos/`."""
    found: Needs = frozenset()
    seen: set[Any] = set()
    left = [function]
    while left:
        one = left.pop()
        if one not in seen:
            seen.add(one)
            found |= _STARTS.get(f"{one.__module__}.{one.__qualname__}", frozenset())
            for name, value in _used(one):
                if name in _STARTS:
                    found |= _STARTS[name]
                elif isinstance(value, type) and value.__module__.startswith(_OURS):
                    left += [each for part in value.__mro__ for each in _methods(part)]
                elif isinstance(value, FunctionType) and value.__module__.startswith(_OURS):
                    left.append(_plain(value))
    return found


@cache
def _used(function: FunctionType) -> tuple[tuple[str, Any], ...]:
    """The global names that a function uses, with what they are; of a module also its own."""
    names, found = list(_names(function.__code__)), []
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and value.__name__.startswith(_OURS):
            found += [(inner, vars(value)[inner]) for inner in names if inner in vars(value)]
        elif value is not None:
            found.append((name, value))
    return tuple(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _methods(part: type) -> Iterator[FunctionType]:
    for value in vars(part).values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            yield _plain(function)


def _plain(function: Callable[..., Any]) -> FunctionType:
    """Without its decorators, and not bound."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    found = getattr(function, "__func__", function)
    assert isinstance(found, FunctionType), found
    return found
