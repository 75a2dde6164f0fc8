"""Requests on record: lists, search, details, bodies, state.

Invariants: a page reads at most `MOST_LOOKED_AT` rows, so it may hold fewer entries than requested
while there are more; paging never shows a request twice; bodies are decompressed piece by piece.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg

from tidegate.call import (
    Classification,
    ClassifiedBy,
    Kind,
    Status,
    Tier,
    Usage,
    UsageDetails,
    made_at,
)
from tidegate.errors import InvalidRequest, NotFound
from tidegate.record import PROMPT_HEAD_CHARS, Failure, Lineage
from tidegate.store import database
from tidegate.store import records as rows
from tidegate.store.blobs import Blobs
from tidegate.store.database import Connections, sql
from tidegate.store.notifications import Notifications, ReadTurns
from tidegate.store.outbox import webhook_of
from tidegate.store.records import FileRecord, RequestRecord, details_of, record_of

MOST_LOOKED_AT = 20_000
_READ_TIMEOUT_MS = 2_000
_DETAIL_TIMEOUT_MS = 3_000
_READS_AT_ONCE = 4
_WORDS_TIMEOUT_MS = 1_200
_SEARCHED_FIRST = (timedelta(days=1), timedelta(days=7))
_RECENT = 500  # searched for a text before its index
_KEY = re.compile(r"^tg_([a-z0-9]{1,10})(?:_\w*)?\W*$")  # searched by its prefix
_BEGINS_AN_ID = re.compile(r"[0-9a-f]{6,32}")
_FIRST = datetime(1, 1, 1, tzinfo=UTC)
_LAST = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ListCursor:
    """A position between two requests: after the one with this time and id."""

    created_at: datetime
    request_id: UUID


START = ListCursor(_LAST, UUID(int=2**128 - 1))


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects requests; None means all. `since` is inclusive, `until` exclusive."""

    status: Status | None = None
    kind: Kind | None = None
    model: str | None = None
    source: str | None = None
    conversation: str | None = None
    upstream: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether it may exclude requests within its time."""
        of = (self.status, self.kind, self.model, self.source, self.conversation, self.upstream)
        return any(value is not None for value in of)


@dataclass(frozen=True, slots=True)
class Listed:
    """A request without its prompt and its answer. `model`: the one that was used."""

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
class ListPage:
    """A page of a list. `after`: where the next page starts; None on the last."""

    items: tuple[Listed, ...]
    after: ListCursor | None


END = UUID(int=2**128 - 1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_HEX_DIGITS = 32
# A request gets its id once it has been read, possibly long after its receipt, or a moment before
# its receipt, if the clock for the id is read first.
_ID_AFTER, _ID_BEFORE = timedelta(hours=1), timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class SearchFilter:
    """Selects requests; None, or an empty value, means all.

    prefix: of their ids, as hexadecimal digits without dashes. since, until: times of receipt, the
    latter exclusive. text: the beginnings of words in their subject, key or, with `in_prompts`,
    their `prompt_head`, or of their id. Except by id, a text only finds requests that have ended
    and were recorded by revision 0028 or later, the last to end first.
    """

    statuses: frozenset[Status] = frozenset()
    tenant_id: str | None = None
    model: str | None = None
    kind: Kind | None = None
    source: str | None = None
    failure_code: str | None = None
    subject: str | None = None
    conversation: str | None = None
    upstream: str | None = None
    prefix: str = ""
    since: datetime | None = None
    until: datetime | None = None
    text: str = ""
    in_prompts: bool = False

    def ids(self, before: UUID = END) -> tuple[UUID, UUID]:
        """Return the range of ids, from the first to past the last, before `before`."""
        first = UUID(self.prefix.ljust(_HEX_DIGITS, "0"))
        last = UUID(self.prefix.ljust(_HEX_DIGITS, "f"))
        past = END if last == END else UUID(int=last.int + 1)
        if self.since is not None:
            first = max(first, _id_at(self.since, -_ID_BEFORE))
        if self.until is not None:
            past = min(past, _id_at(self.until, _ID_AFTER))
        return first, min(past, before)


@dataclass(frozen=True, slots=True)
class FoundRequest:
    """A request without prompt and answer, with its tenant. `endpoint`: the path of a native call.
    `cost_micros`, `prompt_head`: None while unknown. tier: the last one chosen for a job; of other
    requests the tier that served it, if it was not the standard one."""

    listed: Listed
    tenant_id: str
    pool: str
    subject: str | None
    endpoint: str | None
    conversation: str | None
    upstream: str | None
    key_id: str | None
    cost_micros: int | None
    prompt_head: str | None
    tier: str | None


@dataclass(frozen=True, slots=True)
class FoundPage:
    """A page of search results. `before`: where the next page starts; None on the last."""

    items: tuple[FoundRequest, ...]
    before: UUID | None


MOST_TOGETHER = 2_000


@dataclass(frozen=True, slots=True)
class ConversationCall:
    """An ended call of a conversation. `cost_micros`: None if unknown."""

    request_id: UUID
    source: str
    status: Status
    endpoint: str | None
    model: str | None
    upstream: str | None
    attempts: int
    submitted_at: datetime
    admitted_at: datetime | None
    finished_at: datetime
    queue_ms: float | None
    upstream_ms: float | None
    first_byte_ms: float | None
    usage: Usage
    usage_state: str | None
    cost_micros: int | None
    failure_code: str | None
    lineage: Lineage


@dataclass(frozen=True, slots=True)
class ConversationSums:
    """Totals of calls. unpriced: calls of unknown cost. cached_of: input tokens of the calls that
    report how much of it was cached."""

    calls: int
    failed: int
    unpriced: int
    began_at: datetime
    ended_at: datetime
    queue_ms: float
    upstream_ms: float
    input_tokens: int
    cached_tokens: int
    cached_of: int
    output_tokens: int
    cost_micros: int


@dataclass(frozen=True, slots=True)
class FoundConversation:
    """Calls in the order of receipt; `sums` also include those that are left out."""

    calls: tuple[ConversationCall, ...]
    sums: ConversationSums


def _id_at(time: datetime, off: timedelta) -> UUID:
    """Return the first id at a time plus `off`, within the range of ids."""
    ms = (time - _EPOCH + off) // _MILLISECOND
    return UUID(int=min(max(ms, 0), 2**48 - 1) << 80)


_MOST_MS = 250
_SLOW_S = 0.2
_SHARE = 20


@dataclass(frozen=True, slots=True)
class JobsAhead:
    """Queued jobs of the same tenant and kind before a job, up to 10,000: those that no worker has
    claimed, and those that wait in a worker."""

    unclaimed: int
    claimed: int


class QueuePlaces:
    """Counts places in queues; pauses after a slow count. One per process."""

    def __init__(self) -> None:
        self._not_before = 0.0

    async def of(self, connection: asyncpg.Connection, row: asyncpg.Record) -> int | None:
        """Return the place, 1 is next. Must be the last query of its transaction, which a timeout
        breaks."""
        if row["status"] != Status.QUEUED or time.monotonic() < self._not_before:
            return None
        await connection.execute(f"SET LOCAL statement_timeout = {_MOST_MS}")
        began = time.monotonic()
        try:
            place: int | None = await connection.fetchval(sql("get_place"), row["id"])
        except asyncpg.QueryCanceledError:
            place = None
        self._note(time.monotonic() - began)
        return place

    def _note(self, took_s: float) -> None:
        if took_s > _SLOW_S:
            self._not_before = time.monotonic() + _SHARE * took_s

    async def ahead(self, connection: asyncpg.Connection, request_id: UUID) -> JobsAhead | None:
        """Return the jobs ahead; None if counting takes too long, or the request is not queued."""
        if time.monotonic() < self._not_before:
            return None
        await connection.execute(f"SET LOCAL statement_timeout = {_MOST_MS}")
        began = time.monotonic()
        try:
            row = await connection.fetchrow(sql("get_ahead"), request_id)
        except asyncpg.QueryCanceledError:
            row = None
        self._note(time.monotonic() - began)
        return None if row is None else JobsAhead(row["unclaimed"], row["claimed"])


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt upstream. `outcome`: `running` while it runs, and permanently if its worker died;
    otherwise `failed`, `preempted`, or the request's status."""

    number: int
    outcome: str
    process: str
    model: str
    upstream: str | None
    began_at: datetime
    admitted_at: datetime | None
    finished_at: datetime | None
    queue_ms: float | None
    upstream_ms: float | None
    first_byte_ms: float | None
    usage: Usage
    finish_reason: str | None
    failure: Failure | None
    response_id: str | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A webhook. `ended_at`: when it was delivered or given up."""

    webhook_id: UUID
    event: str
    url: str
    state: str
    tries: int
    due_at: datetime
    answer_status: int | None
    problem: str | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class BodyRecord:
    """A stored body: `omitted_bytes` of its middle are not stored."""

    role: str
    size_bytes: int
    content_type: str
    omitted_bytes: int


@dataclass(frozen=True, slots=True)
class RequestDetail:
    """All of a request. `process`: the process that has the request, or had it last.

    `request`, `ended`: its rows of `requests` and `audit`, if any.
    """

    record: RequestRecord
    pool: str
    process: str | None
    attempts: tuple[AttemptRecord, ...]
    webhooks: tuple[DeliveryRecord, ...]
    bodies: tuple[BodyRecord, ...]
    request: Mapping[str, Any]
    ended: Mapping[str, Any]

    def of(self, column: str) -> Any:
        """Return a column of either row, preferring the row of its end; None if neither has it."""
        value = self.ended.get(column)
        return self.request.get(column) if value is None else value


Role = Literal["request", "response"]

_PIECE_BYTES = 64 * 1024
_RECORDED_WITHIN = timedelta(days=1)  # of its end, even if it was kept on disk meanwhile


@dataclass(frozen=True, slots=True)
class Body:
    """A stored body. `size_bytes`: stored; `omitted_bytes`: of its middle, not stored."""

    content_type: str
    size_bytes: int
    omitted_bytes: int
    pieces: AsyncIterator[bytes]


class Requests:
    """Requests of all tenants. Every method raises StoreUnavailable."""

    def __init__(
        self, connections: Connections, blobs: Blobs, notifications: Notifications
    ) -> None:
        self._connections = connections
        self._blobs = blobs
        self._notifications = notifications
        self._places, self._turns = QueuePlaces(), ReadTurns(_READS_AT_ONCE)

    async def get(self, request_id: UUID, tenant_id: str) -> RequestRecord:
        """Return the request as it is now. Raises NotFound."""

        async def read(connection: asyncpg.Connection) -> RequestRecord | None:
            row = await connection.fetchrow(sql("get_request"), request_id, tenant_id)
            if row is not None:
                return await self._record(connection, row)
            since = _recorded_since(request_id)
            relayed = await connection.fetchrow(sql("get_relayed"), request_id, tenant_id, since)
            return None if relayed is None else rows.relayed_record(relayed)

        async with self._turns.turn(tenant_id, _READ_TIMEOUT_MS):
            record = await self._connections.run(read, timeout_ms=_READ_TIMEOUT_MS)
        if record is None:
            raise NotFound(f"no request {request_id}")
        return record

    async def wait_change(
        self, request_id: UUID, tenant_id: str, version: int, timeout_ms: int
    ) -> RequestRecord:
        """Return the request once its version is not `version`, or after `timeout_ms`.

        Returns immediately if this process has too many watchers. Cancellation leaves nothing
        behind. Raises NotFound.
        """
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        changed = self._notifications.watch(request_id)
        if changed is None:
            return await self.get(request_id, tenant_id)
        try:
            while True:
                changed.clear()
                record = await self.get(request_id, tenant_id)
                self._notifications.known(request_id, record.version)
                if record.version != version:
                    return record
                try:
                    async with asyncio.timeout_at(deadline):
                        await changed.wait()
                except TimeoutError:
                    return record
        finally:
            self._notifications.unwatch(request_id, changed)

    async def page(
        self, tenant_id: str, query: Filter, limit: int, place: ListCursor = START
    ) -> ListPage:
        """Return at most `limit` requests of a tenant, starting at `place`."""
        most = MOST_LOOKED_AT if query.is_narrow else limit + 1
        within = (
            *(tenant_id, query.since or _FIRST, query.until or _LAST),
            *(place.created_at, place.request_id),
        )
        filters = (query.status, query.kind, rows.cleaned(query.model), query.source)
        bounds = (limit + 1, most, rows.cleaned(query.conversation), rows.cleaned(query.upstream))

        async def read(
            connection: asyncpg.Connection,
        ) -> tuple[list[asyncpg.Record], asyncpg.Record | None]:
            found = await connection.fetch(sql("list_requests"), *within, *filters, *bounds)
            if len(found) > limit or not query.is_narrow:
                return found, None
            return found, await connection.fetchrow(sql("list_reach"), *within, most)

        found, reach = await self._connections.run(read)
        items = tuple(_listed(row) for row in found[:limit])
        if len(found) > limit:
            return ListPage(items, ListCursor(items[-1].created_at, items[-1].request_id))
        end = None if reach is None else ListCursor(reach["created_at"], rows.uuid_of(reach["id"]))
        return ListPage(items, end)

    async def search(self, criteria: SearchFilter, limit: int, before: UUID = END) -> FoundPage:
        """Return at most `limit` requests of any tenant before `before`, an id or the previous
        page's value. Raises InvalidRequest for a text that too many requests contain."""
        if criteria.text:
            of_id = replace(criteria, text="", prefix=criteria.text.replace("-", "").lower())
            if _BEGINS_AN_ID.fullmatch(of_id.prefix):
                page = await self.search(of_id, limit, before)
                if page.items:
                    return page
            return await self._search_words(criteria, limit, before)
        first, past = criteria.ids(before)
        if first >= past:
            return FoundPage((), None)

        async def read(connection: asyncpg.Connection) -> FoundPage:
            args = (first, past, limit + 1, MOST_LOOKED_AT)
            found = await connection.fetch(sql("search_requests"), *args, *_filters_of(criteria))
            items = await _with_jobs(connection, found[:limit])
            if len(found) > limit:
                return FoundPage(items, items[-1].listed.request_id)
            reach = await connection.fetchval(sql("search_reach"), first, past, MOST_LOOKED_AT)
            return FoundPage(items, None if reach is None else rows.uuid_of(reach))

        return await self._connections.run(read)

    async def _search_words(self, criteria: SearchFilter, limit: int, before: UUID) -> FoundPage:
        """Search for common words among the last ended requests, for others in their index: over a
        day, a week and all time, since the index query sorts all requests that contain a word."""
        query = _query_of(criteria)

        async def read(connection: asyncpg.Connection) -> list[asyncpg.Record] | None:
            stamp = await connection.fetchval(sql("search_words_from"))
            day = database.day_of(f"_{stamp}")
            if day is None or not query:
                return []
            start = datetime.combine(day, datetime.min.time(), UTC)
            start = max(start, criteria.since or start)
            found: list[asyncpg.Record] = []
            await connection.execute(f"SET LOCAL statement_timeout = {_WORDS_TIMEOUT_MS}")
            for among, since, first in _scans_of(start, before):
                text = sql("search_words").format(among=sql(among))
                args = (before, since, query, _RECENT, limit + 1)
                try:
                    found = await connection.fetch(text, *args, *_filters_of(criteria), first)
                except asyncpg.QueryCanceledError:
                    return None
                if len(found) > limit:
                    break
            return found

        found = await self._connections.run(read, timeout_ms=_DETAIL_TIMEOUT_MS)
        if found is None:
            allowed = "rarer words, or a shorter time"
            raise InvalidRequest("text", "too many requests match", allowed=allowed)
        items = tuple(record_of(FoundRequest, row, listed=_listed(row)) for row in found[:limit])
        return FoundPage(items, rows.uuid_of(found[limit - 1]["place"]) if found[limit:] else None)

    async def conversation(
        self, tenant_id: str, name: str, *, is_trace: bool = False
    ) -> FoundConversation:
        """Return the ended calls of a conversation or of a trace: the latest `MOST_TOGETHER`, and
        totals of all. Raises NotFound."""
        which = "trace" if is_trace else "conversation"
        column = "trace_id" if is_trace else "conversation"

        async def read(
            connection: asyncpg.Connection,
        ) -> tuple[asyncpg.Record, list[asyncpg.Record]]:
            whose = (rows.cleaned(tenant_id), rows.cleaned(name))
            sums = await connection.fetchrow(sql("sums_of_calls").format(column=column), *whose)
            calls = sql("calls_together").format(column=column)
            return sums, await connection.fetch(calls, *whose, MOST_TOGETHER)

        async with self._turns.turn(tenant_id, _DETAIL_TIMEOUT_MS):
            sums, found = await self._connections.run(read, timeout_ms=_DETAIL_TIMEOUT_MS)
        if not sums["calls"]:
            raise NotFound(f"no call of the {which} {name!r} is on record", field=which)
        calls = tuple(_call_of(row) for row in reversed(found))
        return FoundConversation(calls, record_of(ConversationSums, sums))

    async def detail(self, request_id: UUID) -> RequestDetail:
        """Return all of one request, for an operator. Raises NotFound."""

        async def read(connection: asyncpg.Connection) -> RequestDetail | None:
            request = await connection.fetchrow(sql("detail_request"), request_id)
            since = _recorded_since(request_id)
            ended = await connection.fetchrow(sql("detail_audit"), request_id, since)
            if request is None and ended is None:
                line = await connection.fetchrow(sql("detail_line"), request_id)
                return None if line is None else _of_line(line)
            return await self._detail(connection, request_id, request, ended)

        found = await self._connections.run(read, timeout_ms=_DETAIL_TIMEOUT_MS)
        if found is None:
            raise NotFound(f"no request {request_id} is on record")
        return found

    async def file(self, file_id: UUID, tenant_id: str) -> FileRecord:
        """Return a stored file by its public id. Raises NotFound."""
        row = await self._connections.row(
            "get_file", file_id, tenant_id, timeout_ms=_READ_TIMEOUT_MS
        )
        if row is None:
            raise NotFound(f"no file {file_id}")
        return rows.file_record(row)

    async def file_of_any(self, request_id: UUID, file_id: UUID) -> FileRecord:
        """Return a file of any tenant's request, for an operator. Raises NotFound."""
        row = await self._connections.row(
            "detail_file", file_id, request_id, timeout_ms=_DETAIL_TIMEOUT_MS
        )
        if row is None:
            raise NotFound(f"no file {file_id} of request {request_id}")
        return rows.file_record(row)

    async def body(self, request_id: UUID, tenant_id: str, role: Role) -> Body:
        """Return a body. Raises NotFound if none is stored for this tenant; so may its pieces."""
        since = _recorded_since(request_id)
        row = await self._connections.row("get_body", request_id, tenant_id, role, since)
        return self._body(request_id, role, row)

    async def body_of_any(self, request_id: UUID, role: Role) -> Body:
        """Return a body of any tenant's request, for an operator."""
        since = _recorded_since(request_id)
        return self._body(
            request_id, role, await self._connections.row("detail_body", request_id, role, since)
        )

    async def charged(
        self, request_id: UUID, tenant_id: str, ended_at: datetime
    ) -> tuple[int | None, UsageDetails | None]:
        """Return the cost of an ended request in micro-dollars, and the details of its usage; None
        if unknown."""
        within = (ended_at - _RECORDED_WITHIN, ended_at + _RECORDED_WITHIN)
        row = await self._connections.row(
            "get_charged", request_id, tenant_id, *within, timeout_ms=_READ_TIMEOUT_MS
        )
        return (
            (None, None) if row is None else (row["cost_micros"], details_of(row["usage_details"]))
        )

    def _body(self, request_id: UUID, role: Role, row: asyncpg.Record | None) -> Body:
        if row is None:
            raise NotFound(f"no {role} body of request {request_id} is kept")
        packed = (
            _of(row["data"]) if row["data"] is not None else self._blobs.stream(row["blob_key"])
        )
        pieces = packed if row["encoding"] == "raw" else _unpacked(packed)
        return record_of(Body, row, pieces=pieces)

    async def _record(self, connection: asyncpg.Connection, row: asyncpg.Record) -> RequestRecord:
        files = await connection.fetch(sql("get_request_files"), row["id"])
        webhook = await webhook_of(connection, row)
        return rows.request_record(row, files, webhook, await self._places.of(connection, row))

    async def _detail(
        self,
        connection: asyncpg.Connection,
        request_id: UUID,
        request: asyncpg.Record | None,
        ended: asyncpg.Record | None,
    ) -> RequestDetail:
        attempts = await connection.fetch(sql("detail_attempts"), request_id)
        webhooks = await connection.fetch(sql("detail_webhooks"), request_id)
        bodies: list[asyncpg.Record] = []
        if ended is not None:
            key = (ended["id"], ended["created_at"])
            bodies = await connection.fetch(sql("detail_bodies"), *key)
        if request is not None:
            record = await self._record(connection, request)
            if not record.status.is_end:
                ended = None  # a dead job that was requeued: `ended` is its earlier end
        else:
            assert ended is not None
            record = rows.relayed_record(ended)
        first, last = dict(request or {}), dict(ended or {})
        return RequestDetail(
            record=record,
            pool=(first or last)["pool"],
            process=first.get("claimed_by") or last.get("instance_id"),
            attempts=tuple(_attempt(row) for row in reversed(attempts)),
            webhooks=tuple(record_of(DeliveryRecord, row) for row in reversed(webhooks)),
            bodies=tuple(record_of(BodyRecord, row) for row in bodies),
            request=first,
            ended=last,
        )


def _recorded_since(request_id: UUID) -> datetime:
    """Return the earliest time at which the audit may have a request, whose id contains its
    receipt. A statement locks each partition that it may read, with its indexes, and the number of
    locks is bounded."""
    if request_id.version != 7:
        return _EPOCH
    ms = min(request_id.int >> 80, (datetime.now(UTC) - _EPOCH) // _MILLISECOND)
    return _EPOCH + ms * _MILLISECOND - _RECORDED_WITHIN


def _scans_of(start: datetime, before: UUID) -> Iterator[tuple[str, datetime, UUID]]:
    """Yield the scans for words, one after the other until a page is full: the statement, the
    earliest time, and the first id from which on the scan is complete."""
    nowhere = UUID(int=0)
    yield "recently_ended", start, nowhere
    last = (
        _EPOCH + min(before.int >> 80, (datetime.now(UTC) - _EPOCH) // _MILLISECOND) * _MILLISECOND
    )
    for length in _SEARCHED_FIRST:
        if (since := last - length) > start:
            yield "ended_with_words", since, _id_at(since, _ID_AFTER)
    yield "ended_with_words", start, nowhere


def _filters_of(criteria: SearchFilter) -> tuple[object, ...]:
    return (
        [status.value for status in criteria.statuses] or None,
        rows.cleaned(criteria.tenant_id),
        rows.cleaned(criteria.model),
        criteria.kind,
        criteria.source,
        rows.cleaned(criteria.failure_code),
        rows.cleaned(criteria.subject),
        rows.cleaned(criteria.conversation),
        criteria.since or _FIRST,
        criteria.until or _LAST,
        rows.cleaned(criteria.upstream),
    )


def _query_of(criteria: SearchFilter) -> str:
    """Return PostgreSQL's query for the beginnings of all words; weight A marks subjects and
    keys."""
    where = ":*" if criteria.in_prompts else ":*A"
    words = (_KEY.sub(r"\1", word) for word in criteria.text.split())
    words = (re.sub(r"[\\'\0]", " ", word).strip() for word in words)
    return " & ".join(f"'{rows.cleaned(word)}'{where}" for word in words if word)


def _listed(row: Mapping[str, Any]) -> Listed:
    """Return a request from a row with the columns of `list_requests`."""
    return record_of(
        Listed,
        row,
        request_id=rows.uuid_of(row["id"]),
        status=Status(row["status"]),
        kind=rows.kind_of(row),
    )


async def _with_jobs(
    connection: asyncpg.Connection, found: list[asyncpg.Record]
) -> tuple[FoundRequest, ...]:
    """Return rows of `search_requests`; the costs of ended jobs and streams are in the audit."""
    jobs = [row for row in found if row["source"] in ("job", "stream")]
    ends = [row["finished_at"] for row in jobs if row["finished_at"] is not None] or [_EPOCH]
    within = (min(ends) - _RECORDED_WITHIN, max(ends) + _RECORDED_WITHIN)
    ids = [row["id"] for row in jobs]
    of_jobs = (
        await connection.fetch(sql("search_jobs"), ids, *within, PROMPT_HEAD_CHARS) if ids else []
    )
    more = {row["id"]: dict(row) for row in of_jobs}
    items = ({**row, **more.get(row["id"], {})} for row in found)
    return tuple(record_of(FoundRequest, item, listed=_listed(item)) for item in items)


def _call_of(row: asyncpg.Record) -> ConversationCall:
    """Return a call of a conversation from a row of the audit."""
    return record_of(
        ConversationCall,
        row,
        status=Status(row["status"]),
        usage=rows.usage_of(row),
        lineage=Lineage(**{name: row[name] for name in rows.LINEAGE_COLUMNS}),
    )


def _attempt(row: asyncpg.Record) -> AttemptRecord:
    return record_of(
        AttemptRecord,
        row,
        process=row["instance_id"],
        began_at=row["created_at"],
        usage=rows.usage_of(row),
        failure=rows.failure_of(row["failure"]),
    )


def _of_line(row: asyncpg.Record) -> RequestDetail:
    """Return a line of a batch that has not ended: no other table has it."""
    record = RequestRecord(
        request_id=rows.uuid_of(row["id"]),
        tenant_id=row["tenant_id"],
        source="batch",
        status=Status.RUNNING if row["state"] == "calling" else Status.QUEUED,
        classification=Classification(None, ClassifiedBy.BODY, row["endpoint"]),
        priority=-100,
        attempts=row["attempts"],
        created_at=made_at(row["id"]),
        deadline_at=row["expires_at"],
    )
    request = {"prompt": row["body"], "lapses": row["lapses"], "endpoint": row["endpoint"]}
    request |= {"key_id": row["key_id"], "batch_id": row["batch_id"]}
    return RequestDetail(record, "", row["claimed_by"], (), (), (), request, {})


async def _of(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _unpacked(packed: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield decompressed data in bounded pieces: it may be a thousand times larger than its
    input."""
    unpacker = zlib.decompressobj()
    async for piece in packed:
        left = piece
        while left:
            if found := unpacker.decompress(left, _PIECE_BYTES):
                yield found
            left = unpacker.unconsumed_tail
    if found := unpacker.flush():
        yield found


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A request, or the next line of a batch (`is_line`). pool: whose queue has it. batch: the
    provider's batch that it is in, and why that batch is held. upstream: of its last call."""

    request_id: UUID
    tenant_id: str
    pool: str
    status: Status
    kind: str | None
    model: str | None
    claimed_by: str | None
    attempts: int
    created_at: datetime
    not_before: datetime | None
    admitted_at: datetime | None
    finished_at: datetime | None
    failure_code: str | None
    failure_message: str | None = None
    tier: str | None = None
    batch: str | None = None
    upstream: str | None = None
    is_line: bool = False
    key_id: str | None = None
    subject: str | None = None
    conversation: str | None = None

    @property
    def is_for_batch(self) -> bool:
        """Whether it is in a provider's batch, or waits for one."""
        return self.tier == Tier.BATCH and self.claimed_by is None


@dataclass(frozen=True, slots=True)
class RunningCall:
    """A job that holds a permit since `admitted_at`."""

    request_id: UUID
    admitted_at: datetime | None


class ActiveRequests:
    """Locations of requests, for observers of a pool. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._places = QueuePlaces()

    async def whereabouts(self, request_id: UUID) -> Whereabouts:
        """Return a request's location. Raises NotFound, also for a stream that has not ended."""
        row = await self._connections.row(
            "get_whereabouts", request_id, timeout_ms=_READ_TIMEOUT_MS
        )
        if row is None:
            raise NotFound(f"no request {request_id} is on record")
        return record_of(Whereabouts, row, status=Status(row["status"]))

    async def place(self, request_id: UUID) -> int | None:
        """Return the place of a queued job, 1 is next; None if counting takes too long."""

        async def read(connection: asyncpg.Connection) -> int | None:
            row = await connection.fetchrow(sql("get_whereabouts"), request_id)
            return None if row is None else await self._places.of(connection, row)

        return await self._connections.run(read, timeout_ms=_READ_TIMEOUT_MS)

    async def ahead(self, request_id: UUID) -> JobsAhead | None:
        """Return the tenant's jobs before a queued job; None if counting takes too long."""

        async def read(connection: asyncpg.Connection) -> JobsAhead | None:
            return await self._places.ahead(connection, request_id)

        return await self._connections.run(read, timeout_ms=_READ_TIMEOUT_MS)

    async def calls(self, pool: str) -> dict[tuple[str, int], RunningCall]:
        """Return the jobs that hold permits, by process and the sequence of the permit's fence."""
        found = await self._connections.rows("running_calls", pool, timeout_ms=_READ_TIMEOUT_MS)
        return {
            (row["instance_id"], row["fence_sequence"]): record_of(RunningCall, row)
            for row in found
        }
