"""Idempotency keys of native calls, and the answers that were given under them; and of batches.

Invariant: of all who ask under one key at a time, one is answered by the provider; a key whose
process died is free again when no call can last that long. The key of a batch is written in the
batch's own transaction, and has no answer but the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import asyncpg

from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.records import Idempotency

_TIMEOUT_MS = 2_000


@dataclass(frozen=True, slots=True)
class Given:
    """What is known under a key. `answer` is None while somebody is still being answered."""

    digest: str
    request_id: UUID
    http_status: int = 0
    content_type: str = ""
    answer: bytes | None = None


class NativeKeys:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def take(
        self, tenant_id: str, wanted: Idempotency, request_id: UUID, longest_ms: int
    ) -> Given | None:
        """None if the key is this request's now, else what is known. `longest_ms`: no call lasts
        longer than that."""

        async def take(connection: asyncpg.Connection) -> Given | None:
            return await take_key(connection, tenant_id, wanted, request_id, longest_ms)

        return await self._connections.run(take, timeout_ms=_TIMEOUT_MS)

    async def known(self, tenant_id: str, key: str) -> Given | None:
        """What is known under a key, which stays as it is."""

        async def find(connection: asyncpg.Connection) -> Given | None:
            return await known_key(connection, tenant_id, key)

        return await self._connections.run(find, timeout_ms=_TIMEOUT_MS)

    async def end(self, tenant_id: str, key: str, given: Given) -> None:
        """Keep the answer for those who ask again."""

        async def end(connection: asyncpg.Connection) -> None:
            await end_key(connection, tenant_id, key, given)

        await self._connections.run(end, timeout_ms=_TIMEOUT_MS)

    async def free(self, tenant_id: str, key: str, request_id: UUID) -> None:
        """Let somebody else be answered under it."""

        async def free(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("free_native_key"), tenant_id, key, request_id)

        await self._connections.run(free, timeout_ms=_TIMEOUT_MS)


async def take_key(
    connection: asyncpg.Connection,
    tenant_id: str,
    wanted: Idempotency,
    request_id: UUID,
    longest_ms: int,
) -> Given | None:
    """As `NativeKeys.take`, in the transaction of what the key is for. Whoever else takes the key
    waits for the end of that transaction."""
    digest = bytes.fromhex(wanted.digest)
    taken = await connection.fetchval(
        sql("take_native_key"), tenant_id, wanted.key, digest, request_id, longest_ms / 1000
    )
    given = None if taken is not None else await known_key(connection, tenant_id, wanted.key)
    if given is None or given.request_id == request_id:  # the latter by a try whose reply was lost
        return None
    return given


async def known_key(connection: asyncpg.Connection, tenant_id: str, key: str) -> Given | None:
    """What is known under a key, which is left as it is."""
    row = await connection.fetchrow(sql("get_native_key"), tenant_id, key)
    if row is None:
        return None
    given = Given(row["digest"].hex(), UUID(int=row["request_id"].int))
    if not row["ended"]:
        return given
    return Given(
        given.digest, given.request_id, row["http_status"], row["content_type"], row["answer"]
    )


async def end_key(connection: asyncpg.Connection, tenant_id: str, key: str, given: Given) -> None:
    """As `NativeKeys.end`, in the transaction of what the key is for."""
    await connection.execute(
        sql("end_native_key"),
        *(tenant_id, key, given.request_id),
        *(given.http_status, given.content_type, given.answer),
    )
