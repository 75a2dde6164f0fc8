"""Retention, erasure and export: partitions, expired rows and blobs, subjects, tenants, days.

Invariants: unfinished requests are never touched; rows are kept for exactly their tenant's days;
blobs are deleted before the rows that name them, so an interrupted run can be repeated; an erased
subject is marked first, so that nothing of it is written later; totals are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import new_id
from tidegate.errors import ConfigError, NotFound, StoreUnavailable
from tidegate.store import database
from tidegate.store.audit import Mark, digest_of, erased_among, unpack
from tidegate.store.blobs import Blobs
from tidegate.store.database import Connections, Work, count_in, sql
from tidegate.store.operator_actions import OperatorActions
from tidegate.store.records import Json, blobs_of
from tidegate.store.spill import scrub
from tidegate.telemetry.logging import Log, get_logger

T = TypeVar("T")

_TIMEOUT_MS = 30_000
_WALKED_AT_ONCE = 20_000
_BATCH = 500
_START = UUID(int=0)
_HOUSE_EVERY_S = 3_600
_HOUSE_RETRY_S = 30


@dataclass(frozen=True, slots=True)
class Cutoffs:
    """Cutoffs of retention: requests that ended before `day` expire, those of tenants in `own`
    before their own day."""

    day: date
    own: Mapping[str, date]

    @property
    def scopes(self) -> list[tuple[datetime, list[str], bool]]:
        """Return each cutoff with tenants, and whether it applies to them or to all others."""
        own = [(_start_of(day), [tenant], True) for tenant, day in self.own.items()]
        return [(_start_of(self.day), list(self.own), False), *own]

    def keepers(self, day: date) -> list[str]:
        """Return tenants that keep rows of a day that has expired for others."""
        return [tenant for tenant, first in self.own.items() if first <= day]

    def due(self, day: date) -> list[str]:
        """Return tenants for which a day has expired that others keep."""
        return [tenant for tenant, first in self.own.items() if first > day]

    def is_over(self, tenant: str, day: date) -> bool:
        """Whether a day has expired for a tenant."""
        return day < self.own.get(tenant, self.day)

    @property
    def last_due(self) -> date:
        """The day before which rows of some tenant may have to be deleted."""
        return max((self.day, *self.own.values()))


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a run has deleted; `skipped` partitions were in use and are left for the next run."""

    requests: int = 0
    blobs: int = 0
    partitions: int = 0
    skipped: int = 0


@dataclass(slots=True)
class EraseReport:
    """What a run has erased, or would erase. requests: of the gateway's own API. calls: rows of the
    audit. answers: under idempotency keys. batches: of a whole tenant, with their lines. spilled:
    entries on this host's disk. held: files of a running process, which drops erased entries when
    it writes them. resources: at providers, now without an owner; they stay there. done: nothing is
    left that this host can reach."""

    requests: int = 0
    calls: int = 0
    attempts: int = 0
    bodies: int = 0
    answers: int = 0
    batches: int = 0
    blobs: int = 0
    resources: int = 0
    spilled: int = 0
    held: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True)
class Whose:
    """A subject, of one tenant or of all; without a subject a whole tenant. Raises ConfigError."""

    tenant_id: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        if not self.tenant_id and not self.subject:
            raise ConfigError("subject", "(not set)", "give a subject, a tenant, or both")
        for name, value in (("subject", self.subject), ("tenant", self.tenant_id)):
            if value is not None and not value.isprintable():
                raise ConfigError(name, ascii(value), "must be printable")


def _named(whose: Whose) -> str:
    """Return the name of the erased for the record: of a subject a digest."""
    digest = "" if whose.subject is None else f"subject {digest_of(whose.subject).hex()[:16]}"
    return " of ".join(one for one in (digest, whose.tenant_id) if one)


async def mark_erased(
    connection: asyncpg.Connection, tenant_id: str | None, subject: str | None
) -> None:
    """Mark a subject or tenant as erased, in a transaction of its own. Raises StoreUnavailable if
    another client, such as a backup, locks the table for long: every writer of records would wait
    behind it."""
    await connection.execute("SET LOCAL lock_timeout = '1500ms'")
    try:
        await connection.execute(sql("lock_erased"))
    except asyncpg.LockNotAvailableError:
        raise StoreUnavailable("the table `erased` is in use, perhaps by a backup") from None
    digest = None if subject is None else digest_of(subject)
    await connection.execute(sql("add_erased"), new_id(), tenant_id, digest)


async def make_partitions(connections: Connections) -> None:
    """Make partitions ahead, until cancelled; cheap if there is nothing to do. Every process does
    so. Without a partition rows go into the default one, which retention walks row by row."""
    is_failing = False
    while True:
        try:
            await connections.run(
                lambda connection: database.make_ahead(connection, datetime.now(UTC).date()),
                timeout_ms=_TIMEOUT_MS,
            )
            pause_s, is_failing = _HOUSE_EVERY_S, False
        except (StoreUnavailable, asyncpg.PostgresError) as failed:
            pause_s = _HOUSE_RETRY_S
            if not (is_failing or connections.unavailable):  # an outage is logged elsewhere
                is_failing = True
                get_logger().warning(Log.PARTITIONS_MISSING, detail=str(failed))
        await asyncio.sleep(pause_s)


class Retention:
    """Deletes expired rows, and rows to be erased. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections, blobs: Blobs, spill_dir: Path) -> None:
        self._connections = connections
        self.blobs = blobs
        self._spill_dir = spill_dir

    async def prune(self, retention_days: int, actions_days: int = 365) -> PruneReport:
        """Delete requests that ended more than `retention_days` ago, or their tenant's own days,
        and operators' actions after `actions_days`, in small steps; safe to interrupt."""
        cutoffs = await self._cutoffs(retention_days, datetime.now(UTC).date())
        requests = blobs = 0
        for before, tenants, is_own in cutoffs.scopes:
            deleted = await self._prune_requests(before, tenants, is_own=is_own)
            requests, blobs = requests + deleted[0], blobs + deleted[1]
        for before, tenants, is_own in cutoffs.scopes:
            blobs += await self._prune_batches(before, tenants, is_own=is_own)
        await self._connections.execute(
            "forget_workers", _start_of(cutoffs.day), timeout_ms=_TIMEOUT_MS
        )
        oldest = datetime.now(UTC) - timedelta(days=actions_days)
        await self._connections.execute("prune_actions", oldest, timeout_ms=_TIMEOUT_MS)
        await self._connections.execute("forget_native_keys", timeout_ms=_TIMEOUT_MS)
        await self._connections.execute("forget_expired_resources", timeout_ms=_TIMEOUT_MS)
        dropped, skipped, bodies = await self._prune_partitions(cutoffs)
        blobs += bodies + await self._sweep_orphans(cutoffs.day)
        get_logger().info(
            Log.PRUNED, requests=requests, blobs=blobs, partitions=dropped, skipped=skipped
        )
        return PruneReport(requests, blobs, dropped, skipped)

    async def erase(
        self, whose: Whose, *, dry_run: bool = False, within_s: float = float("inf")
    ) -> EraseReport:
        """Erase all of a subject or tenant; with `dry_run` only count. Stops after `within_s`
        between two steps; the report then says that it is not done."""
        if not dry_run:
            await OperatorActions(self._connections).write("subject.erase", _named(whose))
        return await _Erasure(self, whose, dry_run=dry_run).run(self._spill_dir, within_s)

    async def rows(self, name: str, *values: object) -> list[asyncpg.Record]:
        return await self._connections.rows(name, *values, timeout_ms=_TIMEOUT_MS)

    async def run(self, work: Work[T]) -> T:
        return await self._connections.run(work, timeout_ms=_TIMEOUT_MS)

    async def delete(self, *steps: tuple[str, Sequence[UUID]]) -> list[int]:
        """Run statements in one transaction; return the number of rows that each affected."""

        async def delete(connection: asyncpg.Connection) -> list[int]:
            return [count_in(await connection.execute(sql(name), ids)) for name, ids in steps]

        return await self.run(delete)

    async def delete_blobs(self, name: str, ids: Sequence[UUID], *, dry_run: bool = False) -> int:
        """Delete the blobs that the statement `name` finds; return how many."""
        keys = [row["blob_key"] for row in await self.rows(name, ids)]
        if not dry_run:
            await self.blobs.delete(keys)
        return len(keys)

    async def delete_files(self, name: str, *values: object) -> int:
        """Delete all files of batches that the statement `name` finds; return how many."""
        files = 0
        while found := await self.rows(name, *values):
            await self.blobs.delete([row["blob_key"] for row in found])
            await self.delete(("delete_batch_files", [row["id"] for row in found]))
            files += len(found)
        return files

    async def _cutoffs(self, days: int, today: date) -> Cutoffs:
        return _cutoffs(await self.rows("own_retention", days), days, today)

    async def _prune_requests(
        self, before: datetime, tenants: list[str], *, is_own: bool
    ) -> tuple[int, int]:
        query = "prune_candidates_of" if is_own else "prune_candidates"
        whose = tenants[0] if is_own else tenants
        requests = files = 0
        since = () if is_own else (_start_of(date.min),)  # what others keep is passed only once
        while found := await self.rows(query, before, _BATCH, whose, *since):
            ids = [row["id"] for row in found]
            files += await self.delete_blobs("blobs_of_requests", ids)
            await self.delete(("delete_requests", ids))
            requests += len(ids)
            since = () if is_own else (found[-1]["finished_at"],)
        return requests, files

    async def _prune_batches(self, before: datetime, tenants: list[str], *, is_own: bool) -> int:
        """Delete expired batches, and files that no batch has yet to read; return the number of
        files."""
        scope = (before, _BATCH, tenants, is_own)
        while found := await self.rows("batches_ended_before", *scope):
            await self.delete(("delete_batches", [row["id"] for row in found]))
        return await self.delete_files("old_batch_files", *scope)

    async def _prune_partitions(self, cutoffs: Cutoffs) -> tuple[int, int, int]:
        dropped = skipped = blobs = 0
        for table, name in await self.run(
            lambda connection: _older_than(connection, cutoffs.last_due)
        ):
            day = database.day_of(name)
            assert day is not None
            expired = day < cutoffs.day
            tenants = cutoffs.keepers(day) if expired else cutoffs.due(day)
            if tenants:
                blobs += await self._delete_rows(name, tenants, is_own=not expired)
            elif expired:
                if table == "bodies":
                    blobs += await self._delete_body_blobs("blobs_of_partition", name)
                drop = partial(_drop, table=table, name=name)
                if await self.run(drop):
                    dropped += 1
                    if table == "audit":
                        await self.rows("forget_logged_sums", day)
                        await self.rows("forget_logged_week", day)
                else:
                    skipped += 1
        for table in database.TABLES:
            for before, tenants, is_own in cutoffs.scopes:
                blobs += await self._delete_rows(
                    f"{table}_default", tenants, is_own=is_own, before=before
                )
        return dropped, skipped, blobs

    async def _delete_rows(
        self, name: str, tenants: Sequence[str], *, is_own: bool, before: datetime | None = None
    ) -> int:
        """Delete the rows of these tenants from one partition, or of all others; blobs of bodies
        first. Return the number of blobs."""
        last: UUID | None = _START
        blobs = 0
        while last is not None:
            (row,) = await self._in_partition(
                "walk_partition", name, last, tenants, is_own, before, _WALKED_AT_ONCE
            )
            last = row["last"]
            if row["found"]:
                if name.startswith("bodies_"):
                    blobs += await self._delete_body_blobs("blobs_of_rows", name, row["found"])
                await self._in_partition("delete_rows", name, row["found"])
        return blobs

    async def _delete_body_blobs(self, statement: str, name: str, *values: object) -> int:
        keys = [row["blob_key"] for row in await self._in_partition(statement, name, *values)]
        await self.blobs.delete(keys)
        return len(keys)

    async def _in_partition(
        self, statement: str, name: str, *values: object
    ) -> list[asyncpg.Record]:
        text = sql(statement).format(partition=name)
        return await self.run(lambda connection: connection.fetch(text, *values))

    async def _sweep_orphans(self, cutoff: date) -> int:
        """Delete old blobs that nothing refers to: uploads whose submission was rejected or
        interrupted."""
        count = 0
        for day in await self.blobs.days():
            if day >= cutoff.isoformat():
                break
            async for keys in self.blobs.keys_of(day):
                used = {row["blob_key"] for row in await self.rows("blobs_in_use", keys)}
                orphans = [key for key in keys if key not in used]
                await self.blobs.delete(orphans)
                count += len(orphans)
        return count


def _cutoffs(found: Sequence[asyncpg.Record], days: int, today: date) -> Cutoffs:
    # A retention beyond the calendar's beginning is unlimited.
    most = (today - date.min).days
    own = {row["id"]: today - timedelta(days=min(row["retention_days"], most)) for row in found}
    return Cutoffs(today - timedelta(days=min(days, most)), own)


def _start_of(day: date) -> datetime:
    return datetime.combine(day, datetime.min.time(), UTC)


class _Erasure:
    """One run of `Retention.erase`."""

    def __init__(self, retention: Retention, whose: Whose, *, dry_run: bool) -> None:
        self._retention = retention
        self._whose = whose
        self._dry_run = dry_run
        self._deleted: set[str] = set()
        self._report = EraseReport()

    async def _forget_books(self, connection: asyncpg.Connection) -> None:
        """Delete budget books that name an erased person, and their reservations, so that the end
        of a running call does not write the book again."""
        whose = self._whose.tenant_id, self._whose.subject
        for name in ("lock_books_of_erased", "forget_books_of_erased"):
            await connection.execute(sql(name), *whose)

    async def run(self, spill_dir: Path, within_s: float) -> EraseReport:
        until = time.monotonic() + within_s
        whose, report = self._whose, self._report
        if not self._dry_run:
            await self._retention.run(
                lambda connection: mark_erased(connection, whose.tenant_id, whose.subject)
            )
            await self._retention.run(self._forget_books)
        await self._resources()
        if whose.tenant_id is not None and whose.subject is None:
            await self._batches(whose.tenant_id)
        for scan, erase in (("scan_requests", self._requests), ("scan_audit", self._calls)):
            async for ids, requests in self._matching(scan):
                if time.monotonic() >= until:
                    return report
                self._deleted |= {str(one) for one in requests}
                await erase(ids, requests)
        await self._spilled(spill_dir)
        report.done = not self._dry_run
        if report.done:
            get_logger().warning(
                Log.ERASED,
                tenant=whose.tenant_id,
                requests=report.requests,
                calls=report.calls,
                blobs=report.blobs,
            )
        return report

    async def _matching(self, scan: str) -> AsyncIterator[tuple[list[UUID], list[UUID]]]:
        """Yield the ids of all matching rows, and of their requests, a few at a time, in one walk
        over the table."""
        last: UUID | None = _START
        whose = (self._whose.tenant_id, self._whose.subject)
        while last is not None:
            (row,) = await self._retention.rows(scan, last, *whose, _WALKED_AT_ONCE)
            last, ids = row["last"], row["found"] or []
            requests = ids if scan == "scan_requests" else row["requests"] or []
            for start in range(0, len(ids), _BATCH):
                some = slice(start, start + _BATCH)
                yield ids[some], requests[some]

    async def _resources(self) -> None:
        """Delete the owners of resources at providers: no request reaches them any more."""
        whose, retention = (self._whose.tenant_id, self._whose.subject), self._retention
        (row,) = await retention.rows("count_provider_resources", *whose)
        self._report.resources = row["resources"]
        if not self._dry_run:
            await retention.rows("erase_provider_resources", *whose)

    async def _requests(self, ids: list[UUID], _requests: list[UUID]) -> None:
        await self._delete_blobs("blobs_of_requests", ids)
        self._report.requests += len(ids)
        if not self._dry_run:
            attempts, _ = await self._retention.delete(
                ("erase_attempts", ids), ("erase_requests", ids)
            )
            self._report.attempts += attempts

    async def _calls(self, ids: list[UUID], requests: list[UUID]) -> None:
        await self._delete_blobs("blobs_of_bodies", ids)
        self._report.calls += len(ids)
        if not self._dry_run:
            bodies, attempts, answers, _ = await self._retention.delete(
                ("erase_bodies", ids),
                ("erase_attempts", requests),
                ("erase_native_keys", requests),
                ("erase_audit", ids),
            )
            self._report.bodies += bodies
            self._report.attempts += attempts
            self._report.answers += answers

    async def _batches(self, tenant_id: str) -> None:
        """Delete batches with their lines, and their input and output files."""
        retention, report = self._retention, self._report
        if self._dry_run:
            (row,) = await retention.rows("count_batches", tenant_id)
            report.batches, report.blobs = row["batches"], row["files"]
            return
        while found := await retention.rows("batches_of_tenant", tenant_id, _BATCH):
            ids = [row["id"] for row in found]
            await retention.delete(("delete_batches", ids), ("erase_native_keys", ids))
            report.batches += len(found)
        report.blobs += await retention.delete_files("batch_files_of_tenant", tenant_id, _BATCH)

    async def _delete_blobs(self, name: str, ids: list[UUID]) -> None:
        self._report.blobs += await self._retention.delete_blobs(name, ids, dry_run=self._dry_run)

    async def _spilled(self, spill_dir: Path) -> None:
        """Erase entries on this host's disk; first their blobs, which only the entries name."""
        report, keys = self._report, set[str]()

        def matches(entry: Json) -> bool:
            is_meant = self._matches(entry)
            keys.update(blobs_of(entry) if is_meant else ())
            return is_meant

        for dry_run in (True,) if self._dry_run else (True, False):
            report.spilled, report.held = await asyncio.to_thread(
                scrub, spill_dir, matches, dry_run=dry_run
            )
            if not self._dry_run:
                await self._retention.blobs.delete(keys)
        report.blobs += len(keys)

    def _matches(self, entry: Json) -> bool:
        """Whether an entry on disk is to be erased. A job's end does not name its owner, but its
        request was found before."""
        row, whose = entry["row"], self._whose
        if str(row["id"]) in self._deleted:
            return True
        if "tenant_id" not in row:
            return False
        is_tenants = whose.tenant_id in (None, row["tenant_id"])
        return is_tenants and whose.subject in (None, row.get("subject"))


_EXPORT_TIMEOUT_MS = 60_000
_PAGE, _PAGE_WITH_BODIES = 5_000, 20  # calls per query


@dataclass(frozen=True, slots=True)
class RecordDay:
    """A past day: when it was last summed up, and whether it has changed since."""

    day: date
    summed_at: datetime | None
    has_changed: bool


class RecordByDay:
    """The record by UTC day of a call's entry. Raises StoreUnavailable."""

    def __init__(self, connections: Connections, blobs: Blobs) -> None:
        self._connections, self._blobs = connections, blobs

    async def days(self) -> list[RecordDay]:
        """Return past days on record, oldest first."""
        rows = await self._connections.rows("days_on_record", timeout_ms=_EXPORT_TIMEOUT_MS)
        return [RecordDay(**row) for row in rows]

    async def state(self, day: date) -> tuple[Any, ...]:
        """Return a value that changes when a call of the day is added, corrected or deleted."""
        row = await self._connections.row("state_of_day", day, timeout_ms=_EXPORT_TIMEOUT_MS)
        assert row is not None
        return tuple(row)

    async def cutoffs(self, days: int) -> Cutoffs:
        """Return today's cutoffs if calls are kept for `days`, or their tenant's own days."""
        found = await self._connections.rows("own_retention", days, timeout_ms=_EXPORT_TIMEOUT_MS)
        return _cutoffs(found, days, datetime.now(UTC).date())

    async def erasures(self) -> dict[str | None, int]:
        """Return the number of erasures of each tenant; of all tenants under None."""
        found = await self._connections.rows("count_erasures", timeout_ms=_EXPORT_TIMEOUT_MS)
        return {row["tenant_id"]: row["erasures"] for row in found}

    async def unerased(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of exported calls that were not erased since."""
        marks = [Mark(one["tenant"], one["subject"], one["submitted_at"]) for one in calls]
        erased = await self._connections.run(
            lambda connection: erased_among(connection, marks, of_this_host=False),
            timeout_ms=_EXPORT_TIMEOUT_MS,
        )
        return [one for place, one in enumerate(calls) if place not in erased]

    async def calls(
        self, day: date, *, with_bodies: bool = False
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the calls of a day in pages: their columns, details of usage and, if requested,
        bodies."""
        within = (_start_of(day), _start_of(day + timedelta(days=1)))
        most = _PAGE_WITH_BODIES if with_bodies else _PAGE
        last = _START
        while rows := await self._connections.rows(
            "export_calls", *within, last, most, timeout_ms=_EXPORT_TIMEOUT_MS
        ):
            last = rows[-1]["id"]
            page = [_exported(row) for row in rows]
            if with_bodies:
                bodies = await self._bodies([row["id"] for row in rows], within)
                page = [one | bodies.get(one["id"], {}) for one in page]
            yield page

    async def _bodies(
        self, ids: Sequence[UUID], within: tuple[datetime, datetime]
    ) -> dict[UUID, dict[str, str]]:
        stored = await self._connections.rows(
            "export_bodies", ids, *within, timeout_ms=_EXPORT_TIMEOUT_MS
        )
        bodies: dict[UUID, dict[str, str]] = {}
        for one in stored:
            try:
                packed = one["data"] or await self._blobs.get(one["blob_key"])
            except NotFound:  # erased or pruned meanwhile
                continue
            body = unpack(one["encoding"], packed)
            text = body if isinstance(body, str) else orjson.dumps(body).decode()
            bodies.setdefault(one["id"], {})[f"{one['role']}_body"] = text
        return bodies


def _exported(row: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(row)
    details: dict[str, Any] = orjson.loads(values["usage_details"] or "{}")
    return values | details | {"request_id": str(values["request_id"])}


async def _older_than(connection: asyncpg.Connection, day: date) -> list[tuple[str, str]]:
    """Return (table, partition) of each partition whose whole day is before `day`, oldest first."""
    rows = await connection.fetch(sql("list_partitions"), list(database.TABLES))
    found = [
        (when, row["parent"], row["child"])
        for row in rows
        if (when := database.day_of(row["child"])) is not None and when < day
    ]
    return [(parent, child) for _, parent, child in sorted(found)]


async def _drop(connection: asyncpg.Connection, table: str, name: str) -> bool:
    """Drop one partition in this transaction; False if it is in use.

    A long wait for the lock would block every insert that queues behind it.
    """
    await connection.execute(sql("lock_partitions"), database.PARTITIONS_LOCK)
    await connection.execute("SET LOCAL lock_timeout = '500ms'")
    await connection.execute("SAVEPOINT before_drop")
    try:
        for statement in ("detach_partition", "drop_partition"):
            await connection.execute(sql(statement).format(table=table, partition=name))
    except asyncpg.LockNotAvailableError:
        await connection.execute("ROLLBACK TO SAVEPOINT before_drop")
        return False
    return True
