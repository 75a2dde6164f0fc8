"""The lines of batches that are being worked through: claimed in windows, ended in group commits.

Invariant: a line has at most one claim that counts; it is marked before its call and ended once,
and its batch counts it and the record tells of it in the same transaction. So counts are exact, and
a line that has ended is never called again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

import asyncpg
import orjson

from tidegate.errors import ClaimLost
from tidegate.store import rows
from tidegate.store.connection import Connections
from tidegate.store.line_records import record_of
from tidegate.store.liveness import until_quick
from tidegate.store.lookback import Lookback
from tidegate.store.queries import sql
from tidegate.store.records import Failure, Json
from tidegate.store.relayed import Prepared, RelayLog
from tidegate.store.states import MAX_LAPSES, Status
from tidegate.store.writer import GroupWriter
from tidegate.telemetry import Log, get_logger

_HELD_UP_EVERY_S = 1.0

log = get_logger()

_DIED = Failure(
    code="worker_lost",
    message=f"the workers that ran this died {MAX_LAPSES} times; it will not be tried again",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A claimed line. `id` names it on the record; `attempts` are those begun before this claim."""

    batch_id: UUID
    line: int
    claim: int
    id: UUID
    tenant_id: str
    custom_id: str
    endpoint: str
    body: str
    models: tuple[str, ...] | None
    key_id: str | None
    attempts: int
    expires_at: datetime

    @property
    def key(self) -> Json:
        return {"batch_id": self.batch_id, "line": self.line, "claim": self.claim}


@dataclass(frozen=True, slots=True)
class _End:
    """How a line ended, and the record of its call."""

    row: Json
    call: Prepared

    @property
    def key(self) -> tuple[int, int]:
        return self.row["batch_id"].int, self.row["line"]


class BatchLines:
    """Every method raises StoreUnavailable. `may_judge`: whether this process is heard itself."""

    def __init__(
        self,
        connections: Connections,
        relayed: RelayLog,
        *,
        instance_id: str,
        lease_ms: int,
        may_judge: Callable[[], bool],
    ) -> None:
        self._relayed = relayed
        self._connections = connections
        self._instance_id = instance_id
        self._lease_ms = lease_ms
        self._may_judge = may_judge
        # What left a queue or a worker's hands stays in its index beside an old transaction.
        self._claims, self._strays, self._lapses = Lookback(), Lookback(), Lookback()
        self._held_up: frozenset[UUID] = frozenset()
        self._held_up_at = float("-inf")
        self._from: dict[UUID, int] = {}
        self._begins: GroupWriter[Json, None] = GroupWriter(self._begin, lambda _row: 100)
        self._ends: GroupWriter[_End, None] = GroupWriter(
            self._end, lambda end: 200 + 2 * end.call.record.size_bytes
        )

    async def claim(self, limit: int, most_bytes: int) -> list[Line]:
        """Lines that come back are found at the latest by the next search from the beginning."""
        look = self._claims.begin()
        since = {} if look.is_whole else {str(key): line for key, line in self._from.items()}

        async def claim(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            found: list[asyncpg.Record] = await connection.fetch(
                *(sql("claim_batch_lines"), self._instance_id, limit, most_bytes),
                *(orjson.dumps(since).decode(), list(self._held_up)),
            )
            return found

        lines = [_line(row) for row in await self._connections.run(claim)]
        self._claims.end(look, complete=True)
        if look.is_whole:
            self._from.clear()
        for line in sorted(lines, key=lambda line: line.line, reverse=True):
            self._from[line.batch_id] = line.line
        return lines

    async def held_up(self) -> frozenset[UUID]:
        """Batches under way of which no line is to be claimed or begun for now: their tenants have
        spent a budget, are disabled or gone. Looked for once a second at most."""
        now = time.monotonic()
        if now - self._held_up_at >= _HELD_UP_EVERY_S:

            async def read(connection: asyncpg.Connection) -> list[asyncpg.Record]:
                found: list[asyncpg.Record] = await connection.fetch(sql("batches_held_up"))
                return found

            found = await self._connections.run(read)
            self._held_up = frozenset(UUID(int=row["id"].int) for row in found)
            self._held_up_at = now
        return self._held_up

    async def release_strays(self, held: Iterable[Line]) -> None:
        """Give up what this process has claimed and does not know of: the reply was lost."""
        look = self._strays.begin()
        if not look.is_whole:
            return
        ids = [line.id for line in held]

        async def release(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("release_stray_lines"), self._instance_id, ids)

        await self._connections.run(release)
        self._strays.end(look, complete=True)

    async def over(self, batch_ids: Iterable[UUID]) -> frozenset[UUID]:
        """Those of these batches of which no more lines may begin."""
        ids = list(batch_ids)

        async def read(connection: asyncpg.Connection) -> frozenset[UUID]:
            found = await connection.fetch(sql("batches_over"), ids)
            return frozenset(UUID(int=row["id"].int) for row in found)

        return await self._connections.run(read)

    async def begin(self, line: Line) -> None:
        """Mark a line as calling, as `Claims.running` does a job. Raises ClaimLost."""
        await until_quick(lambda: self._begins.write(line.key), self._lease_ms)

    async def end(
        self,
        line: Line,
        call: Prepared,
        *,
        status_code: int | None,
        answer: str | None,
        failure: Failure | None,
    ) -> None:
        """Record how a line ended, and with it its call. An end of a claim that was lost changes
        nothing: the line, or the end of its batch, tells of the call then.

        A failure that came with the provider's own words has both `answer` and `failure`.
        """
        row = {
            **line.key,
            "state": "succeeded" if failure is None else "failed",
            "status_code": status_code,
            "answer": None if answer is None else rows.clean(answer),
            "failure": rows.failure_row(failure),
        }
        await self._ends.write(_End(row, call))

    async def give_back(
        self,
        lines: Iterable[Line],
        *,
        waits_ms: Mapping[UUID, float] | Mapping[UUID, int] | None = None,
        counted: int = 1,
    ) -> None:
        """Release claims on lines, of those in `waits_ms` for so long. counted: how many attempts
        the calls have used up that were begun under this claim."""
        waits_ms, uncounted = waits_ms or {}, 1 - counted
        given = rows.dumps(
            {**line.key, "after_ms": waits_ms.get(line.id), "uncounted": uncounted}
            for line in lines
        )

        async def give(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("return_batch_lines"), given)

        await self._connections.run(give)

    async def retake(self) -> None:
        """Return what dead workers had."""
        if not self._may_judge():
            return
        look = self._lapses.begin()
        if not look.is_whole:
            return
        failure = orjson.dumps(asdict(_DIED)).decode()

        async def retake(connection: asyncpg.Connection) -> list[Prepared]:
            taken = await connection.fetch(
                sql("retake_batch_lines"), self._lease_ms, MAX_LAPSES, failure
            )
            failed = [row for row in taken if row["state"] == "failed"]
            await _count(connection, failed)
            records = [record_of(row, status=Status.FAILED, failure=_DIED) for row in failed]
            calls = [await self._relayed.prepare(record) for record in records]
            if calls:
                await self._relayed.add(connection, calls)
            return calls

        self._relayed.noted(call.record for call in await self._connections.run(retake))
        self._lapses.end(look, complete=True)

    async def _begin(self, batch: Sequence[Json]) -> list[Exception | None]:
        async def begin(connection: asyncpg.Connection) -> set[tuple[int, int]]:
            begun = await connection.fetch(sql("begin_batch_lines"), _ordered(batch))
            return {(row["batch_id"].int, row["line"]) for row in begun}

        begun = await self._connections.run(begin)
        return [
            None
            if (row["batch_id"].int, row["line"]) in begun
            else ClaimLost(f"another worker has line {row['line']} now")
            for row in batch
        ]

    async def _end(self, batch: Sequence[_End]) -> list[None]:
        lines = _ordered([end.row for end in batch])

        async def end(connection: asyncpg.Connection) -> None:
            ended = await connection.fetch(sql("end_batch_lines"), lines)
            await _count(connection, ended)
            keys = {(row["batch_id"].int, row["line"]) for row in ended}
            if is_recorded:
                await self._relayed.add(connection, [one.call for one in batch if one.key in keys])

        is_recorded = True
        try:
            await self._connections.run(end)
            self._relayed.noted(one.call.record for one in batch)
        except (asyncpg.PostgresError, ValueError) as refused:
            if len(batch) > 1:
                raise  # then each comes by itself
            log.error(Log.INTERNAL_ERROR, where="the record of a line", error=repr(refused))
            is_recorded = False  # by another way, or the line would never end
            await self._connections.run(end)
            self._relayed.put(batch[0].call.record)
        return [None] * len(batch)


async def _count(connection: asyncpg.Connection, ended: Iterable[asyncpg.Record]) -> None:
    counts: dict[UUID, Counter[str]] = {}
    for row in ended:
        counts.setdefault(row["batch_id"], Counter())[row["state"]] += 1
    for batch_id in sorted(counts):  # one order in all processes, lest they wait in a circle
        of_it = counts[batch_id]
        await connection.execute(
            sql("count_batch_lines"), batch_id, of_it["succeeded"], of_it["failed"]
        )


def _ordered(batch: Sequence[Json]) -> str:
    return rows.dumps(sorted(batch, key=lambda row: (row["batch_id"].int, row["line"])))


def _line(row: asyncpg.Record) -> Line:
    return Line(
        batch_id=UUID(int=row["batch_id"].int),
        line=row["line"],
        claim=row["claim"],
        id=UUID(int=row["id"].int),
        tenant_id=row["tenant_id"],
        custom_id=row["custom_id"],
        endpoint=row["endpoint"],
        body=row["body"],
        models=None if row["models"] is None else tuple(row["models"]),
        key_id=row["key_id"],
        attempts=row["attempts"],
        expires_at=row["expires_at"],
    )
