"""A gateway for each test, and a PostgreSQL that a test may stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.clusters import copied
from tests.gateway import open_gateway
from tidegate.embedded.postgres import PostgresServer
from tidegate.store.migrate import migrate

__all__ = ["open_gateway"]


@pytest.fixture
async def own_postgres(tmp_path: Path) -> AsyncIterator[PostgresServer]:
    """A migrated database in a server of the test's own."""
    server = copied(tmp_path / "postgres", {"fsync": "off"})
    server.start()
    await migrate(server.url())
    yield server
    server.stop()
