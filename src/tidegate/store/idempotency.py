"""Idempotency keys of native calls and batches, and the answers under them.

Invariant: of all concurrent requests under one key, the provider answers one. A process renews the
keys of its running calls. A key that is not renewed for a lease (its process was killed, or never
learned that it has the key) becomes free for the next request, whose answer names the lost call.
Only a process whose own heartbeats have arrived without a gap for a lease may free another's key,
as with claims of jobs, so that an outage of PostgreSQL frees none.

An answer that cannot be stored when its call ends is kept in memory or on disk until it is stored;
its key is renewed meanwhile. Above `MOST_PENDING_BYTES` of such answers the next one is dropped,
and its key expires. The key of a batch is written in the batch's own transaction; its answer is the
batch.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from uuid import UUID

import asyncpg

from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections, sql
from tidegate.store.notifications import Steadiness, require_judge
from tidegate.store.records import Idempotency, Json, dumps, entry_of, record_of
from tidegate.telemetry.logging import Log, get_logger

LONGEST_LEASE_MS = 10_000
MOST_PENDING_BYTES = 64_000_000
ANSWER, FREE = KEY_OPS = "answer", "free"  # operations of the recorder's entries
_LARGE_BYTES = 100_000
_TIMEOUT_MS = 2_000
_POLL_S = 0.1
_RETRY_S = 0.2

log = get_logger()


@dataclass(frozen=True, slots=True)
class KeyState:
    """The state of a key. `answer`: None while the request is being answered; `lapsed`: the owner
    has not renewed the key for a lease. `lost`: the earlier request under the same key whose answer
    was lost with its process."""

    digest: str
    request_id: UUID
    http_status: int = 0
    content_type: str = ""
    answer: bytes | None = None
    lapsed: bool = False
    lost: UUID | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """The key belongs to this request now; `lost` as in `KeyState`."""

    lost: UUID | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """A request that holds a key."""

    tenant_id: str
    key: str
    request_id: UUID
    subject: str | None
    received_at: datetime

    def row(self) -> Json:
        return {
            "id": self.request_id,
            "tenant_id": self.tenant_id,
            "idempotency_key": self.key,
            "subject": self.subject,
            "submitted_at": self.received_at,
        }


class NativeKeys:
    """Keys of this process's calls. Methods that query PostgreSQL raise StoreUnavailable.

    `keep` writes an entry (True), or keeps it on disk until it can be written (False).
    """

    def __init__(
        self,
        connections: Connections,
        keep: Callable[[Json], asyncio.Task[bool]],
        *,
        lease_ms: int,
    ) -> None:
        self._connections = connections
        self._keep = keep
        self.lease_ms = min(lease_ms, LONGEST_LEASE_MS)
        self._steadiness = Steadiness(self.lease_ms)
        self._owned: dict[UUID, Owner] = {}
        self._looking: dict[tuple[str, str], asyncio.Task[KeyState | None]] = {}
        self._pending_bytes = 0
        self._renewing: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Stop renewing; the recorder writes pending entries."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        for looking in self._looking.values():
            looking.cancel()

    async def take(self, owner: Owner, requested: Idempotency) -> Taken | KeyState:
        """Take the key for `owner`, or return its state. A cancelled caller has no key: if it is
        taken all the same, it is freed."""
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_often())
        lease_ms = self._judged_ms()

        async def take(connection: asyncpg.Connection) -> Taken | KeyState:
            ids = owner.tenant_id, requested, owner.request_id
            taken = await take_key(connection, *ids, lease_ms=lease_ms)
            if isinstance(taken, Taken) and taken.lost is not None:
                require_judge(self._steadiness.may_judge)
            return taken

        taking = asyncio.create_task(self._connections.run(take, timeout_ms=_TIMEOUT_MS))
        try:
            taken = await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(partial(self._taken_for_none, owner))
            raise
        if isinstance(taken, Taken):
            self._owned[owner.request_id] = owner
        return taken

    def _taken_for_none(self, owner: Owner, taking: asyncio.Task[Taken | KeyState]) -> None:
        failed = taking.cancelled() or taking.exception() is not None
        if not failed and isinstance(taking.result(), Taken):
            self.free(owner)

    async def known(self, tenant_id: str, key: str) -> KeyState | None:
        """Return the state of a key without changing it."""
        lease_ms = self._judged_ms()
        return await self._connections.run(
            lambda connection: known_key(connection, tenant_id, key, lease_ms=lease_ms),
            timeout_ms=_TIMEOUT_MS,
        )

    async def poll(self, tenant_id: str, key: str) -> KeyState | None:
        """Return the state of a key a moment later. Waiters for one key in this process share the
        query."""
        place = (tenant_id, key)
        looking = self._looking.get(place)
        # A finished task stays here until its callbacks run. Awaiting it does not yield: a caller
        # that polls in a loop would block the event loop.
        if looking is None or looking.done():
            looking = self._looking[place] = asyncio.create_task(self._poll(*place))
            looking.add_done_callback(partial(self._polled, place))
        return await asyncio.shield(looking)

    async def _poll(self, tenant_id: str, key: str) -> KeyState | None:
        await asyncio.sleep(_POLL_S)
        return await self.known(tenant_id, key)

    def _polled(self, place: tuple[str, str], looking: asyncio.Task[KeyState | None]) -> None:
        if self._looking.get(place) is looking:
            del self._looking[place]
        if not looking.cancelled():
            looking.exception()  # retrieved, since all waiters may have left

    def end(self, owner: Owner, http_status: int, content_type: str, answer: bytes) -> None:
        """Store the answer for later requests under the key; returns immediately."""
        if self._pending_bytes + len(answer) > MOST_PENDING_BYTES:
            self._owned.pop(owner.request_id, None)
            log.warning(Log.STORE_AWAY, detail="too many answers wait to be stored", dropped=1)
            return
        answered = {
            "http_status": http_status,
            "content_type": content_type,
            "answer": answer,
        }
        self._settle(owner, ANSWER, owner.row() | answered, len(answer))

    def free(self, owner: Owner) -> None:
        """Free the key for the next request; returns immediately."""
        self._settle(owner, FREE, owner.row(), 0)

    def _settle(self, owner: Owner, op: str, row: Json, size_bytes: int) -> None:
        self._pending_bytes += size_bytes
        self._keep(entry_of(op, row)).add_done_callback(partial(self._settled, owner, size_bytes))

    def _settled(self, owner: Owner, size_bytes: int, writing: asyncio.Task[bool]) -> None:
        self._pending_bytes -= size_bytes
        failed = writing.cancelled() or writing.exception() is not None
        if failed:
            log.warning(Log.STORE_AWAY, detail="an answer under a key was lost: the key lapses")
        if failed or writing.result():
            self._owned.pop(owner.request_id, None)
        # Otherwise it is on disk: the key is renewed until a renewal finds that it was stored.

    # Liveness

    def _judged_ms(self) -> int | None:
        return self.lease_ms if self._steadiness.may_judge else None

    async def _renew_often(self) -> None:
        while True:
            pause_s = self.lease_ms / 3_000
            try:
                await self._renew()
            except StoreUnavailable:
                self._steadiness.missed()
                pause_s = min(pause_s, _RETRY_S)  # others count from the last successful one
            await asyncio.sleep(pause_s)

    async def _renew(self) -> None:
        sent_at = self._steadiness.clock()
        owned = sorted(self._owned.values(), key=lambda one: (one.tenant_id, one.key))
        found = await self._connections.rows(
            "renew_native_keys",
            [owner.tenant_id for owner in owned],
            [owner.key for owner in owned],
            [owner.request_id for owner in owned],
            timeout_ms=max(self.lease_ms // 3, 100),
        )
        renewed = {row["request_id"].int for row in found}
        self._steadiness.beaten(sent_at)
        for owner in owned:
            if owner.request_id.int not in renewed:  # ended, erased, or taken by another request
                self._owned.pop(owner.request_id, None)


async def take_key(
    connection: asyncpg.Connection,
    tenant_id: str,
    requested: Idempotency,
    request_id: UUID,
    *,
    lease_ms: int | None = None,
) -> Taken | KeyState:
    """Take a key as `NativeKeys.take` does, in the transaction of its purpose. A concurrent caller
    waits for the end of that transaction. lease_ms: how long a key may go without a renewal; None
    leaves every key with its owner."""
    row = await connection.fetchrow(
        sql("take_native_key"),
        tenant_id,
        requested.key,
        bytes.fromhex(requested.digest),
        request_id,
        _seconds(lease_ms),
    )
    if row is not None:
        return record_of(Taken, row)
    known = await known_key(connection, tenant_id, requested.key)
    if known is None:  # it became a day old, or was freed, between the two statements
        return await take_key(connection, tenant_id, requested, request_id, lease_ms=lease_ms)
    if known.request_id == request_id:  # taken by an attempt whose reply was lost
        return Taken(known.lost)
    return known


async def known_key(
    connection: asyncpg.Connection, tenant_id: str, key: str, *, lease_ms: int | None = None
) -> KeyState | None:
    """Return the state of a key without changing it."""
    row = await connection.fetchrow(sql("get_native_key"), tenant_id, key, _seconds(lease_ms))
    if row is None:
        return None
    return record_of(
        KeyState,
        row,
        digest=row["digest"].hex(),
        http_status=row["http_status"] or 0,
        content_type=row["content_type"] or "",
        answer=row["answer"] if row["ended"] else None,
    )


async def end_key(
    connection: asyncpg.Connection, tenant_id: str, key: str, state: KeyState
) -> None:
    """Store the answer, in the transaction of the key's purpose."""
    await connection.execute(
        sql("end_native_key"),
        tenant_id,
        key,
        state.request_id,
        state.http_status,
        state.content_type,
        state.answer,
    )


async def settle_keys(connection: asyncpg.Connection, entries: Sequence[Json]) -> None:
    """Write the entries of `NativeKeys`. Harmless to repeat: a key that another request has taken
    is left alone. An answer from disk is in base64."""
    ended: list[Json] = []
    for row in (entry["row"] for entry in entries if entry["op"] == ANSWER):
        answer = row["answer"]
        if isinstance(answer, bytes) and len(answer) > _LARGE_BYTES:
            # Written alone: base64 and JSON of it would block the event loop for 80 ms.
            how = row["http_status"], row["content_type"], answer
            owner = row["tenant_id"], row["idempotency_key"], row["id"]
            await connection.execute(sql("end_native_key"), *owner, *how)
            continue
        is_raw = isinstance(answer, bytes)
        ended.append(row | {"answer": b64encode(answer).decode()} if is_raw else row)
    freed = [entry["row"] for entry in entries if entry["op"] == FREE]
    for name, found in (("end_native_keys", ended), ("free_native_keys", freed)):
        if found:
            await connection.execute(sql(name), dumps(found))


def _seconds(lease_ms: int | None) -> float | None:
    return None if lease_ms is None else lease_ms / 1000
