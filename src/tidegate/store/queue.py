"""Queue of ready jobs: claims in fair order, their release, and the ends of claimed jobs.

PostgreSQL keeps index entries of jobs that have left the queue until no transaction can see them,
so a claim never searches from the start: it reads which jobs became ready since the last reading,
and starts in each queue (tenant and priority) at the first ready job. Jobs whose deadlines are
before those of older jobs are claimed by id, the earliest deadline first. Sweeps from the start
take at most a fiftieth of the time.

Invariants: a job has at most one valid claim, `requests.claim`; every release increments that
number; no ready job stays unseen; a claim whose reply was lost is found by its claimant.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right, insort
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NoReturn
from uuid import UUID

import asyncpg

from tidegate.call import Classification, Kind, Status, Tier, new_id
from tidegate.errors import ClaimLost, StoreUnavailable
from tidegate.record import CallListeners, CallRecord, Failure
from tidegate.store import records as rows
from tidegate.store.audit import AuditLog
from tidegate.store.database import Connections, GroupWriter, count_in, sql
from tidegate.store.jobs import UnattendedJobs
from tidegate.store.notifications import (
    AT_ONCE,
    UNSURE,
    Lookback,
    Notifications,
    Scan,
    Steadiness,
    until_quick,
)
from tidegate.store.records import ClaimedJob, FailedTry, Json

_ALL = 2**62  # after every transaction
_LEAST_EARLY, _MOST_EARLY = 32, 256
_QUICK_S = 0.05
_USUAL = timedelta(minutes=10)  # a job without a deadline is due so long after it was made
_CLOSE = timedelta(milliseconds=250)  # deadlines that differ by less are alike

_FIRST = UUID(int=0)
_SEARCHED = 5_000  # jobs of skipped callers, in one search

Key = tuple[str, int]  # tenant and priority
# API keys, users and conversations of one tenant, as `("key", PREFIX)`.
Callers = frozenset[tuple[str, str]]
Row = Mapping[str, Any]
Times = tuple[datetime, datetime]  # when a job is due, and when it was made


@dataclass(frozen=True, slots=True)
class QueueTurn:
    """A queue that a claim reads: `n` is the tenant's turn."""

    n: int
    key: Key
    since: datetime | None
    early: tuple[UUID, ...]
    is_part: bool = False  # jobs of some callers are skipped

    def row(self) -> Json:
        tenant_id, priority = self.key
        row = {"n": self.n, "tenant_id": tenant_id, "priority": priority, "since": self.since}
        return row | {"early": list(self.early)}


def _overtakes(due_at: datetime, made_at: datetime, longest: timedelta) -> bool:
    """Whether a job may be due before older jobs, one of which is given the time `longest`."""
    given = due_at - made_at
    return given != _USUAL and given < longest - _CLOSE


@dataclass(slots=True)
class _Queue:
    """The start of a queue. `since`: when its first job that is not early was made, if any.

    Early jobs are claimed by id: those that return after a long time, so that the search does not
    begin among all jobs that have left since, and those that are due before older ones. Of the
    latter some may be unnamed, due at `hidden_at` or later. `longest`: the longest time from
    creation to deadline; `swept_longest`: of the jobs since the last sweep began. `past`: where a
    search begins that skips the jobs of the callers `past_of`.
    """

    since: datetime | None = None
    early: dict[UUID, Times] = field(default_factory=dict)
    hidden_at: datetime | None = None
    longest: timedelta = timedelta()
    swept_longest: timedelta = timedelta()
    past: tuple[datetime, UUID] | None = None
    past_of: Callers = frozenset()

    def add(self, row: Row, *, is_sweep: bool = False) -> None:
        """Note that `jobs` of a row became ready. It names the oldest, in order, and then those
        that are `overtaking` others of the row; `hidden_at` is the deadline of further ones."""
        named = list(zip(row["made_at"], row["ids"], row["due_at"], strict=True))
        oldest = len(named) - row["overtaking"]
        if self.past is not None:
            self.past = min(self.past, named[0][:2])
        if row["jobs"] > oldest:
            last_made_at, _, last_due_at = named[oldest - 1]
            self._begin(last_made_at)
            longest = self.swept_longest if is_sweep else self.longest
            if _overtakes(last_due_at, last_made_at, longest):
                self._hide(last_due_at)  # so may those between it and the overtaking ones
        if row["hidden_at"] is not None:
            self._hide(row["hidden_at"])
        for place, (made_at, request_id, due_at) in enumerate(named):
            is_old = self.since is None or made_at < self.since
            if is_old or place >= oldest or _overtakes(due_at, made_at, self.longest):
                self.early[request_id] = due_at, made_at
            self.longest = max(self.longest, due_at - made_at)
        self.longest = max(self.longest, row["longest"])
        self.swept_longest = max(self.swept_longest, row["longest"])
        if len(self.early) > _MOST_EARLY:
            self._shorten()

    def _hide(self, due_at: datetime) -> None:
        self.hidden_at = due_at if self.hidden_at is None else min(self.hidden_at, due_at)

    def _shorten(self) -> None:
        """Keep half of the early jobs: the oldest of those before `since`, and of those after it
        the ones that are due first."""
        most = _MOST_EARLY // 2
        by_age = sorted(self.early.items(), key=lambda one: (one[1][1], one[0]))
        old = [one for one in by_age if self.since is None or one[1][1] < self.since]
        if len(old) > most:
            self._begin(old[most][1][1])
        after = [one for one in by_age[min(len(old), most) :] if _overtakes(*one[1], self.longest)]
        after.sort(key=lambda one: (one[1], one[0]))
        if len(after) > most:
            self._hide(after[most][1][0])
        self.early = dict(old[:most] + after[:most])

    @property
    def is_hungry(self) -> bool:
        """Whether few of the jobs that are due first are named, while others may be hidden."""
        hidden_at = self.hidden_at
        if hidden_at is None:
            return False
        return sum(due_at <= hidden_at for due_at, _ in self.early.values()) < _LEAST_EARLY

    def _begin(self, made_at: datetime) -> None:
        self.since = made_at if self.since is None else min(self.since, made_at)
        if self.past is not None:
            self.past = min(self.past, (made_at, _FIRST))

    def search_past(self, callers: Callers) -> tuple[datetime | None, UUID]:
        """Return where a search begins for jobs of callers other than `callers`."""
        begin = None if self.since is None else (self.since, _FIRST)
        known = self.past if self.past_of <= callers else None
        self.past, self.past_of = begin and max(begin, known or begin), callers
        return self.past or (None, _FIRST)

    def turn(self, n: int, key: Key, limit: int) -> QueueTurn:
        """Return the turn, earliest deadline first. With many early jobs that are due before the
        others were made, only these are claimed."""
        soonest = sorted(self.early, key=lambda one: (self.early[one], one))
        many = soonest[2 * limit : 2 * limit + 1]
        only = self.since is not None and any(self.early[one][0] < self.since for one in many)
        return QueueTurn(n, key, None if only else self.since, tuple(soonest[: 2 * limit]))


class Ready:
    """The ready jobs of one pool and lane."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[int, _Queue]] = {}
        self._tenants: list[str] = []
        self._xmax: int | None = None
        self._under_way: list[int] = []
        self._swept_to = 0
        self._sweep_end = 0
        self._step = _ALL

    def __repr__(self) -> str:
        queues = sum(len(queues) for queues in self._queues.values())
        return f"<Ready queues={queues} swept={self.is_swept}>"

    # Reading new jobs

    @property
    def is_unread(self) -> bool:
        return self._xmax is None

    @property
    def unread(self) -> tuple[int, int, list[int]]:
        """The transactions to read: from, before, and those in progress at the last reading."""
        return (_ALL if self._xmax is None else self._xmax), _ALL, self._under_way

    def read(self, rows: Sequence[Row]) -> None:
        """Add new jobs; the next reading begins at the snapshot of this one."""
        xmax = rows[0]["xmax"]
        if self._xmax is None or xmax < self._xmax:
            # The first reading, or a different server that is behind the previous one.
            self._xmax = xmax
            self.begin_sweep()
        self._xmax, self._under_way = xmax, rows[0]["under_way"]
        self._add(rows)

    @property
    def is_hungry(self) -> bool:
        """Whether in a queue jobs that are due before the known ones may be unnamed soon."""
        return any(queue.is_hungry for queue in self._all())

    # Sweeping all earlier jobs

    @property
    def is_swept(self) -> bool:
        return not self.is_unread and self._swept_to >= self._sweep_end

    def begin_sweep(self) -> None:
        """Sweep everything up to the last reading again."""
        assert self._xmax is not None
        self._swept_to, self._sweep_end = 0, self._xmax
        for queue in self._all():
            queue.hidden_at, queue.swept_longest = None, timedelta()

    @property
    def unswept(self) -> tuple[int, int, list[int]]:
        """The next step of the sweep, in the form of `unread`."""
        return self._swept_to, min(self._swept_to + self._step, self._sweep_end), []

    @property
    def is_shortest_step(self) -> bool:
        return self._step == 1

    def swept(self, before: int, rows: Sequence[Row], took_s: float) -> None:
        """Complete a step; a slow step is followed by a shorter one."""
        self._add(rows, is_sweep=True)
        self._swept_to = before
        if self.is_swept:
            for queue in self._all():
                queue.longest = queue.swept_longest
        self._step = min(2 * self._step, _ALL) if took_s < _QUICK_S else max(1, self._step // 2)

    def not_swept(self) -> None:
        """Shorten a step that took too long."""
        self._step = max(1, min(self._step, self._sweep_end - self._swept_to) // 8)

    def _all(self) -> Iterator[_Queue]:
        for queues in self._queues.values():
            yield from queues.values()

    def _add(self, rows: Sequence[Row], *, is_sweep: bool = False) -> None:
        for row in rows:
            if row["tenant_id"] is None:
                continue
            tenant = row["tenant_id"]
            if tenant not in self._queues:
                self._queues[tenant] = {}
                insort(self._tenants, tenant)
            queue = self._queues[tenant].setdefault(row["priority"], _Queue())
            queue.add(row, is_sweep=is_sweep)

    # Claiming

    def tenants_after(self, last: str) -> list[str]:
        """Return all tenants that may have ready jobs, in turn after `last`."""
        place = bisect_right(self._tenants, last)
        return self._tenants[place:] + self._tenants[:place]

    def turns(self, tenants: Iterable[str], limit: int) -> list[QueueTurn]:
        """Return the queues that a claim of at most `limit` jobs reads."""
        return [
            queue.turn(n, (tenant, priority), limit)
            for n, tenant in enumerate(tenants)
            for priority, queue in self._queues.get(tenant, {}).items()
        ]

    def queue(self, key: Key) -> _Queue:
        """Return one of the queues that `turns` has named."""
        return self._queues[key[0]][key[1]]

    def settle(
        self,
        turn: QueueTurn,
        since: datetime | None,
        early: Iterable[UUID],
        others: Mapping[UUID, Times] | None = None,
    ) -> None:
        """Update a queue after a claim's commit: its start, the remaining early jobs, and the
        `others` of a short queue, which become early ones.

        What a concurrent sweep has found is kept.
        """
        tenant, priority = turn.key
        queues = self._queues.get(tenant, {})
        queue = queues.get(priority)
        if queue is None:
            return
        if queue.since == turn.since and not turn.is_part:
            queue.since = since
        left = set(early)
        for request_id in turn.early:
            if request_id not in left:
                queue.early.pop(request_id, None)
        queue.early |= others or {}
        if queue.since is None and not queue.early:
            del queues[priority]
            if not queues:
                del self._queues[tenant]
                self._tenants.pop(bisect_right(self._tenants, tenant) - 1)


_TENANTS_AT_ONCE = 32
_ROUNDS = 4
_READ_EVERY_S = 2.0
_SWEEP_EVERY_S = 30.0
_HURRIED_SWEEP_S = 1.0
_SWEEP_SHARE = 50
_MOST_SWEEP_S = 4.0
_STEP_MS = 500
_LAST_STEP_MS = 4_500

Lane = tuple[str, str]  # pool and lane


@dataclass(slots=True)
class _Known:
    """State of a lane, and when it was last read and swept."""

    ready: Ready
    last_tenant: str = ""
    passes_over: Mapping[str, Callers] = field(default_factory=dict)
    is_first: bool = True
    mark: int | None = None  # of notifications at the last claim, if no job was left
    read_at: float = 0.0
    swept_at: float = 0.0
    sweep_s: float = 0.0


class ReadyQueues:
    """Ready jobs of all lanes; `lock` is held during a claim."""

    def __init__(
        self, connections: Connections, notifications: Notifications, *, instance_id: str
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._instance_id = instance_id
        self.lock = asyncio.Lock()
        self._sweeping = asyncio.Lock()
        self.lanes: dict[Lane, _Known] = {}
        self._ripening = Lookback()
        # It may be a different server, which may have lost what the old one had.
        connections.on_back.append(self.lanes.clear)

    async def claim(
        self, lane: Lane, limit: int, without: Mapping[str, Callers]
    ) -> list[ClaimedJob]:
        """Claim up to `limit` jobs while the caller holds `lock`; none of the callers in `without`,
        by tenant. Raises StoreUnavailable, after which some may be claimed."""
        known = self.lanes.setdefault(lane, _Known(Ready()))
        known.passes_over = without
        if known.is_first:
            await self._sweep(lane, known, _MOST_SWEEP_S)
            known.is_first = False
        mark, scan = self._notifications.work_mark(lane[1]), self._ripening.begin(hurried=True)
        if known.mark == mark:  # one round trip instead of a claim's three
            is_ripening = await self._read(lane, known, scan.back_s)
            if not is_ripening and not known.ready.tenants_after(""):
                self._ripening.end(scan, complete=True)
                return []
        tenants, jobs = await self._read_and_take(lane, known, limit, scan)
        at_once = _TENANTS_AT_ONCE
        for _ in range(_ROUNDS):
            while tenants and len(jobs) < limit:
                # Other workers were faster: search more tenants in the next step.
                at_once *= 2
                some, tenants = tenants[:at_once], tenants[at_once:]
                jobs += await self._take(lane, known, some, limit - len(jobs))
            if len(jobs) >= limit:
                break
            # Others may have locked these candidates while more jobs wait behind them.
            again = known.ready.tenants_after(known.last_tenant)
            tenants = [one for one in again if one not in without]
        known.mark = None if known.ready.tenants_after("") else mark
        return jobs

    async def maintain(self) -> bool:
        """Read lanes without claims, and sweep; return whether there is more to sweep. Raises
        StoreUnavailable."""
        scan = self._ripening.begin()
        ripe = await self._connections.execute("ripen", scan.back_s)
        self._ripening.end(scan, complete=ripe < AT_ONCE)
        for lane, known in list(self.lanes.items()):
            if time.monotonic() - known.read_at > _READ_EVERY_S:
                async with self.lock:
                    await self._read(lane, known)
            every_s = _HURRIED_SWEEP_S if known.ready.is_hungry else _SWEEP_EVERY_S
            pause_s = max(every_s, _SWEEP_SHARE * known.sweep_s)
            if known.ready.is_swept and time.monotonic() - known.swept_at > pause_s:
                known.ready.begin_sweep()
                known.sweep_s = 0.0
            if not known.ready.is_swept:
                await self._sweep(lane, known, _MOST_SWEEP_S)
            if known.mark is not None and known.ready.tenants_after(""):
                known.mark = None  # the last claim has left none that it knew of, and may wait
                self._notifications.found(lane[1])
        readies = [known.ready for known in self.lanes.values()]
        return any(ready.is_hungry or not ready.is_swept for ready in readies)

    async def _read_and_take(
        self, lane: Lane, known: _Known, limit: int, scan: Scan
    ) -> tuple[list[str], list[ClaimedJob]]:
        """Read and claim in one transaction; return also the tenants that were not searched."""

        async def work(
            connection: asyncpg.Connection,
        ) -> tuple[int, list[str], list[QueueTurn], list[asyncpg.Record], list[ClaimedJob]]:
            ripe = 0
            arrived = await _arrived(connection, lane, known.ready.unread, scan.back_s)
            known.ready.read(arrived)
            if arrived[0]["is_ripening"]:
                ripe = count_in(await connection.execute(sql("ripen"), scan.back_s))
                known.ready.read(await _arrived(connection, lane, known.ready.unread))
            tenants = known.ready.tenants_after(known.last_tenant)
            some, left = tenants[:_TENANTS_AT_ONCE], tenants[_TENANTS_AT_ONCE:]
            return ripe, left, *await self._claim(connection, lane, known, some, limit)

        ripe, tenants, turns, found, jobs = await self._connections.run(work, repeatable=False)
        self._ripening.end(scan, complete=ripe < AT_ONCE)
        known.read_at = time.monotonic()
        self._settle(known, turns, found, jobs)
        if ripe:
            self._notifications.work([lane[0]])
        return tenants, jobs

    async def _take(
        self, lane: Lane, known: _Known, tenants: list[str], limit: int
    ) -> list[ClaimedJob]:
        turns, found, jobs = await self._connections.run(
            lambda one: self._claim(one, lane, known, tenants, limit), repeatable=False
        )
        self._settle(known, turns, found, jobs)
        return jobs

    async def _claim(
        self,
        connection: asyncpg.Connection,
        lane: Lane,
        known: _Known,
        tenants: list[str],
        limit: int,
    ) -> tuple[list[QueueTurn], list[asyncpg.Record], list[ClaimedJob]]:
        turns = known.ready.turns(tenants, limit)
        if not turns:
            return [], [], []
        for place, turn in enumerate(turns):
            if callers := known.passes_over.get(turn.key[0]):
                queue = known.ready.queue(turn.key)
                turns[place] = await _of_others(connection, lane, queue, turn, callers, limit)
        queues = rows.dumps([turn.row() for turn in turns])
        found = await connection.fetch(sql("claim"), *lane, limit, self._instance_id, queues)
        taken = [row for row in found if row["id"] is not None]
        return turns, found, await rows.with_files(connection, taken)

    def _settle(
        self,
        known: _Known,
        turns: list[QueueTurn],
        found: list[asyncpg.Record],
        jobs: list[ClaimedJob],
    ) -> None:
        """Apply a claim after its commit: before that, others may get its jobs."""
        after = {(row["of_n"], row["of_priority"]): row for row in found}
        for turn in turns:
            row = after[turn.n, turn.key[1]]
            made = zip(row["due_at"] or (), row["made_at"] or (), strict=True)
            others = dict(zip(row["others_left"] or (), made, strict=True))
            known.ready.settle(turn, row["since_now"], row["early_left"] or (), others)
        if jobs:
            known.last_tenant = jobs[-1].tenant_id
        if known.ready.is_hungry:
            self._notifications.wake("ripe")

    async def _read(self, lane: Lane, known: _Known, ripe_since_s: float = 0.0) -> bool:
        """Read new jobs; return whether some may be due for their next attempt."""
        arrived = await self._connections.rows("came", *lane, *known.ready.unread, ripe_since_s)
        known.ready.read(arrived)
        known.read_at = time.monotonic()
        return bool(arrived[0]["is_ripening"])

    async def _sweep(self, lane: Lane, known: _Known, most_s: float) -> None:
        """Sweep jobs from before the last reading, for at most `most_s`."""
        until = time.monotonic() + most_s
        async with self._sweeping:
            if known.ready.is_unread:
                await self._read(lane, known)
            while not known.ready.is_swept and time.monotonic() < until:
                began = time.monotonic()
                await self._sweep_step(lane, known.ready)
                known.sweep_s += time.monotonic() - began
            known.swept_at = time.monotonic()

    async def _sweep_step(self, lane: Lane, ready: Ready) -> None:
        step = ready.unswept
        step_ms = _LAST_STEP_MS if ready.is_shortest_step else _STEP_MS

        async def work(connection: asyncpg.Connection) -> list[asyncpg.Record] | None:
            await connection.execute(f"SET LOCAL statement_timeout = {step_ms}")
            try:
                return await _arrived(connection, lane, step)
            except asyncpg.QueryCanceledError:
                return None

        began = time.monotonic()
        found = await self._connections.run(work)
        if found is None:
            ready.not_swept()
        else:
            ready.swept(step[1], found, time.monotonic() - began)


async def _arrived(
    connection: asyncpg.Connection, lane: Lane, since: tuple[int, int, list[int]], ripe_s: float = 0
) -> list[asyncpg.Record]:
    """Return the jobs that became ready in the transactions `since`."""
    return list(await connection.fetch(sql("came"), *lane, *since, ripe_s))


async def _of_others(
    connection: asyncpg.Connection,
    lane: Lane,
    queue: _Queue,
    turn: QueueTurn,
    callers: Callers,
    limit: int,
) -> QueueTurn:
    """Return the turn without the jobs of `callers`, as far as one search finds others."""
    names = [
        [name for kind, name in callers if kind == each] for each in ("key", "user", "conversation")
    ]
    bounds = *queue.search_past(callers), list(queue.early), *names, limit, _SEARCHED
    found = await connection.fetchrow(sql("find_others"), *lane, *turn.key, *bounds)
    if found["next_at"] is not None:
        queue.past = found["next_at"], rows.uuid_of(found["next_id"])
    ids = tuple(map(rows.uuid_of, found["ids"]))
    return replace(turn, since=None, early=ids, is_part=True)


_OF_ATTEMPT = ("model", "fence_epoch", "fence_sequence", "admitted_at", "upstream")
MAX_LAPSES = 3  # workers that die while they call a job before the job counts as the cause


class JobQueue:
    """Claims of jobs and their results, for workers. Methods that query PostgreSQL raise
    StoreUnavailable."""

    def __init__(
        self,
        connections: Connections,
        notifications: Notifications,
        listeners: CallListeners,
        audit: AuditLog,
        *,
        instance_id: str,
        lease_ms: int,
    ) -> None:
        self._connections = connections
        self._notifications = notifications
        self._audit = audit
        self._instance_id = instance_id
        self._lease_ms = lease_ms
        self._steadiness = Steadiness(lease_ms)
        self._held: dict[UUID, int] = {}
        self._doubtful = False
        self._queues = ReadyQueues(connections, notifications, instance_id=instance_id)
        self._unattended = UnattendedJobs(
            connections, notifications, listeners, audit, self._steadiness, instance_id, MAX_LAPSES
        )
        self._straying = Lookback()
        self._runs: GroupWriter[Json, None] = GroupWriter(self._begin)

    @property
    def may_judge(self) -> bool:
        """Whether this process may return claims of others."""
        return self._steadiness.may_judge

    def settled(self, job: ClaimedJob) -> None:
        """Forget the job's claim in this process."""
        if self._held.get(job.request_id) == job.claim:
            del self._held[job.request_id]

    async def heartbeat(self) -> None:
        """Send this worker's heartbeat, every third of the claim lease."""
        sent_at, clock = self._steadiness.clock(), self._notifications.clock
        begun, most_ms = clock.begin(), max(self._lease_ms // 3, 100)
        try:
            (row,) = await self._connections.rows("beat", self._instance_id, timeout_ms=most_ms)
            clock.read(begun, row["server_time"])
        except StoreUnavailable:
            self._steadiness.missed()
            raise
        self._steadiness.beaten(sent_at)
        if self._doubtful or not self._queues.lock.locked():
            await self._check_strays()

    async def leave(self) -> None:
        """Report that this worker stops; its queued claims are free immediately."""
        freed = await self._connections.rows("leave", self._instance_id)
        self._notifications.work(row["pool"] for row in freed)
        self._steadiness.missed()
        self._held.clear()

    async def claim(
        self,
        pool: str,
        kind: Kind | None,
        limit: int,
        without: Mapping[str, Callers] | None = None,
    ) -> list[ClaimedJob]:
        """Return up to `limit` queued jobs of the kind, None for unclassified ones; tenants in
        turn, and no jobs of the callers in `without`. The next heartbeat releases a cancelled
        caller's claims."""
        if limit <= 0:
            return []
        await self._ready_to_claim()
        return await self._delivered(self._claim((pool, kind or UNSURE), limit, without or {}))

    def has_others(self, pool: str, kind: Kind, present: Collection[str]) -> bool:
        """Whether other tenants may have ready jobs of the kind."""
        known = self._queues.lanes.get((pool, kind), _Known(Ready()))
        return any(one not in present for one in known.ready.tenants_after(""))

    async def claim_batched(self, pool: str, *bounds: float) -> list[ClaimedJob]:
        """Claim jobs for one batch of a provider. bounds: jobs, bytes, ms to gather them."""
        await self._ready_to_claim()

        async def claim(connection: asyncpg.Connection) -> list[ClaimedJob]:
            found = await connection.fetch(sql("claim_batched"), pool, self._instance_id, *bounds)
            return await rows.with_files(connection, found)

        async def claimed() -> list[ClaimedJob]:
            async with self._queues.lock:
                jobs = await self._connections.run(claim, repeatable=False)
                self._held |= {job.request_id: job.claim for job in jobs}
            return jobs

        return await self._delivered(claimed())

    async def _ready_to_claim(self) -> None:
        if not self._steadiness.fresh:
            # Claims of a worker without a recorded heartbeat would count as expired.
            await self.heartbeat()
        if self._doubtful:
            await self._release_strays()

    async def _delivered(self, claiming: Coroutine[Any, Any, list[ClaimedJob]]) -> list[ClaimedJob]:
        task = asyncio.create_task(claiming)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._undelivered)
            raise
        except StoreUnavailable:
            self._doubtful = True
            raise

    async def maintain(self) -> bool:
        """Read and sweep ready jobs; return whether to continue within about a second."""
        return await self._queues.maintain()

    async def classified(self, job: ClaimedJob, classification: Classification) -> None:
        """Record a job's kind. Raises ClaimLost."""
        done = await self._connections.row(
            "set_classified",
            job.request_id,
            job.claim,
            classification.kind,
            classification.by,
            rows.clean(classification.reason),
        )
        if done is None:
            self._lost(job)
        self._notifications.changed([job.request_id])

    async def running(
        self,
        job: ClaimedJob,
        *,
        model: str,
        upstream: str | None = None,
        fence: tuple[int, int],
        queue_ms: float,
        failed: FailedTry | None = None,
    ) -> None:
        """Record that the job is admitted, before its call; `failed`: an earlier attempt under the
        same claim. Raises ClaimLost, or StoreUnavailable, after which it may be recorded.

        A process that stalled before it read the reply repeats the request: another worker may have
        the job by then, and the call would be made twice.
        """
        row = {
            "id": job.request_id,
            "claim": job.claim,
            "created_at": job.created_at,
            "attempt_id": new_id() if failed is None else failed.next_id,
            "model": rows.clean(model),
            "upstream": upstream,
            "fence_epoch": fence[0],
            "fence_sequence": fence[1],
            "queue_ms": queue_ms,
            "admitted_at": datetime.now(UTC),
            "tier": job.tier,
            "tier_why": job.tier_why,
        }
        if failed is not None and await self._begin_another(row, job, failed):
            return
        try:
            await until_quick(partial(self._runs.write, row), self._lease_ms)
        except ClaimLost:
            self.settled(job)
            raise

    async def finish(self, job: ClaimedJob, record: CallRecord) -> None:
        """Record a job's end, on disk while PostgreSQL is unavailable. Raises ClaimLost, and
        StoreUnavailable when the spill is full. A cancelled caller's end is recorded too."""
        if await self._audit.end_job(job, record):
            self.settled(job)

    async def retry(
        self, job: ClaimedJob, record: CallRecord, at: datetime | None, is_counted: bool = True
    ) -> None:
        """Record a failed attempt and queue the job again, not before `at`; otherwise as
        `finish`."""
        if await self._audit.retry_job(job, record, at, is_counted=is_counted):
            self.settled(job)

    async def fail_unadmitted(self, job: ClaimedJob, record: CallRecord) -> None:
        """End a job that was never sent upstream; otherwise as `finish`."""
        if await self._audit.end_job(job, record, called=False):
            self.settled(job)

    async def release(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """Release claims; jobs in `waits_ms` wait for so long, because of `failure`. A fetch that
        failed uses up an attempt."""
        if not jobs:
            return
        why: Json = {"failure": rows.failure_row(failure), "unmade": rows.unmade(failure)}
        waits_ms = waits_ms or {}
        claims = rows.dumps(
            {"id": one.request_id, "claim": one.claim, "wait_ms": waits_ms.get(one.request_id)}
            | why
            for one in jobs
        )

        async def release(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            returned: list[asyncpg.Record] = await connection.fetch(sql("release_claims"), claims)
            await rows.mark_ambiguous(connection, returned)
            return returned

        returned = await self._connections.run(release)
        for job in jobs:
            self.settled(job)
        self._notifications.changed(
            row["id"] for row in returned if row["old_status"] == Status.RUNNING
        )
        self._notifications.work({row["pool"] for row in returned if row["not_before"] is None})

    async def park(
        self,
        jobs: Sequence[ClaimedJob],
        not_before: datetime | None,
        *,
        why: str | None = None,
        revisit_at: datetime | None = None,
        batch_wait_ms: float = 0.0,
        failure: Failure | None = None,
    ) -> None:
        """Park jobs for a provider's batch: workers may claim them at `not_before`, a batch after
        `batch_wait_ms`. The tier is reviewed at `revisit_at`. As in `release`, a failed fetch uses
        up an attempt."""
        if not jobs:
            return
        where: Json = {"tier": Tier.BATCH, "not_before": not_before, "tier_why": why}
        where |= {"revisit_at": revisit_at, "batch_wait_ms": batch_wait_ms}
        where |= {"failure": rows.failure_row(failure), "unmade": rows.unmade(failure)}
        parked = rows.dumps({"id": job.request_id, "claim": job.claim} | where for job in jobs)
        found = await self._connections.rows("park_jobs", parked)
        for job in jobs:
            self.settled(job)
        self._notifications.changed(rows.uuid_of(row["id"]) for row in found)

    async def bring_back(self, claims: Mapping[UUID, int]) -> None:
        """Make jobs that were put off ready now, each unless it was claimed after that claim."""
        if claims:
            put_off = rows.dumps({"id": one, "claim": claim} for one, claim in claims.items())
            back = await self._connections.rows("bring_back", put_off)
            self._notifications.work({row["pool"] for row in back})

    async def retake_expired(self) -> list[UUID]:
        """Return dead workers' jobs to the queue, at most 500, and their ids. Does nothing until
        this process's own heartbeats were answered for a whole lease."""
        return await self._unattended.retake()

    async def expire_due(self) -> int:
        """End queued jobs whose deadline has passed, at most 500; return how many."""
        return await self._unattended.expire_due()

    async def cancel_returned(self) -> int:
        """End jobs that were cancelled and returned to the queue, at most 500."""
        return await self._unattended.cancel_returned()

    def _lost(self, job: ClaimedJob) -> NoReturn:
        self.settled(job)
        raise ClaimLost(f"another worker has {job.request_id} now")

    async def _claim(
        self, lane: Lane, limit: int, without: Mapping[str, Callers]
    ) -> list[ClaimedJob]:
        async with self._queues.lock:
            jobs = await self._queues.claim(lane, limit, without)
            self._held |= {job.request_id: job.claim for job in jobs}
        return jobs

    def _undelivered(self, task: asyncio.Task[list[ClaimedJob]]) -> None:
        """Mark a cancelled caller's claims, which no worker runs, for release."""
        self._doubtful = True
        if not task.cancelled() and task.exception() is None:
            for job in task.result():
                self.settled(job)

    async def _check_strays(self) -> None:
        """Release stray claims if there may be any, otherwise when a search is due."""
        scan = self._straying.begin()
        if self._doubtful or scan.is_whole:
            await self._release_strays()
            self._straying.end(scan, complete=True)

    async def _release_strays(self) -> None:
        async with self._queues.lock:
            self._doubtful = False
            try:
                freed = await self._connections.rows(
                    "release_strays", self._instance_id, list(self._held)
                )
            except StoreUnavailable:
                self._doubtful = True
                raise
            self._notifications.work(row["pool"] for row in freed)

    async def _begin_another(self, row: Json, job: ClaimedJob, failed: FailedTry) -> bool:
        """Record the next attempt of a running job; False if an earlier try with a lost reply has
        recorded it, perhaps for a different upstream."""
        ended = {"outcome": "failed", "finished_at": failed.finished_at}
        ended |= {"upstream_ms": failed.upstream_ms, "failure": rows.failure_row(failed.failure)}

        async def begin(connection: asyncpg.Connection) -> bool:
            found = await connection.fetchrow(
                sql("running_attempt"), job.request_id, job.claim, self._instance_id
            )
            if found is None:
                self._lost(job)
            if rows.uuid_of(found["attempt_id"]) == row["attempt_id"]:
                return False
            place = {"id": found["attempt_id"], "created_at": found["attempt_at"]}
            await connection.execute(sql("end_attempts"), *rows.ends_of([ended | place]))
            await connection.execute(
                sql("begin_another"),
                job.request_id,
                row["attempt_id"],
                int(failed.is_counted),
                self._instance_id,
                *map(row.get, _OF_ATTEMPT),
                rows.attempts_since([row], 0),  # the attempt exists under this claim
            )
            return True

        return await self._connections.run(begin)

    async def _begin(self, batch: Sequence[Json]) -> list[Exception | None]:
        by_id = {row["id"]: row for row in sorted(batch, key=lambda row: row["id"])}
        args = (rows.dumps(by_id.values()), self._instance_id, rows.attempts_since(batch))
        begun = {row["id"] for row in await self._connections.rows("begin_running", *args)}
        self._notifications.changed(begun)
        return [
            None if row["id"] in begun else ClaimLost(f"another worker has {row['id']} now")
            for row in batch
        ]
