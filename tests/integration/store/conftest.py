"""Fixtures of the store's tests: stores on a real PostgreSQL, and jobs to put into them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.clusters import FAST, TEMPLATE, copied
from tidegate.call import new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store

MakeStore = Callable[..., Awaitable[Store]]


@pytest.fixture
async def make_store(tmp_path: Path) -> AsyncIterator[MakeStore]:
    """`await make_store(url, **overrides)`: a started store, closed after the test."""
    async with AsyncExitStack() as stack:

        async def make(url: str, **overrides: Any) -> Store:
            values = {
                "instance_id": f"w-{new_id()}",
                "blobs": Blobs.from_url("", tmp_path),
                "spill_dir": tmp_path / f"spill-{new_id()}",
                "spill_max_bytes": 10_000_000,
                "audit_full": "block",
                "claim_lease_ms": 600,
            }
            store = Store(url, **{**values, **overrides})
            await store.start()
            stack.push_async_callback(store.aclose)
            return store

        yield make


@pytest.fixture
async def store(make_store: MakeStore, database_url: str) -> Store:
    """A store on a healthy, shared server, whose heartbeats have a second on a busy machine."""
    return await make_store(database_url, claim_lease_ms=3_000)


@pytest.fixture
async def peek(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that looks into the test's database from outside."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL of the module's own, to stop, kill and pause; every test leaves it running."""
    server = copied(tmp_path_factory.mktemp("own"), FAST, migrated=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def own_url(own_server: PostgresServer) -> str:
    """A migrated database in the module's own server."""
    name = f"t_{uuid4().hex}"
    connection = await asyncpg.connect(own_server.url("postgres"))
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE {TEMPLATE}')
    await connection.close()
    return own_server.url(name)
