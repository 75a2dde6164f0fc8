"""Reading the bodies of requests back out of the record, for whoever they belong to.

Invariant: a body is never whole in memory, however large it is: it is unpacked piece by piece.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from tidegate.call import UsageDetails
from tidegate.errors import NotFound
from tidegate.store.blobs import Blobs
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.rows import details_of

Role = Literal["request", "response"]

_JSON = "application/json"
_PIECE_BYTES = 64 * 1024
_RECORDED_WITHIN = timedelta(days=1)  # of its end, though it was kept on a disk meanwhile
_COST_TIMEOUT_MS = 2_000


@dataclass(frozen=True, slots=True)
class Body:
    """`omitted_bytes` of its middle are not in the record; `size_bytes` is what is."""

    content_type: str
    size_bytes: int
    omitted_bytes: int
    pieces: AsyncIterator[bytes]


class Recorded:
    """Of one deployment."""

    def __init__(self, connections: Connections, blobs: Blobs) -> None:
        self._connections = connections
        self._blobs = blobs

    async def body(self, request_id: UUID, tenant_id: str, role: Role) -> Body:
        """Raises NotFound where none is kept, or not for this tenant, and StoreUnavailable; so
        may its pieces."""
        return await self._read(request_id, role, "get_body", tenant_id)

    async def body_of_any(self, request_id: UUID, role: Role) -> Body:
        """The same, whoever it belongs to: for an operator."""
        return await self._read(request_id, role, "dossier_body")

    async def _read(self, request_id: UUID, role: Role, query: str, *owner: str) -> Body:
        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(sql(query), request_id, *owner, role)

        row = await self._connections.run(read)
        if row is None:
            raise NotFound(f"no {role} body of request {request_id} is kept")
        packed = (
            _of(row["data"]) if row["data"] is not None else self._blobs.stream(row["blob_key"])
        )
        return Body(
            content_type=row["content_type"] or _JSON,
            size_bytes=row["size_bytes"],
            omitted_bytes=row["omitted_bytes"],
            pieces=packed if row["encoding"] == "raw" else _unpacked(packed),
        )

    async def charged(
        self, request_id: UUID, tenant_id: str, ended_at: datetime
    ) -> tuple[int | None, UsageDetails | None]:
        """What a request that has ended cost, in millionths of money, and the details of its usage;
        None where they are not known. Raises StoreUnavailable."""

        async def read(connection: asyncpg.Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(
                sql("get_charged"),
                *(request_id, tenant_id),
                *(ended_at - _RECORDED_WITHIN, ended_at + _RECORDED_WITHIN),
            )

        row = await self._connections.run(read, timeout_ms=_COST_TIMEOUT_MS)
        if row is None:
            return None, None
        return row["cost_micros"], details_of(row["usage_details"])


async def _of(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _unpacked(packed: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What zlib packed, in bounded pieces: a small one may unpack to a thousand times its size."""
    unpacker = zlib.decompressobj()
    async for piece in packed:
        left = piece
        while left:
            if found := unpacker.decompress(left, _PIECE_BYTES):
                yield found
            left = unpacker.unconsumed_tail
    if found := unpacker.flush():
        yield found
