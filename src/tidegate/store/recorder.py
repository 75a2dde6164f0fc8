"""The ends of attempts, jobs and streams: written behind, in one transaction each batch.

Invariant: what was accepted here is written exactly once: its request, files, attempt and audit
row together. A job's end is fenced by its claim, a stream's keyed by its id, so repeats are safe.
While PostgreSQL is away, entries wait on the disk and are written when it returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Literal
from uuid import UUID

import asyncpg

from tidegate.call import new_id
from tidegate.errors import ClaimLost, StoreUnavailable
from tidegate.observed import Observed, Observers
from tidegate.store import bodies
from tidegate.store.bell import Bell
from tidegate.store.blobs import Blobs
from tidegate.store.connection import Connections
from tidegate.store.erased import erased_entries
from tidegate.store.native_keys import KEY_OPS, settle_keys
from tidegate.store.outbox import add_webhooks
from tidegate.store.queries import sql
from tidegate.store.records import Json
from tidegate.store.rows import audit_row, dumps
from tidegate.store.spending import Spending
from tidegate.store.spill import Spill
from tidegate.store.usage import add_usage
from tidegate.store.writer import GroupWriter
from tidegate.telemetry import Log, get_logger

MAX_PENDING_STREAMS = 2_000
MAX_PENDING_BYTES = 64_000_000
_RETRY_MS = 200
_REPLAY_EVERY_MS = 5_000


class Recorder:
    """Takes what `entries` makes."""

    def __init__(
        self,
        connections: Connections,
        bell: Bell,
        spill: Spill,
        *,
        blobs: Blobs,
        spending: Spending,
        instance_id: str,
        when_full: Literal["block", "drop"],
        observers: Observers,
    ) -> None:
        self._connections = connections
        self._blobs = blobs
        self._spending = spending
        self._bell = bell
        self._spill = spill
        self._instance_id = instance_id
        self._when_full = when_full
        self._observers = observers
        self._writer: GroupWriter[Json, None] = GroupWriter(self._commit, _size_of)
        self._tasks: set[asyncio.Task[bool]] = set()
        self._streams = 0
        self._streams_bytes = 0
        self._room = asyncio.Event()
        self._dropped = 0
        self.dropped = 0  # since the start
        self._replay_soon = asyncio.Event()
        self._replayer: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        self._connections.on_back.append(self._replay_soon.set)
        self._replay_soon.set()
        self._replayer = asyncio.create_task(self._replay())

    async def aclose(self, timeout_ms: int) -> None:
        """Write what is pending within `timeout_ms`; what can't be is on the disk."""
        self._closing = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_ms / 1000)
        left = list(self._tasks)
        if self._replayer is not None:
            self._replayer.cancel()
            left_replay = [self._replayer]
            await asyncio.gather(*left_replay, return_exceptions=True)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._spill.close()

    async def record(self, entry: Awaitable[Json], observed: Observed) -> bool:
        """Write `entry`, or keep it on the disk while PostgreSQL is away; True if written. Those
        who count calls are then told of it, as `observed`.

        Raises ClaimLost, or StoreUnavailable when the spill is full too. A cancelled caller's
        entry is written or kept all the same.
        """
        task = self._start(entry)
        task.add_done_callback(lambda done: self._observe(done, observed))
        return await asyncio.shield(task)

    def _observe(self, done: asyncio.Task[bool], observed: Observed) -> None:
        if not done.cancelled() and done.exception() is None:
            self._observers.note(observed)

    def keep(self, entry: Json) -> asyncio.Task[bool]:
        """As `record`, for what is neither counted nor awaited."""
        return self._start(entry)

    async def enqueue(self, entry: Json) -> None:
        """Accept `entry` into the bounded buffer and return; `when_full` says what a full one does.

        A cancelled caller that was still waiting for room has recorded nothing.
        """
        size_bytes = _size_of(entry)
        while self._streams and (
            self._streams >= MAX_PENDING_STREAMS
            or self._streams_bytes + size_bytes > MAX_PENDING_BYTES
        ):
            if self._when_full == "drop":
                self._drop()
                return
            self._room.clear()
            await self._room.wait()
        if self._dropped:
            get_logger().warning(Log.AUDIT_DROPPED, dropping=False, dropped=self._dropped)
            self._dropped = 0
        self._streams += 1
        self._streams_bytes += size_bytes
        task = self._start(entry, patient=True)
        task.add_done_callback(lambda _task: self._left(size_bytes))

    def _left(self, size_bytes: int) -> None:
        self._streams -= 1
        self._streams_bytes -= size_bytes
        self._room.set()

    def _drop(self) -> None:
        if not self._dropped:
            get_logger().warning(Log.AUDIT_DROPPED, dropping=True)
        self._dropped += 1
        self.dropped += 1

    def _start(self, entry: Json | Awaitable[Json], patient: bool = False) -> asyncio.Task[bool]:
        task = asyncio.create_task(self._write_or_keep(entry, patient))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[bool]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ClaimLost | StoreUnavailable):
            get_logger().error(Log.INTERNAL_ERROR, where="recorder", error=repr(error))

    async def _write_or_keep(self, given: Json | Awaitable[Json], patient: bool) -> bool:
        entry = given if isinstance(given, dict) else await given
        while True:
            try:
                await self._writer.write(entry)
                return True
            except StoreUnavailable:
                try:
                    await self._spill.keep(entry)
                    # After a mere blip nobody will tell us that PostgreSQL is back.
                    loop = asyncio.get_running_loop()
                    loop.call_later(_RETRY_MS / 1000, self._replay_soon.set)
                    return False
                except StoreUnavailable:
                    if not patient or self._closing:
                        raise
            await asyncio.sleep(_RETRY_MS / 1000)

    async def _replay(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_REPLAY_EVERY_MS / 1000):
                    await self._replay_soon.wait()
            except TimeoutError:
                pass  # another process may have died and left its file
            self._replay_soon.clear()
            if self._connections.away:
                continue
            try:
                await self._spill.replay(self._write_again)
            except StoreUnavailable:
                continue  # the connections' return wakes us
            except Exception as failed:  # noqa: BLE001 -- top of a task
                get_logger().error(Log.INTERNAL_ERROR, where="replay", error=repr(failed))

    async def _write_again(self, entries: list[Json]) -> None:
        results = await asyncio.gather(
            *(self._writer.write(entry) for entry in entries), return_exceptions=True
        )
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, StoreUnavailable):
                raise result
            if isinstance(result, ClaimLost):
                get_logger().warning(
                    Log.SPILL_REPLAYED, request_id=str(entry["row"]["id"]), refused=repr(result)
                )
            elif isinstance(result, BaseException):
                await self._spill.reject(entry, repr(result))
                get_logger().error(Log.INTERNAL_ERROR, where="replay", error=repr(result))

    async def _commit(self, entries: Sequence[Json]) -> list[Exception | None]:
        async def work(
            connection: asyncpg.Connection,
        ) -> tuple[list[Json], tuple[set[str], list[UUID], set[str]]]:
            gone = await erased_entries(connection, entries)
            ids = {id(entry) for entry in gone}
            kept = [entry for entry in entries if id(entry) not in ids]
            await settle_keys(connection, [entry for entry in kept if entry["op"] in KEY_OPS])
            rest = [entry for entry in kept if entry["op"] not in KEY_OPS]
            return gone, await _write_entries(connection, rest, self._instance_id)

        gone, (written, changed, pools) = await self._connections.run(work)
        written |= {str(entry["row"]["id"]) for entry in gone if entry["op"] not in KEY_OPS}
        self._spending.written(written)
        self._bell.changed(changed)
        self._bell.work(pools)
        lost = [
            entry
            for entry in entries
            if entry["op"] not in KEY_OPS and str(entry["row"]["id"]) not in written
        ]
        await self._discard([*gone, *lost])
        self._spending.written(str(entry["row"]["id"]) for entry in lost)  # it never will be
        ids = {id(entry) for entry in lost}
        return [
            ClaimLost(f"another worker has {entry['row']['id']} now") if id(entry) in ids else None
            for entry in entries
        ]

    async def _discard(self, entries: Sequence[Json]) -> None:
        """Delete the blobs of entries that nobody will write: those that were made for them."""
        own = [body for entry in entries for body in entry["bodies"]]
        own += [file for entry in entries for file in entry["files"] if file["role"] == "output"]
        keys = [one["blob_key"] for one in own if one["blob_key"] is not None]
        if keys:
            with suppress(StoreUnavailable):  # then they go with the other orphans
                await self._blobs.delete(keys)


def _size_of(entry: Json) -> int:
    text = sum(len(entry["row"].get(name) or "") for name in ("result", "prompt", "answer"))
    return 1_000 + text + sum(len(body.get("data") or "") for body in entry["bodies"])


async def _write_entries(
    connection: asyncpg.Connection, entries: Sequence[Json], instance_id: str
) -> tuple[set[str], list[UUID], set[str]]:
    """One batch in one transaction.

    Returns the ids that are written, now or before; those that changed; the pools with work.
    """
    ops: dict[str, dict[str, Json]] = {"end": {}, "retry": {}, "stream": {}, "relay": {}}
    for entry in sorted(entries, key=lambda entry: str(entry["row"]["id"])):
        ops[entry["op"]][str(entry["row"]["id"])] = entry
    rows: dict[str, asyncpg.Record] = {}
    pools: set[str] = set()
    if ops["end"]:
        rows |= await _rows(connection, "end_requests", ops["end"])
    if ops["retry"]:
        retried = await _rows(connection, "retry_requests", ops["retry"])
        pools = {row["pool"] for row in retried.values()}
        rows |= retried
    if ops["stream"]:
        rows |= await _rows(connection, "add_streams", ops["stream"])
    relayed = []
    if ops["relay"]:
        relayed = await _add_relayed(connection, list(ops["relay"].values()))
    by_id = {key: entry for group in ops.values() for key, entry in group.items()}
    fresh = [(by_id[key], row) for key, row in rows.items()]
    await _add_files(connection, fresh)
    await _end_attempts(connection, fresh, instance_id)
    await add_audit(
        connection,
        [
            (row, entry["attempt"] or {}, entry["row"]["failure"], entry["bodies"])
            for entry, row in fresh
            if entry["op"] != "retry"
        ],
        instance_id,
        relayed,
    )
    written = set(rows) | set(ops["stream"]) | set(ops["relay"])
    missing = [
        {"id": key, "claim": entry["row"]["claim"], "status": entry["row"]["status"]}
        for key, entry in by_id.items()
        if key not in written
    ]
    if missing:
        found = await connection.fetch(sql("already_written"), dumps(missing))
        written |= {str(row["id"]) for row in found}
    return written, [UUID(key) for key in rows], pools


async def _rows(
    connection: asyncpg.Connection, name: str, entries: dict[str, Json]
) -> dict[str, asyncpg.Record]:
    found = await connection.fetch(sql(name), dumps(entry["row"] for entry in entries.values()))
    return {str(row["id"]): row for row in found}


async def _add_relayed(connection: asyncpg.Connection, entries: list[Json]) -> list[Json]:
    """Returns the rows that were not there before."""
    added = await connection.fetch(sql("add_relayed"), dumps(entry["row"] for entry in entries))
    found = [body for entry in entries for body in entry["bodies"]]
    if found:
        await connection.execute(sql("add_relayed_bodies"), dumps(found))
    ids = {str(row["id"]) for row in added}
    return [entry["row"] for entry in entries if str(entry["row"]["id"]) in ids]


async def _add_files(
    connection: asyncpg.Connection, fresh: list[tuple[Json, asyncpg.Record]]
) -> None:
    files = [file for entry, _ in fresh for file in entry["files"]]
    if files:
        await connection.execute(sql("add_files"), dumps(files))


async def _end_attempts(
    connection: asyncpg.Connection, fresh: list[tuple[Json, asyncpg.Record]], instance_id: str
) -> None:
    ended, whole = [], []
    for entry, row in fresh:
        attempt = entry["attempt"]
        if attempt is None:
            continue
        outcome = "failed" if entry["op"] == "retry" else entry["row"]["status"]
        common = {**attempt, "outcome": outcome, "failure": entry["row"]["failure"]}
        if row["attempt_id"] is not None:
            ended.append({**common, "id": row["attempt_id"], "created_at": row["attempt_at"]})
        else:
            owner = {"tenant_id": row["tenant_id"], "pool": row["pool"], "kind": row["kind"]}
            place = {"id": new_id(), "request_id": row["id"], "number": 1, "claim": row["claim"]}
            whole.append({**common, **owner, **place, "instance_id": instance_id})
    if ended:
        await connection.execute(sql("end_attempts"), dumps(ended))
    if whole:
        await connection.execute(sql("add_attempts"), dumps(whole))


async def add_audit(
    connection: asyncpg.Connection,
    ended: Sequence[tuple[asyncpg.Record, Json, Json | None, list[Json]]],
    instance_id: str,
    relayed: Sequence[Json] = (),
) -> None:
    """Append audit rows, their bodies and webhooks for requests that ended in this transaction,
    and add them to the totals, with the `relayed` rows that it has appended.

    Each is (the row as it now stands, its last attempt, its failure, its bodies).
    """
    audits, packed = [], []
    for row, attempt, failure, own_bodies in ended:
        audit = audit_row(row, attempt, instance_id, failure)
        audits.append(audit)
        for body in own_bodies:
            owner = {"id": audit["id"], "tenant_id": row["tenant_id"], "pool": row["pool"]}
            packed.append({**body, **owner})
    if audits:
        await connection.execute(sql("add_audit"), dumps(audits))
    await add_webhooks(connection, [row for row, *_ in ended])
    if packed:
        await connection.execute(sql("add_bodies"), dumps(packed))
    await add_usage(connection, [*audits, *relayed])


async def audit_unanswered(
    connection: asyncpg.Connection, ended: list[asyncpg.Record], failure: Json, instance_id: str
) -> None:
    """The same for requests that ended here in the database, without a worker's answer."""
    asked = [
        bodies.inline_row(
            "request", bodies.request_body(row["prompt"], row["image_uri"], row["model"], [])
        )
        for row in ended
    ]
    await add_audit(
        connection,
        [(row, {}, failure, [body]) for row, body in zip(ended, asked, strict=True)],
        instance_id,
    )
