"""Slow tests begin neither together nor last, where tests run beside one another; and one process
runs all that share a deployment, or the trees of all source files.

Each process begins with an equal part of all tests, in their order, and takes from the others what
they have left. A slow test that begins last keeps one process busy while the others have nothing to
do; slow ones that begin together take the time from one another that they wait for. What is taken
is the end of a part: the modules that share a deployment (`tests/product.py`), whose start takes
five seconds of a core, are at the beginning of the first; so are those that share trees
(`tests/unit/trees.py`), which take a second. The other modules are mixed: those of one folder
mostly wait, or mostly compute, and together they would idle, or hinder one another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import pytest

_BEGUN_BY = 1 / 2  # of a part
_TREES = "tests.unit.trees"
_DATABASES = ("database_url", "empty_database_url")
_SHARED = {"product", _TREES}

T = TypeVar("T")


def order(items: list[pytest.Item]) -> None:
    """Put the tests of a run in that order."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        items[:] = mixed((item, item.nodeid.partition("::")[0]) for item in items)
        slow = [item for item in items if item.get_closest_marker("slow")]
        others = [item for item in items if not item.get_closest_marker("slow")]
        others = sharing_first((item, item.path, _uses(item)) for item in others)
        items[:] = [one for part in parts(slow, others, processes) for one in part]


def taken_first(items: Iterable[pytest.Item]) -> None:
    """Have each test set up its database before all else, and so give it back after all else."""
    for item in items:
        if isinstance(item, pytest.Function):
            item.fixturenames.sort(key=lambda name: name not in _DATABASES)  # others as they were


def _uses(item: pytest.Item) -> Sequence[str]:
    """The fixtures of a test, and the module that it has `nodes` from."""
    if not isinstance(item, pytest.Function):
        return ()
    nodes = getattr(item.module, "nodes", None)
    return [*item.fixturenames, getattr(nodes, "__module__", "")]


def sharing_first(tests: Iterable[tuple[T, Path, Sequence[str]]]) -> list[T]:
    """The tests, each given with its module and what it uses, with those of modules that share a
    deployment or trees before all others."""
    known = list(tests)
    sharing = {module for _, module, uses in known if not _SHARED.isdisjoint(uses)}
    return [test for test, _, _ in sorted(known, key=lambda one: one[1] not in sharing)]


def mixed(tests: Iterable[tuple[T, str]]) -> list[T]:
    """The tests, each given with the name of its module, by modules whose order means nothing and
    is the same in each run."""
    known = sorted(tests, key=lambda one: (crc32(one[1].encode()), one[1]))
    return [test for test, _ in known]


def parts(slow: Sequence[T], others: Sequence[T], count: int) -> list[list[T]]:
    """As many parts as there are processes, each with its slow ones spread over its beginning."""
    found = []
    for number in range(count):
        first, end = (len(others) * edge // count for edge in (number, number + 1))
        part, mine = list(others[first:end]), slow[number::count]
        share = (end - first) * _BEGUN_BY / max(1, len(mine))
        later = (number + 1) / (count + 1)  # in each part at another place
        for place, one in reversed(list(enumerate(mine))):
            part.insert(int((place + later) * share), one)
        found.append(part)
    return found
