"""One-time codes that were used: every process of a deployment asks here whether one still counts.

Invariant: of any number of processes that spend the same code, one is told that it counts.
"""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg

from tidegate.store.connection import Connections
from tidegate.store.queries import sql

_TIMEOUT_MS = 2_000


class SignIns:
    """The codes of the dashboard's address that were spent."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def spend(self, nonce: bytes, ends_at: int, spender: bytes) -> bool:
        """Whether the code counts, which it does for one `spender`; `ends_at` in Unix time.

        Codes that are over are forgotten. Raises StoreUnavailable.
        """

        async def write(connection: asyncpg.Connection) -> bool:
            await connection.execute(sql("forget_codes"))
            end = datetime.fromtimestamp(ends_at, UTC)
            return bool(await connection.fetchval(sql("spend_code"), nonce, end, spender))

        return await self._connections.run(write, timeout_ms=_TIMEOUT_MS)
