"""A gateway for each test, and a PostgreSQL that a test may stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.clusters import FAST, copied
from tests.gateway import open_gateway
from tidegate.embedded.servers import PostgresServer

__all__ = ["open_gateway"]


@pytest.fixture
async def own_postgres(tmp_path: Path) -> AsyncIterator[PostgresServer]:
    """A migrated database in a server of the test's own."""
    server = copied(tmp_path / "postgres", FAST, migrated=True)
    server.start()
    yield server
    server.stop()
