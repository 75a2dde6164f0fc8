"""Every test here leaves no process behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.embedded.traces import Traces


@pytest.fixture
async def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Traces]:
    found = Traces(monkeypatch, tmp_path)
    yield found
    await found.none_left()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"
