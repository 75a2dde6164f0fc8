"""The metadata of the wheel: who makes it, its licence, and what it runs on."""

from __future__ import annotations

import tomllib
from pathlib import Path

from trove_classifiers import classifiers

ROOT = Path(__file__).parents[3]


def test_the_wheel_names_its_makers_its_licence_and_what_it_runs_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["authors"][0]["name"]
    assert project["license"] == "Apache-2.0"
    assert all((ROOT / name).is_file() for name in project["license-files"])
    said = project["classifiers"]
    assert [one for one in said if one not in classifiers] == []
    assert not any(one.startswith("License ::") for one in said), "refused beside a licence's name"
    least = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in said
    assert ("Typing :: Typed" in said) == (ROOT / "src" / "tidegate" / "py.typed").is_file()
