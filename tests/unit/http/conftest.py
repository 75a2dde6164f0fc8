"""A real blob store in a folder, and settings that point there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.http.asgi import settings
from tidegate.settings import Config
from tidegate.store.blobs import Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs.from_url("", tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return settings(tmp_path)
