"""Where the slow tests of a run are, and those that share a deployment."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.order import mixed, parts, sharing_first
from tests.unit.trees import nodes


@pytest.mark.parametrize(("slow", "others"), [(0, 40), (7, 400), (30, 400), (9, 0), (1, 3)])
def test_slow_tests_begin_neither_together_nor_last(slow: int, others: int) -> None:
    all_slow, all_others = [f"slow {n}" for n in range(slow)], [f"other {n}" for n in range(others)]
    found = parts(all_slow, all_others, 5)
    flat = [one for part in found for one in part]
    assert sorted(flat) == sorted([*all_slow, *all_others])
    assert [one for one in flat if one in all_others] == all_others, "as they were"
    if others < 40:
        return
    places = [[place for place, one in enumerate(part) if "slow" in one] for part in found]
    assert max(map(len, places)) - min(map(len, places)) <= 1
    assert all(
        place < len(part) * 3 / 4
        for part, mine in zip(found, places, strict=True)
        for place in mine
    )
    first = [mine[0] for mine in places if mine]
    assert len(set(first)) == len(first)


def test_modules_are_whole_and_not_beside_those_of_their_folder() -> None:
    modules = [f"{folder}/test_{n}.py" for folder in ("fast", "slow") for n in range(20)]
    found = mixed((f"{module}::{n}", module) for n in range(3) for module in modules)
    assert sorted(found) == sorted(f"{module}::{n}" for n in range(3) for module in modules)
    order = [name.partition("::")[0] for name in found]
    assert order == [module for module in dict.fromkeys(order) for _ in range(3)]
    assert [name[-1] for name in found] == ["0", "1", "2"] * 40, "in their own order"
    folders = [module.partition("/")[0] for module in order[::3]]
    assert sum(a != b for a, b in pairwise(folders)) > 10


def test_modules_that_share_a_deployment_are_whole_and_first() -> None:
    a, b, c = Path("a.py"), Path("b.py"), Path("c.py")
    tests: list[tuple[str, Path, list[str]]] = [
        ("a1", a, []),
        ("b1", b, ["tmp_path"]),
        ("b2", b, ["product"]),
        ("c1", c, ["product"]),
        ("a2", a, ["database_url"]),
    ]
    assert sharing_first(tests) == ["b1", "b2", "c1", "a1", "a2"]


def test_so_are_those_that_share_trees() -> None:
    a, b = Path("a.py"), Path("b.py")
    tests: list[tuple[str, Path, list[str]]] = [("a", a, [""]), ("b", b, [nodes.__module__])]
    assert sharing_first(tests) == ["b", "a"]
