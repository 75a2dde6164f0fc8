"""Housekeeping: partitions made ahead, and the old deleted, by each tenant's days.

Invariant: a request that has not ended is never touched, nor its files. Blobs go before the rows
that name them, so that a run cut short is repeated and leaves nothing behind. No step holds a lock
for long: a partition that can't be locked at once is left for the next run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from uuid import UUID

import asyncpg

from tidegate.errors import StoreUnavailable
from tidegate.store import partitions
from tidegate.store.blobs import Blobs
from tidegate.store.connection import Connections
from tidegate.store.queries import sql
from tidegate.store.retention import Retention, delete_rows, retention_of
from tidegate.telemetry import Log, get_logger

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
    return datetime.combine(day, time.min, UTC)


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
