"""docs/code.md: the map has every module, and each says in its first line what it holds."""

from __future__ import annotations

import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/code_document.py"


@pytest.fixture(scope="module")
def document() -> ModuleType:
    spec = spec_from_file_location("code_document", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_on_the_map(document: ModuleType) -> None:
    modules = {path for path in document.SOURCE.rglob("*.py") if path.name != "__init__.py"}
    assert modules - document.shown() == set()


def test_what_the_map_names_is_there(document: ModuleType) -> None:
    text = document.HEAD.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:[a-z_]+/)+[a-z_0-9]+)(?:\.py|\.lua)?\b", text))
    named = {name for name in named if not name.startswith(("src/", "scripts/", "docs/"))}
    assert len(named) > 20
    missing = [
        name
        for name in sorted(named)
        if not any(
            (document.SOURCE / folder / f"{name}{ending}").exists()
            for folder in ("", "limiter/")
            for ending in (".py", ".lua", ".sql", "")
        )
    ]
    assert missing == []


def test_each_answer_names_what_its_files_have(document: ModuleType) -> None:
    text = document.HEAD.read_text(encoding="utf-8").partition("## Where to look")[2]
    answers = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")]
    assert len(answers) > 8
    missing = []
    for answer in answers[1:]:
        spans = [span for span in re.findall(r"`([^`]+)`", answer) if " " not in span]
        named = [span for span in spans if "/" in span or span.endswith(".py")]
        paths = [
            path
            for span in named
            for folder in ("", "limiter")
            if (path := document.SOURCE / folder / span).is_file()
        ]
        words = {word for path in paths for word in re.findall(r"\w+", path.read_text("utf-8"))}
        symbols = {part for span in set(spans) - set(named) for part in span.split(".")}
        missing += sorted(symbols - words - {"T"})
    assert missing == []


def test_the_storeys_are_those_of_the_contract(document: ModuleType) -> None:
    project = tomllib.loads((document.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    order = [
        [one.strip().removeprefix("tidegate.") for one in re.split(r"[|:]", layer)]
        for layer in layers
    ]
    place = {name: number for number, names in enumerate(order) for name in names}
    drawn = document.HEAD.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    rows = [re.split(r"\s{6,}", line[13:])[0] for line in drawn.splitlines()]
    names = [re.findall(r"[a-z_]+", row) for row in rows]
    assert {name for row in names for name in row} == set(place)
    highest = [min(place[name] for name in row) for row in names]
    assert highest == sorted(highest)


def test_every_module_says_what_it_holds(document: ModuleType) -> None:
    assert [p for p in document.shown() if len(document.first_line(p).split()) < 3] == []
