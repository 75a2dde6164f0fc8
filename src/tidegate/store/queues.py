"""Finding and claiming what is ready, at a cost that does not grow with what has left the queue.

Invariant: nothing that is ready stays unseen. What came since the last reading is read before each
claim; what was there before this process is swept once in steps, and again now and then, whatever
is known, so that not even a mistake here could strand a job.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from tidegate.store import rows
from tidegate.store.bell import Bell
from tidegate.store.connection import Connections
from tidegate.store.lookback import AT_ONCE, Lookback
from tidegate.store.queries import sql
from tidegate.store.ready import Ready, Turn
from tidegate.store.records import ClaimedJob

_TENANTS_AT_ONCE = 32
_ROUNDS = 4
_READ_EVERY_S = 2.0
_SWEEP_EVERY_S = 30.0
_SWEEP_SHARE = 50
_MOST_SWEEP_S = 4.0
_STEP_MS = 500
_LAST_STEP_MS = 4_500

Lane = tuple[str, str]  # pool and lane


@dataclass(slots=True)
class _Known:
    """What is known of a lane, and when it was last read and swept."""

    ready: Ready
    last_tenant: str = ""
    is_first: bool = True
    read_at: float = 0.0
    swept_at: float = 0.0
    sweep_s: float = 0.0


class Queues:
    """`lock` is held while jobs are being claimed."""

    def __init__(self, connections: Connections, bell: Bell, *, instance_id: str) -> None:
        self._connections = connections
        self._bell = bell
        self._instance_id = instance_id
        self.lock = asyncio.Lock()
        self._sweeping = asyncio.Lock()
        self._lanes: dict[Lane, _Known] = {}
        self._ripening = Lookback()
        # It may be another server, and may have lost what the old one had seen.
        connections.on_back.append(self._lanes.clear)

    async def claim(self, lane: Lane, limit: int) -> list[ClaimedJob]:
        """Claim up to `limit` jobs, the caller holding `lock`.

        Raises StoreUnavailable, after which some may be claimed.
        """
        known = self._lanes.setdefault(lane, _Known(Ready()))
        if known.is_first:
            await self._sweep(lane, known, _MOST_SWEEP_S)
            known.is_first = False
        tenants, jobs = await self._read_and_take(lane, known, limit)
        at_once = _TENANTS_AT_ONCE
        for _ in range(_ROUNDS):
            while tenants and len(jobs) < limit:
                # Others had been there first: the next step is a larger one.
                at_once *= 2
                some, tenants = tenants[:at_once], tenants[at_once:]
                jobs += await self._take(lane, known, some, limit - len(jobs))
            if len(jobs) >= limit:
                break
            # Others may have locked the candidates that we saw while more wait behind them.
            tenants = known.ready.tenants_after(known.last_tenant)
        return jobs

    async def tend(self) -> None:
        """Keep up with lanes in which nothing is claimed just now, and look again at all of it.

        To be called every second or so; raises StoreUnavailable.
        """
        await self._ripen_all()
        for lane, known in list(self._lanes.items()):
            if time.monotonic() - known.read_at > _READ_EVERY_S:
                async with self.lock:
                    await self._read(lane, known)
            pause_s = max(_SWEEP_EVERY_S, _SWEEP_SHARE * known.sweep_s)
            if known.ready.is_swept and time.monotonic() - known.swept_at > pause_s:
                known.ready.begin_sweep()
                known.sweep_s = 0.0
            if not known.ready.is_swept:
                await self._sweep(lane, known, _MOST_SWEEP_S)

    async def _read_and_take(
        self, lane: Lane, known: _Known, limit: int
    ) -> tuple[list[str], list[ClaimedJob]]:
        """The usual claim, in one transaction; returns also the tenants that were not looked at."""
        look = self._ripening.begin(hurried=True)

        async def work(
            connection: asyncpg.Connection,
        ) -> tuple[int, list[str], list[Turn], list[asyncpg.Record], list[ClaimedJob]]:
            ripe = 0
            came = await _came(connection, lane, known.ready.unread, look.back_s)
            known.ready.read(came)
            if came[0]["is_ripening"]:
                ripe = await _ripen(connection, look.back_s)
                known.ready.read(await _came(connection, lane, known.ready.unread))
            tenants = known.ready.tenants_after(known.last_tenant)
            some, left = tenants[:_TENANTS_AT_ONCE], tenants[_TENANTS_AT_ONCE:]
            return ripe, left, *await self._claim(connection, lane, known, some, limit)

        ripe, tenants, turns, found, jobs = await self._connections.run(work, repeatable=False)
        self._ripening.end(look, complete=ripe < AT_ONCE)
        known.read_at = time.monotonic()
        self._settle(known, turns, found, jobs)
        if ripe:
            self._bell.work([lane[0]])
        return tenants, jobs

    async def _take(
        self, lane: Lane, known: _Known, tenants: list[str], limit: int
    ) -> list[ClaimedJob]:
        async def work(
            connection: asyncpg.Connection,
        ) -> tuple[list[Turn], list[asyncpg.Record], list[ClaimedJob]]:
            return await self._claim(connection, lane, known, tenants, limit)

        turns, found, jobs = await self._connections.run(work, repeatable=False)
        self._settle(known, turns, found, jobs)
        return jobs

    async def _claim(
        self,
        connection: asyncpg.Connection,
        lane: Lane,
        known: _Known,
        tenants: list[str],
        limit: int,
    ) -> tuple[list[Turn], list[asyncpg.Record], list[ClaimedJob]]:
        turns = known.ready.turns(tenants, limit)
        if not turns:
            return [], [], []
        queues = rows.dumps(turn.row() for turn in turns)
        found = await connection.fetch(sql("claim"), *lane, limit, self._instance_id, queues)
        taken = [row for row in found if row["id"] is not None]
        return turns, found, await _with_files(connection, taken)

    def _settle(
        self,
        known: _Known,
        turns: list[Turn],
        found: list[asyncpg.Record],
        jobs: list[ClaimedJob],
    ) -> None:
        """Once the claim is committed, and not before: till then others may have its jobs."""
        after = {(row["of_n"], row["of_priority"]): row for row in found}
        for turn in turns:
            row = after[turn.n, turn.key[1]]
            known.ready.settle(turn, row["since_now"], row["early_left"] or ())
        if jobs:
            known.last_tenant = jobs[-1].tenant_id

    async def _read(self, lane: Lane, known: _Known) -> None:
        async def work(connection: asyncpg.Connection) -> None:
            known.ready.read(await _came(connection, lane, known.ready.unread))

        await self._connections.run(work)
        known.read_at = time.monotonic()

    async def _sweep(self, lane: Lane, known: _Known, most_s: float) -> None:
        """Look at all that was there before the last reading, as far as `most_s` reaches."""
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
                return await _came(connection, lane, step)
            except asyncpg.QueryCanceledError:
                return None

        began = time.monotonic()
        found = await self._connections.run(work)
        if found is None:
            ready.not_swept()
        else:
            ready.swept(step[1], found, time.monotonic() - began)

    async def _ripen_all(self) -> None:
        look = self._ripening.begin()

        async def work(connection: asyncpg.Connection) -> int:
            return await _ripen(connection, look.back_s)

        ripe = await self._connections.run(work)
        self._ripening.end(look, complete=ripe < AT_ONCE)


async def _came(
    connection: asyncpg.Connection,
    lane: Lane,
    transactions: tuple[int, int, list[int]],
    ripe_since_s: float = 0.0,
) -> list[asyncpg.Record]:
    """What became ready in `transactions`."""
    found: list[asyncpg.Record] = await connection.fetch(
        sql("came"), *lane, *transactions, ripe_since_s
    )
    return found


async def _ripen(connection: asyncpg.Connection, back_s: float) -> int:
    """How many retries have become ready."""
    return int((await connection.execute(sql("ripen"), back_s)).rpartition(" ")[2])


async def _with_files(
    connection: asyncpg.Connection, taken: list[asyncpg.Record]
) -> list[ClaimedJob]:
    files: dict[object, list[asyncpg.Record]] = {row["id"]: [] for row in taken}
    with_files = [row["id"] for row in taken if row["has_files"]]
    if with_files:
        for file in await connection.fetch(sql("get_input_files"), with_files):
            files[file["request_id"]].append(file)
    return [rows.claimed_job(row, files[row["id"]]) for row in taken]
