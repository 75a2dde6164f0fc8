"""The dashboard's files: whole, under their policy, and with what their licences ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.dashboard.routes import FOLDER, HEADERS

OURS = [path for path in FOLDER.rglob("*") if path.is_file() and "vendor" not in path.parts]
MODULES = [path for path in OURS if path.suffix == ".js"]
IMPORTED = re.compile(
    r"^(?:import|\}) .*?\bfrom \"([^\"]+)\";|\bimport\(\"([^\"]+)\"\)", re.MULTILINE
)
# Ways around the policy that the browser would refuse at run time, where nobody might look.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    r"|setAttribute\(\"style"
)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_imports_what_is_there_and_takes_no_text_for_html(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    for name in map("".join, IMPORTED.findall(text)):
        assert name.startswith("."), f"{name} is not one of our files"
        assert (module.parent / name).is_file(), name
    assert FORBIDDEN.findall(text) == []


def test_the_document_has_nothing_inline_and_asks_nobody_else() -> None:
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|javascript:|https?://", text)
    assert re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL) == ["", ""]
    for name in re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", text):
        assert (FOLDER / name.removeprefix("static/")).is_file(), name
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "require-trusted-types-for 'script'"} <= set(policy.split("; "))


def test_the_chart_library_is_the_version_that_is_named_with_its_licence() -> None:
    folder = FOLDER / "vendor" / "uplot"
    version = (folder / "VERSION").read_text(encoding="utf-8").split()[1].rstrip(",")
    head = (folder / "uPlot.esm.js").read_text(encoding="utf-8")[:400]
    assert f"(v{version})" in head
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
