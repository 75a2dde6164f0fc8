"""Documents that prove their claims by tests name tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
