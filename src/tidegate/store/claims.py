"""Claiming jobs: taking them from the queue in fairness, and giving them back.

Invariant: a job has at most one claim that counts, `requests.claim`; giving it up by whatever way
increases that number, so that whoever held it before can write no more. A worker remembers what it
holds, and releases what PostgreSQL thinks it holds and it does not: claims whose reply was lost.
It looks for them before the claim after a doubtful one, and with heartbeats without any doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import Classification, Kind, new_id
from tidegate.errors import ClaimLost, StoreUnavailable
from tidegate.observed import Observers
from tidegate.store import rows
from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.lapses import Lapses
from tidegate.store.liveness import Steadiness, until_quick
from tidegate.store.lookback import AT_ONCE, Lookback
from tidegate.store.observing import of_row
from tidegate.store.queries import sql
from tidegate.store.queues import Queues
from tidegate.store.recorder import audit_unanswered
from tidegate.store.records import ClaimedJob, FailedTry, Failure, Json
from tidegate.store.states import MAX_LAPSES, Status
from tidegate.store.writer import GroupWriter
from tidegate.telemetry import Log, get_logger

_WORKER_DIED = Failure(
    code="worker_died",
    message=f"the workers that ran this died {MAX_LAPSES} times; it will not be tried again",
)
_EXPIRED = Failure(code="deadline_exceeded", message="its deadline came while it was queued")


class Claims:
    """The worker's side of the queue."""

    def __init__(
        self,
        connections: Connections,
        bell: Bell,
        observers: Observers,
        *,
        instance_id: str,
        lease_ms: int,
    ) -> None:
        self._observers = observers
        self._connections = connections
        self._bell = bell
        self._instance_id = instance_id
        self._lease_ms = lease_ms
        self._steadiness = Steadiness(lease_ms)
        self._held: dict[UUID, int] = {}
        self._doubtful = False
        self._queues = Queues(connections, bell, instance_id=instance_id)
        self._lapses = Lapses(lease_ms)
        self._straying = Lookback()
        self._expiring = Lookback()
        self._runs: GroupWriter[Json, None] = GroupWriter(self._begin, lambda _row: 500)

    @property
    def may_judge(self) -> bool:
        """Whether this process may take back what others had."""
        return self._steadiness.may_judge

    @property
    def held(self) -> int:
        return len(self._held)

    def settled(self, job: ClaimedJob) -> None:
        """This process is done with the job's claim."""
        if self._held.get(job.request_id) == job.claim:
            del self._held[job.request_id]

    async def heartbeat(self) -> None:
        sent_at = self._steadiness.clock()

        async def beat(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("beat"), self._instance_id)

        try:
            await self._connections.run(beat, timeout_ms=max(self._lease_ms // 3, 100))
        except StoreUnavailable:
            self._steadiness.missed()
            raise
        self._steadiness.beaten(sent_at)
        if self._doubtful or not self._queues.lock.locked():
            await self._look_for_strays()

    async def leave(self) -> None:
        async def leave(connection: asyncpg.Connection) -> list[str]:
            return [row["pool"] for row in await connection.fetch(sql("leave"), self._instance_id)]

        self._bell.work(await self._connections.run(leave))
        self._steadiness.missed()
        self._held.clear()

    async def claim(self, pool: str, kind: Kind | None, limit: int) -> list[ClaimedJob]:
        if limit <= 0:
            return []
        if not self._steadiness.fresh:
            # Claims of a worker that PostgreSQL has not heard of would count as lapsed.
            await self.heartbeat()
        if self._doubtful:
            await self._release_strays()
        task = asyncio.create_task(self._claim(pool, kind, limit))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._undelivered)
            raise
        except StoreUnavailable:
            self._doubtful = True
            raise

    async def _claim(self, pool: str, kind: Kind | None, limit: int) -> list[ClaimedJob]:
        lane = "unsure" if kind is None else kind.value
        async with self._queues.lock:
            jobs = await self._queues.claim((pool, lane), limit)
            self._held |= {job.request_id: job.claim for job in jobs}
        return jobs

    async def tend(self) -> None:
        """See `Queues.tend`."""
        await self._queues.tend()

    def _undelivered(self, task: asyncio.Task[list[ClaimedJob]]) -> None:
        """The caller was cancelled: nobody will work on these."""
        self._doubtful = True
        if not task.cancelled() and task.exception() is None:
            for job in task.result():
                self.settled(job)

    async def _look_for_strays(self) -> None:
        """With doubt now, without it as often as it is cheap."""
        look = self._straying.begin()
        if self._doubtful or look.is_whole:
            await self._release_strays()
            self._straying.end(look, complete=True)

    async def _release_strays(self) -> None:
        async with self._queues.lock:
            self._doubtful = False
            held = list(self._held)

            async def release(connection: asyncpg.Connection) -> list[str]:
                found = await connection.fetch(sql("release_strays"), self._instance_id, held)
                return [row["pool"] for row in found]

            try:
                self._bell.work(await self._connections.run(release))
            except StoreUnavailable:
                self._doubtful = True
                raise

    async def classified(self, job: ClaimedJob, classification: Classification) -> None:
        async def classify(connection: asyncpg.Connection) -> bool:
            kind, by = classification.kind, classification.by
            reason = rows.clean(classification.reason)
            done = await connection.fetchval(
                sql("set_classified"), job.request_id, job.claim, kind, by, reason
            )
            return done is not None

        if not await self._connections.run(classify):
            self.settled(job)
            raise ClaimLost(f"another worker has {job.request_id} now")
        self._bell.changed([job.request_id])

    async def running(self, row: Json, job: ClaimedJob) -> None:
        """Mark a job as running, before its call. Raises ClaimLost.

        A process that stood still until it read the reply asks again: another worker may have the
        job by then, and its call would be made twice.
        """
        try:
            await until_quick(lambda: self._runs.write(row), self._lease_ms)
        except ClaimLost:
            self.settled(job)
            raise

    async def another(self, row: Json, job: ClaimedJob, failed: FailedTry) -> None:
        """A running job's call has failed, and another one is about to be made. Raises
        ClaimLost."""
        ended = {"outcome": "failed", "finished_at": failed.finished_at}
        ended |= {"upstream_ms": failed.upstream_ms, "failure": rows.failure_row(failed.failure)}

        async def begin(connection: asyncpg.Connection) -> bool:
            found = await connection.fetchrow(
                sql("running_attempt"), job.request_id, job.claim, self._instance_id
            )
            if found is None:
                return False
            if UUID(int=found["attempt_id"].int) == row["attempt_id"]:
                return True  # by a try whose reply was lost
            place = {"id": found["attempt_id"], "created_at": found["attempt_at"]}
            await connection.execute(sql("end_attempts"), rows.dumps([ended | place]))
            await connection.execute(
                sql("begin_another"),
                *(job.request_id, row["attempt_id"], int(failed.is_counted), self._instance_id),
                *(row["model"], row["fence_epoch"], row["fence_sequence"], row["admitted_at"]),
            )
            return True

        if not await self._connections.run(begin):
            self.settled(job)
            raise ClaimLost(f"another worker has {job.request_id} now")

    async def _begin(self, batch: Sequence[Json]) -> list[Exception | None]:
        by_id = {str(row["id"]): row for row in batch}
        ordered = rows.dumps(by_id[key] for key in sorted(by_id))

        async def begin(connection: asyncpg.Connection) -> set[str]:
            begun = await connection.fetch(sql("begin_running"), ordered, self._instance_id)
            return {str(row["id"]) for row in begun}

        begun = await self._connections.run(begin)
        self._bell.changed(UUID(key) for key in begun)
        return [
            None if str(row["id"]) in begun else ClaimLost(f"another worker has {row['id']} now")
            for row in batch
        ]

    async def hand_back(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int],
        failure: Failure | None,
    ) -> None:
        """See `Store.hand_back`."""
        why = rows.failure_row(failure)
        claims = rows.dumps(
            {
                "id": job.request_id,
                "claim": job.claim,
                "wait_ms": waits_ms.get(job.request_id),
                "failure": why,
            }
            for job in jobs
        )

        async def give(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            returned: list[asyncpg.Record] = await connection.fetch(sql("hand_back"), claims)
            await _mark_ambiguous(connection, returned)
            return returned

        returned = await self._connections.run(give)
        for job in jobs:
            self.settled(job)
        self._bell.changed(row["id"] for row in returned if row["old_status"] == Status.RUNNING)
        self._bell.work({row["pool"] for row in returned if row["not_before"] is None})

    async def bring_back(self, claims: Mapping[UUID, int]) -> None:
        """Let jobs that were handed back for a time be claimed now, each unless it has been claimed
        since it had that claim. Raises StoreUnavailable."""
        if not claims:
            return
        put_off = rows.dumps({"id": one, "claim": claim} for one, claim in claims.items())

        async def bring(connection: asyncpg.Connection) -> set[str]:
            return {row["pool"] for row in await connection.fetch(sql("bring_back"), put_off)}

        self._bell.work(await self._connections.run(bring))

    async def retake_lapsed(self) -> list[UUID]:
        """Return dead workers' jobs to the queue, at most 500; returns their ids. Does nothing
        until this process has had its own heartbeats answered for a whole lease."""
        if not self._steadiness.may_judge:
            return []
        failure = asdict(_WORKER_DIED)
        look = self._lapses.begin()

        async def retake(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            locked = await self._lapses.lock(connection, look)
            if not locked:
                return []
            retaken: list[asyncpg.Record] = await connection.fetch(
                sql("retake"), locked, MAX_LAPSES, orjson.dumps(failure).decode()
            )
            await _mark_ambiguous(connection, retaken)
            dead = [row for row in retaken if row["status"] == Status.DEAD]
            await audit_unanswered(connection, dead, failure, self._instance_id)
            return retaken

        retaken = await self._connections.run(retake)
        self._lapses.end(look, len(retaken))
        ids = [UUID(int=row["id"].int) for row in retaken]
        if retaken:
            get_logger().warning(Log.JOBS_RETAKEN, jobs=len(ids))
            for row in retaken:
                if row["status"] == Status.DEAD:
                    self._observers.note(of_row(row, failure))
                    get_logger().error(Log.JOB_DEAD, request_id=str(row["id"]))
            self._bell.changed(ids)
            self._bell.work(row["pool"] for row in retaken)
        return ids

    async def expire_due(self) -> int:
        failure = asdict(_EXPIRED)
        look = self._expiring.begin()

        async def expire(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            due: list[asyncpg.Record] = await connection.fetch(
                sql("expire_due"), orjson.dumps(failure).decode(), look.back_s
            )
            await audit_unanswered(connection, due, failure, self._instance_id)
            return due

        due = await self._connections.run(expire)
        self._expiring.end(look, complete=len(due) < AT_ONCE)
        self._observers.tell([of_row(row, failure) for row in due])
        self._bell.changed(UUID(int=row["id"].int) for row in due)
        return len(due)


async def _mark_ambiguous(connection: asyncpg.Connection, returned: list[asyncpg.Record]) -> None:
    """The attempts of jobs that were running: nobody knows what the provider did."""
    attempts = [
        {"id": row["attempt_id"], "created_at": row["attempt_at"], "outcome": "ambiguous"}
        for row in returned
        if row["old_status"] == Status.RUNNING and row["attempt_id"] is not None
    ]
    if attempts:
        await connection.execute(sql("end_attempts"), rows.dumps(attempts))


def running_row(job: ClaimedJob, model: str, fence: tuple[int, int], queue_ms: float) -> Json:
    """What `Claims.running` takes; the time of admission is set by the caller's clock."""
    return {
        "id": job.request_id,
        "claim": job.claim,
        "attempt_id": new_id(),
        "model": rows.clean(model),
        "fence_epoch": fence[0],
        "fence_sequence": fence[1],
        "queue_ms": queue_ms,
    }
