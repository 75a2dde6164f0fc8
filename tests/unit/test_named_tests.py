"""Documents that prove their claims by tests name tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A name alone, `::test_x`, is of the file before it.
FULLY_NAMED = re.compile(r"`((?:tests|chaos)/[\w/]+\.py)?(?:::(test_\w+))?[^`\n]*`")
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


@pytest.mark.parametrize("document", ["rivals.md", "security.md"])
def test_every_test_that_is_named_is_there(document: str) -> None:
    named = NAMED.findall((ROOT / "docs" / document).read_text(encoding="utf-8"))
    assert len(named) > 20
    missing = []
    for path, name in named:
        folder = ROOT if path.startswith("chaos/") else ROOT / "tests"
        file = folder / path
        if not file.exists() or f"def {name}(" not in file.read_text(encoding="utf-8"):
            missing.append(f"{path}::{name}")
    assert missing == []


def test_every_test_that_any_document_names_by_its_whole_path_is_there() -> None:
    seen, missing = 0, []
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        file = None
        for path, name in FULLY_NAMED.findall(document.read_text(encoding="utf-8")):
            file = ROOT / path if path else file
            if file is None or not (path or name):
                continue
            seen += 1
            is_there = file.exists() and f"def {name}" in file.read_text(encoding="utf-8")
            if not is_there:
                missing.append(f"{document.name}: {file.name}::{name}")
    assert seen > 100
    assert missing == []
