"""A database that is reached through PgBouncer alone, and gateways before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway import open_gateway
from tests.integration.pgbouncer.bouncer import Bouncer
from tidegate.embedded.servers import PostgresServer

__all__ = ["open_gateway"]


@pytest.fixture(params=[(), ("max_prepared_statements = 0",)], ids=["defaults", "untracked"])
def bouncer(
    request: pytest.FixtureRequest,
    asked_each_time: None,
    postgres_server: PostgresServer,
    tmp_path: Path,
) -> Iterator[Bouncer]:
    """One that knows of prepared statements, as releases since 1.24 do, and one that does not."""
    with Bouncer(tmp_path / "pgbouncer", postgres_server, *request.param) as running:
        yield running
