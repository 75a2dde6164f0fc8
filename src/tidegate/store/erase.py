"""Erasing all of a subject or a tenant: rows, bodies, files, and what waits on this host's disk.

Invariant: what was received before is first marked as erased, so that nothing of it is written
later; blobs go before the rows that name them. So a run that was cut short is repeated, and goes on
with what is left. Sums stay: numbers that name nobody but the tenant.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID

import asyncpg

from tidegate.errors import ConfigError
from tidegate.store.blobs import Blobs
from tidegate.store.connection import Connections
from tidegate.store.erased import mark_erased
from tidegate.store.queries import sql
from tidegate.store.records import Json
from tidegate.store.spill import Scrubbed, scrub
from tidegate.telemetry import Log, get_logger

_SCANNED_AT_ONCE = 20_000
_ERASED_AT_ONCE = 500
_TIMEOUT_MS = 30_000
_START = UUID(int=0)


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
