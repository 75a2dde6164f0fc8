"""Bringing the schema up to date, by whichever process comes first.

Invariant: all steps of one run are one transaction under an advisory lock, so that two processes
that start at once are safe and a failed step leaves the old schema whole.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg

from tidegate.call import new_id
from tidegate.errors import StoreUnavailable
from tidegate.store import partitions
from tidegate.telemetry import Log, get_logger

HEAD = "0015"  # the revision that this code needs; a test compares it with the migrations
_LOCK = 7_423_000
_CONNECT_TIMEOUT_S = 5.0


async def revision_of(connection: asyncpg.Connection) -> str | None:
    """The revision in the database, or None where no migration has run; runs in a transaction."""
    if await connection.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    return revision


async def _revision_alone(connection: asyncpg.Connection) -> str | None:
    # Outside a transaction PgBouncer may send a statement to one server and its run to another.
    async with connection.transaction():
        return await revision_of(connection)


async def migrate(url: str) -> str | None:
    """Run the missing steps and make partitions ahead.

    Returns the new revision, or None where there was nothing to do. Raises StoreUnavailable when
    PostgreSQL can't be reached. Cancellation does not stop steps under way.
    """
    try:
        connection = await asyncpg.connect(url, timeout=_CONNECT_TIMEOUT_S, statement_cache_size=0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as failed:
        raise StoreUnavailable(f"cannot migrate: {failed}") from failed
    try:
        before = await _revision_alone(connection)
        if before is None or before < HEAD:
            await asyncio.to_thread(_upgrade, url)
        async with connection.transaction():
            after = await revision_of(connection)
            await partitions.make_ahead(connection, datetime.now(UTC).date())
    finally:
        await connection.close(timeout=_CONNECT_TIMEOUT_S)
    if after == before:
        return None
    get_logger().info(Log.MIGRATED, before=before, after=after)
    return after


class _DistinctlyPrepared(asyncpg.Connection):  # type: ignore[misc] # it has no types
    """Names the statements that SQLAlchemy prepares as nobody else does.

    PgBouncer hands on server connections with what was prepared in them, and asyncpg counts its
    names from one in every process.
    """

    async def prepare(self, query: str, **more: Any) -> Any:
        return await super().prepare(query, **{**more, "name": f"tidegate_{new_id().hex}"})


def _upgrade(url: str) -> None:
    """Alembic is synchronous under SQLAlchemy's greenlets: it gets a thread and a loop."""
    asyncio.run(_upgrade_under_lock(url))


async def _upgrade_under_lock(url: str) -> None:
    # Imported here: together they cost more than a second of start-up.
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import Connection, text
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    config = Config()
    config.set_main_option("script_location", "tidegate.store:migrations")

    def upgrade(connection: Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(
            url,
            timeout=_CONNECT_TIMEOUT_S,
            statement_cache_size=0,
            connection_class=_DistinctlyPrepared,
        )

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            await connection.run_sync(upgrade)
    finally:
        await engine.dispose()
