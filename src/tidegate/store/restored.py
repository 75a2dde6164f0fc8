"""A database before and after a dump is restored into it."""

from __future__ import annotations

import asyncpg

from tidegate.errors import StoreUnavailable
from tidegate.store.migrate import revision_of

_CONNECT_TIMEOUT_S = 5.0
# A new server counts its transactions from the beginning: what is queued would look as if it were
# to come in the far future, and be read again at every look.
_AS_OF_OLD = "UPDATE requests SET ready_xid = 0 WHERE status = 'queued'"


async def revision_at(url: str) -> str | None:
    """The revision of the record in a database, None for one without. Raises StoreUnavailable."""
    connection = await _connected(url)
    try:
        async with connection.transaction():
            return await revision_of(connection)
    finally:
        await connection.close()


async def settle(url: str) -> None:
    """Fit what was restored to the server that it is in now. Raises StoreUnavailable."""
    connection = await _connected(url)
    try:
        await connection.execute(_AS_OF_OLD)
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


async def _connected(url: str) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(url, timeout=_CONNECT_TIMEOUT_S, statement_cache_size=0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as failed:
        raise StoreUnavailable(f"PostgreSQL does not answer: {failed}") from failed
