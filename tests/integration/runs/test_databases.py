"""A test finds in its database what the migrations made, whatever the test before it did."""

from __future__ import annotations

from asyncio import to_thread
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.clusters import copied
from tests.databases import Databases
from tidegate.embedded.servers import PostgresServer

ROWS = [
    "SELECT 1",
    "INSERT INTO tenants (id) VALUES ('of-a-test')",
    "DELETE FROM tenants",
    "UPDATE budget_revision SET revision = revision + 5",
    # The connection by which the database is looked through, too.
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
]
SHAPES = [
    "CREATE TABLE of_a_test (id int)",
    "ALTER TABLE requests ADD COLUMN of_a_test int",
    "CREATE INDEX of_a_test ON requests (id)",
    "DROP TABLE webhooks CASCADE",
]


async def content(url: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return [
            *await connection.fetch("SELECT * FROM tenants ORDER BY id"),
            *await connection.fetch("SELECT * FROM budget_revision"),
        ]
    finally:
        await connection.close()


@pytest.mark.parametrize("did", [*ROWS, *SHAPES])
async def test_the_next_test_finds_what_the_migrations_made(
    did: str, postgres_server: PostgresServer
) -> None:
    databases = await to_thread(Databases, postgres_server)
    name = await to_thread(databases.take)
    await to_thread(databases.give_back, name)
    assert await to_thread(databases.take) == name
    made = await content(postgres_server.url(name))
    left_open = await asyncpg.connect(postgres_server.url(name))
    await left_open.execute(did)
    await to_thread(databases.give_back, name)
    found = await to_thread(databases.take)
    assert (found == name) is (did in ROWS)  # else another copy of the template
    assert await content(postgres_server.url(found)) == made
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await left_open.execute("SELECT 1")
    await to_thread(databases.give_back, found)
    await to_thread(databases.close)


@pytest.fixture
def opened() -> None:
    """Something that a test has opened, as a store is."""


@pytest.mark.parametrize("name", ["database_url", "empty_database_url"])
def test_a_database_is_given_back_once_all_is_closed_that_a_test_opened(
    opened: None, database_url: str, empty_database_url: str, name: str, request: Any
) -> None:
    """Work of a store that is cut off is repeated: the next test would find what it wrote."""
    assert request.fixturenames.index(name) < request.fixturenames.index("opened")


def test_a_cluster_of_a_test_lies_in_its_folder_also_below_an_open_one(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    folder = tmp_path / "open" / "postgres"
    assert copied(folder).folder == folder
