"""A tenant's own requests, newest first, a page at a time.

Invariant: a page costs at most a look at `MOST_LOOKED_AT` rows of an index, however rare what is
asked for: a page may hold fewer than it might, and even none, while there are more. New requests
come before the first page, so that going on never shows one twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from tidegate.call import Kind
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.rows import clean
from tidegate.store.states import Status

MOST_LOOKED_AT = 20_000
_TIMEOUT_MS = 5_000
_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_LAST = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """A place between two requests: after the one that was made at that time, and has that id."""

    created_at: datetime
    request_id: UUID


START = Place(_LAST, UUID(int=2**128 - 1))


@dataclass(frozen=True, slots=True)
class Filter:
    """Which requests; None means all. `since` is the earliest, `until` is past the last."""

    status: Status | None = None
    kind: Kind | None = None
    model: str | None = None
    source: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether it may pass over requests within its time."""
        return any(value is not None for value in (self.status, self.kind, self.model, self.source))


@dataclass(frozen=True, slots=True)
class Listed:
    """A request in short: without what was asked and answered. `model` is the one that was used."""

    request_id: UUID
    source: str
    status: Status
    kind: Kind | None
    model: str | None
    priority: int
    attempts: int
    created_at: datetime
    admitted_at: datetime | None
    finished_at: datetime | None
    queue_ms: float | None
    upstream_ms: float | None
    total_tokens: int | None
    failure_code: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """`after` is where the next page starts; None on the last."""

    items: tuple[Listed, ...]
    after: Place | None


class Listing:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def page(self, tenant_id: str, wanted: Filter, limit: int, place: Place = START) -> Page:
        """At most `limit` requests from `place` on."""
        most = MOST_LOOKED_AT if wanted.is_narrow else limit + 1
        within = (
            *(tenant_id, wanted.since or _FIRST, wanted.until or _LAST),
            *(place.created_at, place.request_id),
        )
        model = None if wanted.model is None else clean(wanted.model)
        filters = (wanted.status, wanted.kind, model, wanted.source)

        async def read(
            connection: asyncpg.Connection,
        ) -> tuple[list[asyncpg.Record], asyncpg.Record | None]:
            found = await connection.fetch(sql("list_requests"), *within, *filters, limit + 1, most)
            if len(found) > limit or not wanted.is_narrow:
                return found, None
            return found, await connection.fetchrow(sql("list_reach"), *within, most)

        found, reach = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        items = tuple(listed(row) for row in found[:limit])
        if len(found) > limit:
            return Page(items, Place(items[-1].created_at, items[-1].request_id))
        return Page(items, None if reach is None else Place(reach["created_at"], _uuid(reach)))


def listed(row: asyncpg.Record) -> Listed:
    """A row with the columns of `list_requests`."""
    return Listed(
        request_id=_uuid(row),
        source=row["source"],
        status=Status(row["status"]),
        kind=None if row["kind"] is None else Kind(row["kind"]),
        model=row["model"],
        priority=row["priority"],
        attempts=row["attempts"],
        created_at=row["created_at"],
        admitted_at=row["admitted_at"],
        finished_at=row["finished_at"],
        queue_ms=row["queue_ms"],
        upstream_ms=row["upstream_ms"],
        total_tokens=row["total_tokens"],
        failure_code=row["failure_code"],
    )


def _uuid(row: asyncpg.Record) -> UUID:
    return UUID(int=row["id"].int)
