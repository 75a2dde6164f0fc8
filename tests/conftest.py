"""Real servers for the tests: one Valkey and one PostgreSQL per test process."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from tests.databases import database_template, database_url
from tidegate.embedded.postgres import PostgresServer
from tidegate.embedded.valkey import ValkeyServer

__all__ = ["database_template", "database_url"]

# A test must never reach a real provider or a server of the person who runs it.
for _name in ("GEMINI_API_KEY", "DATABASE_URL", "REDIS_URL", "GEMINI_BASE_URL"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """Shared and healthy: a test that stops or pauses a server starts one of its own."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey_url(valkey_server: ValkeyServer) -> str:
    """Shared by the tests of this process: use a pool of your own."""
    return valkey_server.url


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey of the test's own, to kill, pause and restart."""
    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    yield server
    server.resume()
    server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """Shared and healthy; `fsync` is off, since nothing in it outlives the run."""
    folder = tmp_path_factory.mktemp("postgres")
    server = PostgresServer(folder, settings={"fsync": "off", "full_page_writes": "off"})
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def empty_database_url(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """An empty database of the test's own."""
    name = f"t_{uuid4().hex}"
    connection = await asyncpg.connect(postgres_server.url("postgres"))
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
        yield postgres_server.url(name)
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()
