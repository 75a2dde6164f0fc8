"""A pool per test."""

from __future__ import annotations

from uuid import uuid4

import pytest


@pytest.fixture
def pool() -> str:
    return f"t{uuid4().hex[:12]}"
