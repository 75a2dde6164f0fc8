"""Gateways with prices, and callers with keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gateway import open_gateway

__all__ = ["open_gateway"]


@pytest.fixture
def priced(tmp_path: Path) -> Path:
    """A policy whose account of GEMINI_* has prices."""
    path = tmp_path / "tidegate.toml"
    path.write_text(
        """
        [upstreams.gemini.prices]
        "*" = { input = 0.30, output = 2.50, cached = 0.075 }
        "m" = { input = 1.25, output = 10.0 }
        "dear" = { input = 1000.0, output = 1000.0 }
        "free-*" = { input = 0, output = 0 }
        """
    )
    return path
