"""Batches of the providers' own batch APIs on record, and the jobs that are their lines.

    made ──► creating ──► created ──► cancelling ──► done
      ▲         │             │                        ▲
      └─────────┴── refused ──┴── ended at the provider┘

A batch is recorded with its jobs before anything is sent, and as `creating` before the request that
creates it. Its jobs are then running without a claimant, each under the claim that its line names.

Invariants: a batch has at most one valid claim, which fences every write to it; a job is a line of
at most one batch at a time; a line's budget reservation is made with the batch and settled with the
job's end; a batch is done once none of its lines is open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import new_id
from tidegate.errors import ClaimLost
from tidegate.prices.budgets import Binding, Refusal
from tidegate.store import records as rows
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, sql
from tidegate.store.notifications import Notifications
from tidegate.store.provider.settlements import Settlement, settle_holds
from tidegate.store.queue import JobQueue
from tidegate.store.records import ClaimedJob, Json

BatchPhase = Literal["made", "creating", "created", "cancelling", "done"]
_TIMEOUT_MS = 30_000
_MOST_TIMES = 100
_HOLDER = "provider batches"  # holder of lines' reservations, which outlive any process


@dataclass(frozen=True, slots=True)
class UpstreamBatch:
    """A batch at an upstream. endpoint: the native path of its lines, with `{model}`; model: the
    provider's name. lines: how many it began with. problem: why it is held. read_at: by
    PostgreSQL's clock, as all its times."""

    id: UUID
    pool: str
    upstream: str
    dialect: str
    endpoint: str
    model: str
    key_digest: bytes
    lines: int
    size_bytes: int
    state: BatchPhase = "made"
    file_id: str | None = None
    provider_id: str | None = None
    provider_state: str | None = None
    problem: str | None = None
    made_at: datetime | None = None
    creating_at: datetime | None = None
    created_at: datetime | None = None
    read_at: datetime | None = None
    claim: int = 0


@dataclass(frozen=True, slots=True)
class JoiningJob:
    """A job that is to be a line. needs: its reservation in each budget. leave_at: when it must
    move to a faster tier, None for never."""

    job: ClaimedJob
    needs: tuple[tuple[Binding, int], ...] = ()
    leave_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class OpenLine:
    """A line whose job has not ended. is_cancelled: by the job's owner."""

    line: int
    job: ClaimedJob
    hold_id: UUID | None
    leave_at: datetime | None
    is_cancelled: bool
    admitted_at: datetime
    queue_ms: float


@dataclass(frozen=True, slots=True)
class OpenLines:
    """Open lines of one batch: their number, and how many are cancelled; of the others, when the
    first must leave the batch, when the first is due, and the kind of one of them."""

    open: int
    cancelled: int
    leave_at: datetime | None
    due_at: datetime | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class BegunBatch:
    """A batch that was recorded, None without lines; refused: jobs that a budget has no room for.
    Other missing jobs were cancelled or claimed by other workers."""

    batch: UpstreamBatch | None
    refused: Mapping[UUID, Refusal]


class ProviderBatches:
    """Batches at providers on record. Every method raises StoreUnavailable; those with a batch as
    argument raise ClaimLost."""

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        queue: JobQueue,
        budgets: Budgets,
        instance_id: str,
        lease_ms: int,
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._queue = queue
        self._budgets = budgets
        self._instance_id = instance_id
        self._lease_ms = lease_ms

    async def begin(self, batch: UpstreamBatch, joining: Sequence[JoiningJob]) -> BegunBatch:
        """Record a batch, and mark its jobs as running in it, in one transaction with their budget
        reservations. Lines have the indexes of their jobs in `joining`."""
        holds = {one.job.request_id: new_id() for one in joining if one.needs}

        async def begin(connection: asyncpg.Connection) -> tuple[asyncpg.Record | None, set[UUID]]:
            before = await connection.fetchrow(sql("get_provider_batch"), batch.id)
            if before is not None:  # by an attempt whose reply was lost
                of_it = await connection.fetch(sql("lines_of_provider_batch"), batch.id)
                return before, {rows.uuid_of(row["request_id"]) for row in of_it}
            refused.clear()
            refused.update(await self._reserve(connection, joining, holds))
            left = [one for one in joining if one.job.request_id not in refused]
            begun = await self._run(connection, batch, left)
            lost = [
                Settlement(holds[one.job.request_id], None, 0, 0, False)
                for one in left
                if one.needs and one.job.request_id not in begun
            ]
            await settle_holds(connection, lost)
            if not begun:
                return None, begun
            return await self._insert(connection, batch, joining, holds, begun), begun

        refused: dict[UUID, Refusal] = {}
        row, begun = await self._connections.run(begin, timeout_ms=_TIMEOUT_MS)
        for one in joining:
            if one.job.request_id in begun:
                self._queue.settled(one.job)
        self._notifications.changed(begun)
        return BegunBatch(None if row is None else _batch(row), refused)

    async def _reserve(
        self,
        connection: asyncpg.Connection,
        joining: Sequence[JoiningJob],
        holds: Mapping[UUID, UUID],
    ) -> dict[UUID, Refusal]:
        """Reserve the lines' greatest costs, independently of a process; return the refused
        ones."""
        asking = [one for one in joining if one.needs]
        if not asking:
            return {}
        places: dict[tuple[str, str], int] = {}
        bindings: list[Binding] = []
        calls: list[Json] = []
        for one in asking:
            binds = []
            for binding, need in one.needs:
                book = (binding.budget.name, binding.scope)
                if book not in places:
                    places[book] = len(bindings)
                    bindings.append(binding)
                binds.append([places[book], need])
            of_it = {"id": str(holds[one.job.request_id]), "request": str(one.job.request_id)}
            calls.append(of_it | {"binds": binds})
        payload = orjson.dumps({"books": list(places), "calls": calls}).decode()
        found = await connection.fetch(sql("reserve_budgets"), payload, _HOLDER)
        refused = {}
        for row in found:
            details = (row["why"], row["amount"], row["spent"], row["held"], row["reset_at"])
            refusal = Refusal(bindings[row["book"]], *details, 0.0)
            refused[asking[row["call"]].job.request_id] = refusal
        return refused

    async def _run(
        self, connection: asyncpg.Connection, batch: UpstreamBatch, left: Sequence[JoiningJob]
    ) -> set[UUID]:
        now = datetime.now(UTC)
        marks = [
            {
                "id": one.job.request_id,
                "claim": one.job.claim,
                "created_at": one.job.created_at,
                "attempt_id": new_id(),
                "model": rows.clean(batch.model),
                "upstream": batch.upstream,
                "fence_epoch": 0,
                "fence_sequence": 0,
                "queue_ms": max(0.0, (now - one.job.created_at).total_seconds() * 1000),
                "admitted_at": now,
            }
            for one in sorted(left, key=lambda one: one.job.request_id)
        ]
        args = (rows.dumps(marks), self._instance_id, rows.attempts_since(marks))
        found = await connection.fetch(sql("begin_running"), *args)
        begun = {rows.uuid_of(row["id"]) for row in found}
        claims = [{"id": one["id"], "claim": one["claim"]} for one in marks if one["id"] in begun]
        await connection.execute(sql("hand_to_batch"), rows.dumps(claims))
        return begun

    async def _insert(
        self,
        connection: asyncpg.Connection,
        batch: UpstreamBatch,
        joining: Sequence[JoiningJob],
        holds: Mapping[UUID, UUID],
        begun: Collection[UUID],
    ) -> asyncpg.Record:
        lines = [
            {
                "line": line,
                "request_id": one.job.request_id,
                "claim": one.job.claim,
                "hold_id": holds.get(one.job.request_id),
                "leave_at": one.leave_at,
            }
            for line, one in enumerate(joining)
            if one.job.request_id in begun
        ]
        row = await connection.fetchrow(
            sql("add_provider_batch"),
            batch.id,
            batch.pool,
            batch.upstream,
            batch.dialect,
            batch.endpoint,
            batch.model,
            batch.key_digest,
            len(lines),
            batch.size_bytes,
            self._instance_id,
        )
        await connection.execute(sql("add_provider_batch_lines"), batch.id, rows.dumps(lines))
        assert row is not None
        return row

    async def take(self, in_hand: Iterable[UUID], crowded: Iterable[str]) -> UpstreamBatch | None:
        """Claim a due batch, except those `in_hand` in this process, at an upstream that is not
        `crowded`; also one of a dead worker."""
        row = await self._connections.row(
            "take_provider_batch",
            self._instance_id,
            list(in_hand),
            self._queue.may_judge,
            self._lease_ms,
            list(crowded),
        )
        return None if row is None else _batch(row)

    async def save(self, batch: UpstreamBatch, wait_ms: float | None = None) -> UpstreamBatch:
        """Write the state of a batch; return it as recorded. wait_ms: release its claim, and make
        it due after this time; without it this process keeps the claim."""
        row = await self._connections.row(
            "set_provider_batch",
            batch.id,
            batch.claim,
            batch.state,
            batch.file_id,
            batch.provider_id,
            batch.provider_state,
            None if batch.problem is None else rows.clean(batch.problem),
            wait_ms or 0.0,
            wait_ms is not None,
            batch.lines,
        )
        if row is None:
            raise ClaimLost(f"another worker has the batch {batch.id} now")
        return _batch(row)

    async def put_off(self, batch: UpstreamBatch, wait_ms: float) -> None:
        """Release a batch in its recorded state, to be due again after `wait_ms`."""
        await self._connections.execute("put_off_provider_batch", batch.id, batch.claim, wait_ms)

    async def end(self, batch: UpstreamBatch) -> None:
        """End a batch. Reservations that its lines still have, since their jobs were deleted, are
        charged as an estimate."""
        await self._budgets.flush()
        await self.save(replace(batch, state="done"), 0.0)

        async def settle(connection: asyncpg.Connection) -> None:
            found = await connection.fetch(sql("unsettled_provider_holds"), batch.id)
            left = [Settlement(rows.uuid_of(row["id"]), None, None, 0, True) for row in found]
            await settle_holds(connection, left)

        await self._connections.run(settle)

    async def turn_away(self, jobs: Sequence[ClaimedJob]) -> None:
        """Release jobs that no batch takes: they are ready in the live tier."""
        claims = rows.dumps({"id": job.request_id, "claim": job.claim} for job in jobs)
        found = await self._connections.rows("turn_away", claims)
        for job in jobs:
            self._queue.settled(job)
        self._notifications.work({row["pool"] for row in found})

    async def leave(self) -> None:
        """Release this process's batches when it stops."""
        await self._connections.execute("free_provider_batches", self._instance_id)

    async def lines(
        self,
        batch: UpstreamBatch,
        *,
        after: int = -1,
        among: Iterable[int] | None = None,
        limit: int = 1_000,
    ) -> list[OpenLine]:
        """Return open lines in order: those after a number, or those among some."""

        async def read(connection: asyncpg.Connection) -> list[OpenLine]:
            chosen = None if among is None else list(among)
            found = await connection.fetch(
                sql("open_provider_lines"), batch.id, after, chosen, limit
            )
            jobs = await rows.with_files(connection, found)
            return [_line(row, job) for row, job in zip(found, jobs, strict=True)]

        return await self._connections.run(read)

    async def open_lines(self, batch: UpstreamBatch) -> OpenLines:
        row = await self._connections.row("sum_provider_lines", batch.id)
        assert row is not None
        return rows.record_of(OpenLines, row)

    async def known_ids(self, upstream: str) -> set[str]:
        """Return the provider's ids of the batches that this gateway has created."""
        found = await self._connections.rows("known_provider_ids", upstream)
        return {row["provider_id"] for row in found}

    async def under_way(self) -> dict[str, int]:
        """Return the number of batches at each upstream."""
        found = await self._connections.rows("count_provider_batches")
        return {row["upstream"]: row["batches"] for row in found}

    async def usual_ms(self, upstream: str, model: str) -> tuple[float, int] | None:
        """Return the time within which 95 % of the last successful batches ended, and their number;
        None without any."""
        row = await self._connections.row("provider_batch_times", upstream, model, _MOST_TIMES)
        assert row is not None
        return None if not row["batches"] else (row["usual_ms"], row["batches"])

    async def prune(self) -> None:
        """Delete batches that were done long ago."""
        await self._connections.execute("prune_provider_batches")


def _batch(row: Mapping[str, Any]) -> UpstreamBatch:
    return rows.record_of(UpstreamBatch, row)


def _line(row: Mapping[str, Any], job: ClaimedJob) -> OpenLine:
    return OpenLine(
        line=row["line"],
        job=job,
        hold_id=None if row["hold_id"] is None else rows.uuid_of(row["hold_id"]),
        leave_at=row["leave_at"],
        is_cancelled=row["cancel_asked_at"] is not None,
        admitted_at=row["admitted_at"],
        queue_ms=row["queue_ms"],
    )
