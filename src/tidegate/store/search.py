"""Finding requests of all tenants, newest first, a page at a time, for an operator.

All that is on record: jobs, streams and native calls that have ended, and lines of batches that a
worker has now or that have ended. In the order of their ids, which begin with the time.
Invariant: a page costs at most a look at `MOST_LOOKED_AT` rows, however rare what is asked for: it
may hold fewer than it might, and even none, while there are more. New requests come before the
first page, so that going on never shows one twice. No index is kept for this alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from tidegate.call import Kind
from tidegate.store.connection import Connections
from tidegate.store.listing import Listed, listed
from tidegate.store.queries import sql
from tidegate.store.rows import clean
from tidegate.store.states import Status

MOST_LOOKED_AT = 20_000
END = UUID(int=2**128 - 1)
_TIMEOUT_MS = 5_000
_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_LAST = datetime(9999, 12, 31, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_HEX_DIGITS = 32
# A request gets its id once it has been read, which may take a while after its receipt; and a
# moment before, where the clock that names it is read first.
_ID_AFTER, _ID_BEFORE = timedelta(hours=1), timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests; None, or nothing, means all.

    prefix: how their ids begin, as hexadecimal digits without dashes. since: the earliest time of
    receipt; until: past the last.
    """

    statuses: frozenset[Status] = frozenset()
    tenant_id: str | None = None
    model: str | None = None
    kind: Kind | None = None
    source: str | None = None
    failure_code: str | None = None
    subject: str | None = None
    prefix: str = ""
    since: datetime | None = None
    until: datetime | None = None

    def ids(self, before: UUID = END) -> tuple[UUID, UUID]:
        """Within which ids they are, from the first to past the last, and before `before`."""
        first = UUID(self.prefix.ljust(_HEX_DIGITS, "0"))
        last = UUID(self.prefix.ljust(_HEX_DIGITS, "f"))
        past = END if last == END else UUID(int=last.int + 1)
        if self.since is not None:
            first = max(first, _id_at(self.since, -_ID_BEFORE))
        if self.until is not None:
            past = min(past, _id_at(self.until, _ID_AFTER))
        return first, min(past, before)


@dataclass(frozen=True, slots=True)
class Found:
    """A request in short, and whose it is. `endpoint` is the path of a native call."""

    listed: Listed
    tenant_id: str
    pool: str
    subject: str | None
    endpoint: str | None


@dataclass(frozen=True, slots=True)
class FoundPage:
    """`before` is what the next page is asked for with; None on the last."""

    items: tuple[Found, ...]
    before: UUID | None


class Search:
    """Raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def page(self, wanted: Wanted, limit: int, before: UUID = END) -> FoundPage:
        """At most `limit` requests whose ids come before `before`."""
        first, past = wanted.ids(before)
        if first >= past:
            return FoundPage((), None)
        filters = (
            [status.value for status in wanted.statuses] or None,
            _clean(wanted.tenant_id),
            _clean(wanted.model),
            wanted.kind,
            wanted.source,
            _clean(wanted.failure_code),
            _clean(wanted.subject),
            wanted.since or _FIRST,
            wanted.until or _LAST,
        )

        async def read(
            connection: asyncpg.Connection,
        ) -> tuple[list[asyncpg.Record], UUID | None]:
            look = (first, past, limit + 1, MOST_LOOKED_AT)
            found = await connection.fetch(sql("search_requests"), *look, *filters)
            if len(found) > limit:
                return found, None
            reach = await connection.fetchval(sql("search_reach"), first, past, MOST_LOOKED_AT)
            return found, reach

        found, reach = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        items = tuple(_found(row) for row in found[:limit])
        if len(found) > limit:
            return FoundPage(items, items[-1].listed.request_id)
        return FoundPage(items, None if reach is None else UUID(int=reach.int))


def _found(row: asyncpg.Record) -> Found:
    return Found(listed(row), row["tenant_id"], row["pool"], row["subject"], row["endpoint"])


def _clean(text: str | None) -> str | None:
    return None if text is None else clean(text)


def _id_at(time: datetime, off: timedelta) -> UUID:
    """The first id of that time and so much more; of the nearest that has any."""
    ms = (time - _EPOCH + off) // _MILLISECOND
    return UUID(int=min(max(ms, 0), 2**48 - 1) << 80)
