"""Retention and erasure: partitions, expired rows and blobs, subjects and tenants.

Invariants: unfinished requests are never touched; rows are kept for exactly their tenant's days;
blobs are deleted before the rows that name them, so an interrupted run can be repeated; an erased
subject is marked first, so that nothing of it is written later; sums stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

import asyncpg

from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.store import database as partitions
from tidegate.store.audit import mark_erased
from tidegate.store.blobs import Blobs
from tidegate.store.database import Connections, sql
from tidegate.store.records import Json
from tidegate.store.spill import Scrubbed, scrub
from tidegate.telemetry.logging import Log, get_logger

TIMEOUT_MS = 30_000
_WALKED_AT_ONCE = 20_000
_START = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Retention:
    """What ended before the day `cutoff` goes; of the tenants in `own` what ended before theirs."""

    cutoff: date
    own: Mapping[str, date]

    @property
    def longer(self) -> list[str]:
        """Tenants that keep what others don't."""
        return [tenant for tenant, day in self.own.items() if day < self.cutoff]

    def keepers(self, day: date) -> list[str]:
        """Tenants that keep rows of a day that has passed for the others."""
        return [tenant for tenant, first in self.own.items() if first <= day]

    def due(self, day: date) -> list[str]:
        """Tenants for which a day has passed that others keep."""
        return [tenant for tenant, first in self.own.items() if first > day]

    @property
    def last_due(self) -> date:
        """Before this day somebody's rows may have to go."""
        return max((self.cutoff, *self.own.values()))


async def retention_of(connections: Connections, days: int, today: date) -> Retention:
    """Raises StoreUnavailable."""

    async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
        found: list[asyncpg.Record] = await connection.fetch(sql("own_retention"), days)
        return found

    rows = await connections.run(read, timeout_ms=TIMEOUT_MS)
    # Days beyond the calendar's beginning are as good as for ever.
    most = (today - date.min).days
    own = {row["id"]: today - timedelta(days=min(row["retention_days"], most)) for row in rows}
    return Retention(today - timedelta(days=min(days, most)), own)


async def delete_rows(
    connections: Connections, blobs: Blobs, name: str, tenants: Sequence[str], *, theirs: bool
) -> tuple[int, int]:
    """Delete the rows of these tenants from one partition, or of all but these; blobs of bodies
    first. Returns how many rows and blobs."""
    last: UUID | None = _START
    rows = keys = 0
    while last is not None:

        async def walk(connection: asyncpg.Connection, after: UUID = last) -> asyncpg.Record:
            return await connection.fetchrow(
                "SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id)"
                " FILTER (WHERE (tenant_id = ANY($2::text[])) = $3) AS found"
                f" FROM (SELECT id, tenant_id FROM {name} WHERE id > $1 ORDER BY id LIMIT $4) AS n",
                *(after, list(tenants), theirs, _WALKED_AT_ONCE),
            )

        row = await connections.run(walk, timeout_ms=TIMEOUT_MS)
        last = row["last"]
        if row["found"]:
            keys += await _delete_blobs(connections, blobs, name, row["found"])
            rows += await _delete(connections, name, row["found"])
    return rows, keys


async def _delete_blobs(
    connections: Connections, blobs: Blobs, name: str, ids: Sequence[UUID]
) -> int:
    if not name.startswith("bodies_"):
        return 0

    async def read(connection: asyncpg.Connection) -> list[str]:
        found = await connection.fetch(
            f"SELECT blob_key FROM {name} WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL", ids
        )
        return [row["blob_key"] for row in found]

    keys = await connections.run(read, timeout_ms=TIMEOUT_MS)
    await blobs.delete(keys)
    return len(keys)


async def _delete(connections: Connections, name: str, ids: Sequence[UUID]) -> int:
    async def delete(connection: asyncpg.Connection) -> int:
        done = await connection.execute(f"DELETE FROM {name} WHERE id = ANY($1::uuid[])", ids)
        return int(done.split()[1])

    return await connections.run(delete, timeout_ms=TIMEOUT_MS)


_BATCH = 500
_TIMEOUT_MS = 30_000
_HOUSE_EVERY_S = 3_600
_HOUSE_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a run has deleted; `skipped` partitions were in use and are left for the next run."""

    requests: int = 0
    blobs: int = 0
    partitions: int = 0
    skipped: int = 0


async def keep_house(connections: Connections) -> None:
    """Make partitions ahead for ever; a task of every process, cheap when there is nothing."""
    while True:
        try:
            await connections.run(_make_ahead, timeout_ms=_TIMEOUT_MS)
            pause_s = _HOUSE_EVERY_S
        except StoreUnavailable:
            pause_s = _HOUSE_RETRY_S
        await asyncio.sleep(pause_s)


async def _make_ahead(connection: asyncpg.Connection) -> None:
    await partitions.make_ahead(connection, datetime.now(UTC).date())


async def prune(connections: Connections, blobs: Blobs, retention_days: int) -> PruneReport:
    """Delete what ended more than `retention_days` ago, or its tenant's own days."""
    wanted = await retention_of(connections, retention_days, datetime.now(UTC).date())
    requests, files = await _prune_requests(
        connections, blobs, wanted.cutoff, "prune_candidates", wanted.longer
    )
    for tenant, cutoff in wanted.own.items():
        more = await _prune_requests(connections, blobs, cutoff, "prune_candidates_of", tenant)
        requests, files = requests + more[0], files + more[1]
    files += await _prune_batches(connections, blobs, wanted.cutoff, list(wanted.own), theirs=False)
    for tenant, cutoff in wanted.own.items():
        files += await _prune_batches(connections, blobs, cutoff, [tenant], theirs=True)
    await _forget(connections, wanted.cutoff)
    dropped, skipped, bodies = await _prune_partitions(connections, blobs, wanted)
    orphans = await _sweep_orphans(connections, blobs, wanted.cutoff)
    report = PruneReport(requests, files + bodies + orphans, dropped, skipped)
    get_logger().info(
        Log.PRUNED, requests=requests, blobs=report.blobs, partitions=dropped, skipped=skipped
    )
    return report


async def _prune_requests(
    connections: Connections, blobs: Blobs, cutoff: date, query: str, whose: str | list[str]
) -> tuple[int, int]:
    before = _start_of(cutoff)
    requests = files = 0
    while True:

        async def candidates(connection: asyncpg.Connection) -> tuple[list[UUID], list[str]]:
            rows = await connection.fetch(sql(query), before, _BATCH, whose)
            ids = [row["id"] for row in rows]
            found = await connection.fetch(sql("blobs_of_requests"), ids)
            return ids, [row["blob_key"] for row in found]

        ids, keys = await connections.run(candidates, timeout_ms=_TIMEOUT_MS)
        if not ids:
            return requests, files
        await blobs.delete(keys)

        async def delete(connection: asyncpg.Connection, ids: list[UUID] = ids) -> None:
            await connection.execute(sql("delete_requests"), ids)

        await connections.run(delete, timeout_ms=_TIMEOUT_MS)
        requests += len(ids)
        files += len(keys)


async def _forget(connections: Connections, cutoff: date) -> None:
    async def forget(connection: asyncpg.Connection) -> None:
        await connection.execute(sql("forget_workers"), _start_of(cutoff))
        await connection.execute(sql("forget_native_keys"))

    await connections.run(forget, timeout_ms=_TIMEOUT_MS)


async def _prune_batches(
    connections: Connections, blobs: Blobs, cutoff: date, tenants: Sequence[str], *, theirs: bool
) -> int:
    """Batches that have long ended, and files that nobody has yet to read, of these tenants or of
    all but these; returns how many files."""
    given = (_start_of(cutoff), _BATCH, tenants, theirs)
    files = 0

    async def ended(connection: asyncpg.Connection) -> int:
        found = await connection.fetch(sql("batches_ended_before"), *given)
        await connection.execute(sql("delete_batches"), [row["id"] for row in found])
        return len(found)

    while await connections.run(ended, timeout_ms=_TIMEOUT_MS):
        continue

    async def old(connection: asyncpg.Connection) -> list[asyncpg.Record]:
        found: list[asyncpg.Record] = await connection.fetch(sql("old_batch_files"), *given)
        return found

    while found := await connections.run(old, timeout_ms=_TIMEOUT_MS):
        await blobs.delete([row["blob_key"] for row in found])
        ids = [row["id"] for row in found]

        async def forget(connection: asyncpg.Connection, ids: list[UUID] = ids) -> None:
            await connection.execute(sql("delete_batch_files"), ids)

        await connections.run(forget, timeout_ms=_TIMEOUT_MS)
        files += len(ids)
    return files


async def _prune_partitions(
    connections: Connections, blobs: Blobs, wanted: Retention
) -> tuple[int, int, int]:
    async def find(connection: asyncpg.Connection) -> list[tuple[str, str]]:
        return await partitions.older_than(connection, wanted.last_due)

    dropped = skipped = bodies = 0
    for table, name in await connections.run(find, timeout_ms=_TIMEOUT_MS):
        day = partitions.day_of(name)
        assert day is not None
        has_passed = day < wanted.cutoff
        tenants = wanted.keepers(day) if has_passed else wanted.due(day)
        if tenants or not has_passed:
            if tenants:
                _, keys = await delete_rows(
                    connections, blobs, name, tenants, theirs=not has_passed
                )
                bodies += keys
            continue
        if table == "bodies":
            bodies += await _delete_body_blobs(connections, blobs, name)

        async def drop(
            connection: asyncpg.Connection, table: str = table, name: str = name
        ) -> bool:
            return await partitions.drop(connection, table, name)

        if await connections.run(drop, timeout_ms=_TIMEOUT_MS):
            dropped += 1
        else:
            skipped += 1
    for table in partitions.TABLES:
        bodies += await _clear_default(connections, blobs, f"{table}_default", wanted)
    return dropped, skipped, bodies


async def _clear_default(
    connections: Connections, blobs: Blobs, name: str, wanted: Retention
) -> int:
    """The partition of what has no day of its own: few rows, and usually none."""
    bodies = 0
    others = "NOT (tenant_id = ANY($2::text[]))"
    todo: list[tuple[date, str, list[str]]] = [(wanted.cutoff, others, list(wanted.own))]
    todo += [(day, "tenant_id = ANY($2::text[])", [tenant]) for tenant, day in wanted.own.items()]
    for cutoff, condition, tenants in todo:
        where = f"created_at < $1 AND {condition}"
        if name.startswith("bodies_"):
            bodies += await _delete_body_blobs(connections, blobs, name, where, cutoff, tenants)

        async def clear(
            connection: asyncpg.Connection,
            where: str = where,
            cutoff: date = cutoff,
            tenants: list[str] = tenants,
        ) -> None:
            await connection.execute(
                f"DELETE FROM {name} WHERE {where}", _start_of(cutoff), tenants
            )

        await connections.run(clear, timeout_ms=_TIMEOUT_MS)
    return bodies


async def _delete_body_blobs(
    connections: Connections,
    blobs: Blobs,
    name: str,
    where: str = "created_at < $1 AND NOT (tenant_id = ANY($2::text[]))",
    cutoff: date = date.max,
    tenants: Sequence[str] = (),
) -> int:
    async def read(connection: asyncpg.Connection) -> list[str]:
        found = await connection.fetch(
            f"SELECT blob_key FROM {name} WHERE blob_key IS NOT NULL AND {where}",
            *(_start_of(cutoff), list(tenants)),
        )
        return [row["blob_key"] for row in found]

    keys = await connections.run(read, timeout_ms=_TIMEOUT_MS)
    await blobs.delete(keys)
    return len(keys)


def _start_of(day: date) -> datetime:
    return datetime.combine(day, datetime.min.time(), UTC)


async def _sweep_orphans(connections: Connections, blobs: Blobs, cutoff: date) -> int:
    """Delete old blobs that nothing refers to: uploads whose submit was refused or cut short."""
    count = 0
    for day in await blobs.days():
        if day >= cutoff.isoformat():
            break
        async for keys in blobs.keys_of(day):

            async def used(connection: asyncpg.Connection, keys: list[str] = keys) -> set[str]:
                return {
                    row["blob_key"] for row in await connection.fetch(sql("blobs_in_use"), keys)
                }

            in_use = await connections.run(used, timeout_ms=_TIMEOUT_MS)
            orphans = [key for key in keys if key not in in_use]
            await blobs.delete(orphans)
            count += len(orphans)
    return count


_SCANNED_AT_ONCE = 20_000
_ERASED_AT_ONCE = 500


@dataclass(slots=True)
class EraseReport:
    """What a run has erased, or would erase. requests: of our own API. calls: rows of the audit.
    answers: kept under idempotency keys. batches: of a whole tenant, with their lines. spilled:
    entries on this host's disk. held: files of entries that a running process has; it drops those
    that are erased when it writes the rest. done: nothing is left that this host can reach."""

    requests: int = 0
    calls: int = 0
    attempts: int = 0
    bodies: int = 0
    answers: int = 0
    batches: int = 0
    blobs: int = 0
    spilled: int = 0
    held: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True)
class Whose:
    """A subject, of one tenant or of all; or without one a whole tenant. Raises ConfigError."""

    tenant_id: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        if not self.tenant_id and not self.subject:
            raise ConfigError("subject", "(not set)", "give a subject, a tenant, or both")
        for name, value in (("subject", self.subject), ("tenant", self.tenant_id)):
            if value is not None and not value.isprintable():
                raise ConfigError(name, ascii(value), "must be printable")


@dataclass(slots=True)
class _Found:
    """Of one step: the audit rows or requests to erase, and the requests that they are of."""

    ids: Sequence[UUID]
    requests: Sequence[UUID] = field(default_factory=list)


class Eraser:
    """One run."""

    def __init__(
        self, connections: Connections, blobs: Blobs, spill_dir: Path, whose: Whose
    ) -> None:
        self._connections = connections
        self._blobs = blobs
        self._spill_dir = spill_dir
        self._whose = whose
        self._gone: set[str] = set()
        self.report = EraseReport()

    async def run(self, *, dry_run: bool = False, within_s: float = float("inf")) -> EraseReport:
        """Erase, or with `dry_run` only count. After `within_s` it stops between two steps; the
        report then says that it is not done. Raises StoreUnavailable."""
        until = time.monotonic() + within_s
        whose = self._whose
        if not dry_run:

            async def mark(connection: asyncpg.Connection) -> None:
                await mark_erased(connection, whose.tenant_id, whose.subject)

            await self._connections.run(mark, timeout_ms=_TIMEOUT_MS)
        if whose.tenant_id is not None and whose.subject is None:
            await self._erase_batches(whose.tenant_id, dry_run)
        for scan, erase in (
            ("scan_requests", self._erase_requests),
            ("scan_audit", self._erase_calls),
        ):
            async for found in self._matching(scan):
                if time.monotonic() >= until:
                    return self.report
                await erase(found, dry_run)
        scrubbed: Scrubbed = await asyncio.to_thread(
            scrub, self._spill_dir, self._matches, dry_run=dry_run
        )
        self.report.spilled, self.report.held = scrubbed.entries, scrubbed.held
        self.report.done = not dry_run
        if not dry_run:
            get_logger().warning(
                Log.ERASED,
                tenant=whose.tenant_id,
                requests=self.report.requests,
                calls=self.report.calls,
                blobs=self.report.blobs,
            )
        return self.report

    async def _matching(self, scan: str) -> AsyncIterator[_Found]:
        """All rows that are meant, a few at a time, in one walk over the table."""
        last: UUID | None = _START
        whose = self._whose
        while last is not None:

            async def read(connection: asyncpg.Connection, after: UUID = last) -> asyncpg.Record:
                return await connection.fetchrow(
                    sql(scan), after, whose.tenant_id, whose.subject, _SCANNED_AT_ONCE
                )

            row = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
            last, ids = row["last"], row["found"] or []
            requests = ids if scan == "scan_requests" else row["requests"] or []
            for start in range(0, len(ids), _ERASED_AT_ONCE):
                some = slice(start, start + _ERASED_AT_ONCE)
                yield _Found(ids[some], requests[some])

    async def _erase_requests(self, found: _Found, dry_run: bool) -> None:
        await self._delete_blobs("blobs_of_requests", found, dry_run)
        self.report.requests += len(found.ids)
        self._gone |= {str(one) for one in found.ids}
        if not dry_run:
            counts = await self._delete(
                (("erase_attempts", found.ids), ("erase_requests", found.ids))
            )
            self.report.attempts += counts["erase_attempts"]

    async def _erase_calls(self, found: _Found, dry_run: bool) -> None:
        await self._delete_blobs("blobs_of_bodies", found, dry_run)
        self.report.calls += len(found.ids)
        self._gone |= {str(one) for one in found.requests}
        if not dry_run:
            counts = await self._delete(
                (
                    ("erase_bodies", found.ids),
                    ("erase_attempts", found.requests),
                    ("erase_native_keys", found.requests),
                    ("erase_audit", found.ids),
                )
            )
            self.report.attempts += counts["erase_attempts"]
            self.report.bodies += counts["erase_bodies"]
            self.report.answers += counts["erase_native_keys"]

    async def _erase_batches(self, tenant_id: str, dry_run: bool) -> None:
        """Batches with their lines, and the files that they were read from and written to."""
        if dry_run:

            async def count(connection: asyncpg.Connection) -> asyncpg.Record:
                return await connection.fetchrow(sql("count_batches"), tenant_id)

            row = await self._connections.run(count, timeout_ms=_TIMEOUT_MS)
            self.report.batches, self.report.blobs = row["batches"], row["files"]
            return

        async def of_tenant(connection: asyncpg.Connection, query: str) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                sql(query), tenant_id, _ERASED_AT_ONCE
            )
            return found

        while found := await self._connections.run(
            partial(of_tenant, query="batches_of_tenant"), timeout_ms=_TIMEOUT_MS
        ):
            ids = [row["id"] for row in found]
            await self._delete((("delete_batches", ids), ("erase_native_keys", ids)))
            self.report.batches += len(found)
        while found := await self._connections.run(
            partial(of_tenant, query="batch_files_of_tenant"), timeout_ms=_TIMEOUT_MS
        ):
            await self._blobs.delete([row["blob_key"] for row in found])
            await self._delete((("delete_batch_files", [row["id"] for row in found]),))
            self.report.blobs += len(found)

    async def _delete_blobs(self, query: str, found: _Found, dry_run: bool) -> None:
        async def read(connection: asyncpg.Connection) -> list[str]:
            rows = await connection.fetch(sql(query), list(found.ids))
            return [row["blob_key"] for row in rows]

        keys = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        self.report.blobs += len(keys)
        if not dry_run:
            await self._blobs.delete(keys)

    async def _delete(self, steps: Sequence[tuple[str, Sequence[UUID]]]) -> dict[str, int]:
        """In one transaction; returns how many rows each statement took."""

        async def delete(connection: asyncpg.Connection) -> dict[str, int]:
            return {
                name: int((await connection.execute(sql(name), list(ids))).split()[1])
                for name, ids in steps
            }

        return await self._connections.run(delete, timeout_ms=_TIMEOUT_MS)

    def _matches(self, entry: Json) -> bool:
        """Whether an entry that waits on the disk is meant. A job's end does not say whose it is,
        but its request has been found."""
        row, whose = entry["row"], self._whose
        if str(row["id"]) in self._gone:
            return True
        if "tenant_id" not in row:
            return False
        is_tenants = whose.tenant_id in (None, row["tenant_id"])
        return is_tenants and whose.subject in (None, row.get("subject"))
