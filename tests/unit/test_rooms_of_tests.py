"""docs/testing.md: every room of the code has its tests there, and every folder of tests a room."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
# Only lead to what they start.
UNTABLED = {"__init__.py", "__main__.py"}


def test_every_room_of_the_code_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.+?) \|", TEXT, re.M)
    named = {name for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    source = ROOT / "src/tidegate"
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in source.iterdir()
        if path.suffix == ".py" or (path.is_dir() and list(path.rglob("*.py")))
    }
    markers = {"valkey", "postgres", "browser", "slow"}
    assert named - markers == rooms - UNTABLED


def test_every_folder_of_tests_is_named_and_every_name_is_there() -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
    } - {"unit"}
    named = set(
        re.findall(
            r"`((?:unit|integration|contract|property|browser|acceptance)(?:/[\w./]*)?)`", TEXT
        )
    )
    missing = {f for f in folders if not any(f == n or f.startswith(f"{n}/") for n in named)}
    assert missing == set()
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize("room", ["unit", "contract"])
def test_few_examples_of_a_property_are_tried_because_many_are_elsewhere(room: str) -> None:
    own = [
        path.name
        for path in (ROOT / "tests" / room).rglob("test_*.py")
        if re.search(r"\bmax_examples=", path.read_text(encoding="utf-8"))
    ]
    assert own == [], "as many as the profile says, so that `make chaos` can try more"
    few, many = (settings.get_profile(name).max_examples for name in ("suite", "deep"))
    assert few * 30 <= many
    (deep,) = re.findall(r"pytest (.*) --hypothesis-profile=deep", (ROOT / "Makefile").read_text())
    assert f"tests/{room}" in deep.split()
    assert "-m hypothesis" in deep
