"""A migrated database per test, copied from a template in a few tens of milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import pytest

from tidegate.embedded.postgres import PostgresServer
from tidegate.store.migrate import migrate

_TEMPLATE = "template_tidegate"


async def make_template(server: PostgresServer) -> str:
    """Create and migrate the template database of `server`; returns its name."""
    connection = await asyncpg.connect(server.url("postgres"))
    try:
        await connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    finally:
        await connection.close()
    await migrate(server.url(_TEMPLATE))
    return _TEMPLATE


@pytest.fixture(scope="session")
def database_template(postgres_server: PostgresServer) -> str:
    """The name of a migrated, empty database in the shared server: copy it, don't connect."""
    return asyncio.run(make_template(postgres_server))


@pytest.fixture
async def database_url(
    postgres_server: PostgresServer, database_template: str
) -> AsyncIterator[str]:
    """A migrated, empty database of the test's own in the shared server."""
    name = f"t_{uuid4().hex}"
    connection = await asyncpg.connect(postgres_server.url("postgres"))
    try:
        await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE {database_template}')
        yield postgres_server.url(name)
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()
