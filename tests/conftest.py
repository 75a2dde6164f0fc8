"""Real servers for the tests: one Valkey and one PostgreSQL per test process."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest
import structlog

from tests.asked_once import asked_each_time
from tests.clusters import FAST, copied, let_in, shared
from tests.databases import database_url, databases
from tests.hung import pytest_runtest_protocol
from tidegate.embedded.servers import PostgresServer, ValkeyServer
from tidegate.telemetry import logging as telemetry

__all__ = ["asked_each_time", "database_url", "databases", "pytest_runtest_protocol"]

# A test must never reach a real provider or a server of the person who runs it.
_OF_THEIRS = ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_BASE_URL")
for _name in (*_OF_THEIRS, "DATABASE_URL", "REDIS_URL"):
    os.environ.pop(_name, None)

# A logger that was cached under one test's settings is deaf to what a later test captures.
_configure = structlog.configure


_changed = [False]  # since the last test


def _configure_uncached(**settings: Any) -> None:
    _changed[0] = True
    _configure(**settings | {"cache_logger_on_first_use": False})


structlog.configure = cast(Any, _configure_uncached)
# As it is without ours, but for a picture of every local variable in each traceback: half a second.
_reset = structlog.reset_defaults
_PLAIN = structlog.dev.ConsoleRenderer(
    colors=False, exception_formatter=structlog.dev.plain_traceback
)


def _reset_to_plain() -> None:
    _reset()
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _PLAIN])


structlog.reset_defaults = _reset_to_plain
structlog.reset_defaults()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A command that a test runs in this process sets up logging for the whole of it: what the next
    test logs would go to a stream that is closed by then."""
    if not _changed[0]:
        return
    root = logging.getLogger()
    ours = structlog.stdlib.ProcessorFormatter
    if any(isinstance(one.formatter, ours) for one in root.handlers):
        root.handlers = [one for one in root.handlers if not isinstance(one.formatter, ours)]
        root.setLevel(logging.WARNING)
    telemetry._lines = None
    structlog.reset_defaults()
    _changed[0] = False


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """Where root runs the tests, PostgreSQL's own account may pass through it."""
    let_in(tmp_path)
    return tmp_path


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
def postgres_server() -> Iterator[PostgresServer]:
    """Shared and healthy; `fsync` is off, since nothing in it outlives the run. Autovacuum never
    comes: its statistics change plans within a test, and the database, which is then made again."""
    settings = FAST | {"full_page_writes": "off", "autovacuum_naptime": "1d"}
    server = copied(shared() / f"of-{os.getpid()}", settings, migrated=True)
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
