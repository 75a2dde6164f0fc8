"""Engine of the limiter without a server: for rehearsals, benchmarks and tests.

It exports the executable model of a pool, the session and the queue of a process, and the messages
between them. `MemoryConnection`, for `memory://` URLs, answers the commands of a server by the
model, in the memory of this process.

Invariants: the product itself imports this module only for a `memory://` URL; a pool in memory
lives as long as a limiter of it is open; unlike the names of `tidegate.limiter`, what this module
exports may change with any version.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import RLock
from typing import Any, get_args
from uuid import uuid4
from weakref import WeakValueDictionary

import hiredis
import msgpack
from redis.exceptions import NoScriptError, ResponseError

from tidegate.limiter.connection import (
    FLAT,
    LINGER_HURRIED_S,
    LINGER_IDLE_S,
    LINGER_S,
    pack_request,
    unpack_reply,
)
from tidegate.limiter.flow import Flow, Holding, MessageBatch, Waiter, flow_of
from tidegate.limiter.limiter import MAX_WAITERS
from tidegate.limiter.messages import (
    Barred,
    InspectReply,
    Join,
    Keyspace,
    Push,
    Renewal,
    RenewReply,
    ScriptName,
    SyncReply,
    SyncRequest,
    fragment,
    load,
    pack,
)
from tidegate.limiter.model.pool import PoolModel
from tidegate.limiter.model.queues import BEHIND
from tidegate.limiter.model.rates import DAY_MS, Pacing, RateSpending, span_of
from tidegate.limiter.model.state import (
    BLOCKED,
    DUE_APART_MS,
    BandState,
    DueOrder,
    LimitState,
    Paces,
    PauseGate,
    SessionQueue,
    SessionState,
    read_actual,
    read_flow,
    read_member,
    write_charges,
)
from tidegate.limiter.permit import PermitIssuer
from tidegate.limiter.policy import LEAST_USE, PoolPolicy, Quota, amount_of
from tidegate.limiter.queue import LocalQueue
from tidegate.limiter.session import Clock, Lease, Session
from tidegate.limiter.views import Snapshot, SnapshotParts, read_place

__all__ = [
    "BEHIND",
    "BLOCKED",
    "DAY_MS",
    "DUE_APART_MS",
    "LEAST_USE",
    "LINGER_HURRIED_S",
    "LINGER_IDLE_S",
    "LINGER_S",
    "MAX_WAITERS",
    "BandState",
    "Barred",
    "Clock",
    "DueOrder",
    "Flow",
    "Holding",
    "Join",
    "Keyspace",
    "Lease",
    "LimitState",
    "LocalQueue",
    "MemoryConnection",
    "MemoryThreadConnection",
    "MessageBatch",
    "Paces",
    "Pacing",
    "PauseGate",
    "PermitIssuer",
    "PoolModel",
    "Push",
    "RateSpending",
    "RenewReply",
    "Renewal",
    "ScriptName",
    "Session",
    "SessionQueue",
    "SessionState",
    "SyncReply",
    "SyncRequest",
    "Waiter",
    "amount_of",
    "flow_of",
    "fragment",
    "load",
    "pack",
    "pack_request",
    "read_actual",
    "read_flow",
    "read_member",
    "read_place",
    "snapshot_of",
    "span_of",
    "unpack_reply",
    "write_charges",
]


# Number of entries of each name in FLAT per row.
_WIDTHS = dict(zip(FLAT, (8, 5, 2, 2, 3), strict=True))
# Numeric fields of a request, which are left out if they are 0.
_NUMBERS = ("gen", "epoch", "uptime_ms", "lease_ms", "revision", "batch")
# For bytes that were packed as text.
_LOSSLESS = "surrogateescape"
_HISTORY = 100
# The server has been up so long that no earlier session can still hold a permit.
_UPTIME_S = 86_400
_SCRIPTS = {load(name).sha: name for name in get_args(ScriptName)}


def unpack_request(raw: bytes) -> SyncRequest:
    """Return a packed request: the inverse of `pack_request`."""
    values: dict[str, Any] = {**dict.fromkeys(_NUMBERS, 0), "run": ""}
    values |= msgpack.unpackb(raw, unicode_errors=_LOSSLESS)
    for name, width in _WIDTHS.items():
        row = values.get(name, [])
        if row:
            values[name] = [tuple(row[at : at + width]) for at in range(0, len(row), width)]
    join = values.get("join")
    if join is not None:
        policy = join["policy"]
        blob = policy["blob"].encode("utf-8", _LOSSLESS)
        values["join"] = Join(
            PoolPolicy.unpack(blob),
            policy["by"],
            join["name"],
            *(join[name] for name in ("held", "lapsing", "spent", "pauses", "roster", "own")),
        )
    return SyncRequest(**values)


def pack_reply(reply: SyncReply) -> bytes:
    """Return a reply as bytes: the inverse of `unpack_reply`."""
    whole = reply.whole
    if whole is not None:
        version, sids = whole.roster
        roster = (version, False if sids is None else sids)
        whole = whole._replace(roster=roster)  # type: ignore[arg-type]
    return bytes(msgpack.packb([*reply[:15], whole, *reply[16:]]))


class _MemoryPool:
    """One pool: its model, past policies, notes and subscribers. Used under `lock`."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.run = uuid4().hex
        self.model = PoolModel()
        self.history: list[bytes] = []
        self.listeners: dict[str, _Caller] = {}
        self._notes: dict[str, tuple[int, bytes]] = {}
        self._claims: dict[str, int] = {}

    def execute(self, script: str, packed: bytes) -> bytes:
        """Return the reply of a script. Raises ResponseError for a request that no model
        answers.
        """
        wall = time.time_ns() // 1_000_000
        with self.lock:
            if script in ("sync", "tend"):
                reply = self._exchange(unpack_request(packed), wall, tend=script == "tend")
            else:
                request = msgpack.unpackb(packed, unicode_errors=_LOSSLESS)
                reply = pack(_ANSWERS[script](self, request, wall))
            pushed = list(self.model.pool.pushed)
            self.model.pool.pushed.clear()
            for sid, push in pushed:
                if sid in self.listeners:
                    self.listeners[sid].deliver([b"smessage", b"", pack(push)])
        return reply

    def _exchange(self, request: SyncRequest, wall: int, *, tend: bool) -> bytes:
        before = self.model.pool.revision
        reply = (self.model.tend if tend else self.model.sync)(request, wall)
        policy = self.model.pool.policy
        if policy is not None and request.join is not None and policy.revision > before:
            row = [policy.revision, self.model.pool.now, request.join.by, policy.pack()]
            self.history = [pack(row), *self.history][:_HISTORY]
        return pack_reply(reply)

    def renew(self, request: dict[str, Any], wall: int) -> list[Any]:
        return list(self.model.renew(Renewal(**request), wall))

    def position(self, request: dict[str, Any], wall: int) -> list[Any]:
        if not request["sid"]:
            raise ResponseError("memory:// has the places of tickets only")
        return self.model.position(request["sid"], int(request["ticket"]), wall)

    def admin(self, request: dict[str, Any], wall: int) -> list[int]:
        now, limit, model = (
            {"run": request["run"], "wall": wall},
            request.get("limit", ""),
            self.model,
        )
        match request["verb"]:
            case "pause":
                args = request["for_ms"], request["ramp_ms"], request["said"]
                done = model.pause(limit, *args, **now)
            case "resume":
                done = model.resume(limit, **now)
            case "close":
                args = request["for_ms"], request["most_ms"], request["said"]
                done = model.close(limit, *args, tried=request["tried"], **now)
            case "open":
                done = model.open(limit, request["ramp_ms"], **now)
            case "charge":
                how = {name: request[name] for name in ("evenly", "bound", "recorded")}
                done = model.charge(limit, request["amount"], **how, **now)
            case "hold":
                lane = tuple(request["lane"].split(" "))
                held = request["sid"], lane, request["amounts"], request["for_ms"]
                done = model.hold(*held, **now)
            case verb:
                assert verb == "revoke", verb
                done = model.revoke(request["sid"], **now)
        return [done]

    def _notes_of(self, most: int, wall: int) -> list[list[Any]]:
        sessions = sorted(self.model.pool.sessions.items(), key=lambda one: (one[1].expiry, one[0]))
        rows = [(sid, self._notes.get(sid, (0, b""))) for sid, _ in sessions[-most:]]
        return [[sid, note] for sid, (until, note) in rows if until > wall]

    def notes(self, request: dict[str, Any], wall: int) -> list[Any]:
        until, claim = wall + request["keep_ms"], request["claim"]
        if claim:
            is_first = self._claims.get(claim, 0) <= wall
            if is_first:
                self._claims[claim] = until
            return [int(is_first)]
        if request["note"]:
            self._notes[request["sid"]] = until, request["note"].encode("utf-8", _LOSSLESS)
            return []
        return self._notes_of(request["most"], wall)

    def inspect(self, request: dict[str, Any], wall: int) -> list[Any]:
        model, pool = self.model, self.model.pool
        pool.now, pool.resets = max(wall, model.clock), {}
        queues = [one for session in pool.sessions.values() for one in session.queues.values()]
        tenants = {name: pool.waiting(name) for name in list(pool.queues_of)}
        return [
            *(pool.now, pool.epoch, max(0, pool.recover_until - pool.now), pool.revision),
            *(pool.parked, pool.seq),
            [
                [
                    *(sid, one.name, one.expiry - pool.now, len(one.held)),
                    *(int(one.blocked), one.revision),
                ]
                for sid, one in pool.sessions.items()
            ],
            _limits(model, request.get("since", {})),
            [[name, waits, pool.weight(name)] for name, waits in tenants.items() if waits],
            [
                [sid, ticket, held.seq, held.until - pool.now, held.flow]
                for sid, session in pool.sessions.items()
                for ticket, held in session.held.items()
                if request["permits"]
            ],
            list(map(_queue_row, queues)),
            *([], False),
        ]


def _limits(model: PoolModel, since: Mapping[str, int]) -> list[list[Any]]:
    pool, capacity = model.pool, model.capacity
    waiting: Counter[str] = Counter()
    reserved: Counter[str] = Counter()
    for session in pool.sessions.values():
        for queue in session.queues.values():
            waiting[queue.at or ""] += len(queue.tickets)
        for held in session.held.values():
            lane = read_flow(held.flow).lane
            reserved.update({lane[at]: amount for at, (amount, _) in held.charges.items()})
    lapsing = Counter(name for one in model.permits.lapsing for name in one.lane.split(" "))
    rows = []
    for name, one in sorted(pool.limits.items()):
        pause, rule = pool.pause_of(one), one.limit
        if not one.is_named and not (pause or one.used or waiting[name]):
            continue
        paused_ms = max(int(pause.gate is not None), pause.until - pool.now) if pause else 0
        room_at = model.pump.timed.get(name, 0)
        if one.is_rate and not rule.shadow:
            room_at = max(room_at, capacity.free_at(one, 1))
        recent: int | bool = False
        if one.is_rate and name in since:
            recent = one.spending.taken_since(rule, pool.now - since[name])
        rows.append(
            [
                *(name, "q" if isinstance(rule, Quota) else "r" if one.is_rate else "c"),
                *(rule.bound, capacity.spent(one) if one.is_rate else one.used),
                *(waiting[name], lapsing[name]),
                rule.bound if one.current is None else one.current // 1000,
                *(one.shadowed, paused_ms, pause.reason if pause else ""),
                *(max(0, room_at - pool.now), reserved[name], one.cost_ms),
                one.spending.taken(rule, pool.now) if one.is_rate else 0,
                *(int(rule.shadow), recent),
            ]
        )
    return rows


def _queue_row(queue: SessionQueue) -> list[Any]:
    member, stamp = queue.first()
    at = "!" if queue.at == BLOCKED else queue.at
    last = next(reversed(queue.tickets))
    return [queue.sid, queue.key, at, len(queue.tickets), stamp, member, last]


def snapshot_of(model: PoolModel, wall: int, most_band: int) -> Snapshot:
    """Return the queues of a pool in bands up to `most_band`, and its limits if any of these
    waits.
    """
    pool = model.pool
    queues = [
        queue
        for session in pool.sessions.values()
        for queue in session.queues.values()
        if queue.flow.band <= most_band
    ]
    parts = SnapshotParts()
    limits: list[Any] = []
    if queues:
        pool.now, pool.resets = max(wall, model.clock), {}
        limits = _limits(model, {})
    rows = list(map(_queue_row, queues))
    parts.add(InspectReply(pool.now, pool.epoch, 0, 0, 0, 0, [], limits, [], [], rows, [], None))
    return parts.snapshot("up")


_ANSWERS: dict[str, Callable[[_MemoryPool, dict[str, Any], int], list[Any]]] = {
    "renew": _MemoryPool.renew,
    "position": _MemoryPool.position,
    "admin": _MemoryPool.admin,
    "notes": _MemoryPool.notes,
    "inspect": _MemoryPool.inspect,
}
_POOLS: WeakValueDictionary[tuple[str, str], _MemoryPool] = WeakValueDictionary()
_POOLS_LOCK = RLock()


def _pool_of(url: str, key: str) -> _MemoryPool:
    """Return the pool of a key; a new one if no connection has it open."""
    named = url, key.partition("}")[0]
    with _POOLS_LOCK:
        pool = _POOLS.get(named)
        if pool is None:
            pool = _POOLS[named] = _MemoryPool()
        return pool


class _Caller:
    """One connection to the pool of `key` at a `memory://` URL.

    `deliver` gets replies and published messages, from any thread.
    """

    def __init__(self, url: str, key: str, deliver: Callable[[Any], None]) -> None:
        self._pool: _MemoryPool | None = _pool_of(url, key)
        self._sid = ""
        self.deliver = deliver

    def ask(self, command: list[bytes]) -> None:
        """Execute a command; its reply or error is delivered."""
        try:
            self.deliver(self._answer(command))
        except ResponseError as error:
            self.deliver(error)

    def _answer(self, command: list[bytes]) -> Any:
        assert self._pool is not None
        match command:
            case [b"INFO", *_]:
                return f"run_id:{self._pool.run}\nuptime_in_seconds:{_UPTIME_S}".encode()
            case [b"PING"]:
                return b"PONG"
            case [b"EVALSHA", sha, _, *rest] if sha.decode() in _SCRIPTS:
                return self._pool.execute(_SCRIPTS[sha.decode()], rest[-1])
            case [b"EVALSHA", *_]:
                raise NoScriptError("memory:// knows the scripts of the product only")
            case [b"LRANGE", key, *_] if key.endswith(b"history"):
                with self._pool.lock:
                    return list(self._pool.history)
            case [b"SSUBSCRIBE", channel]:
                self._listen(channel.decode().rpartition(":")[2])
                return [b"ssubscribe", channel, 1]
        raise ResponseError(f"memory:// does not know {command[0].decode()}")

    def _listen(self, sid: str) -> None:
        assert self._pool is not None
        with self._pool.lock:
            self._sid = sid
            self._pool.listeners[sid] = self
            self._pool.model.pool.subscribed.add(sid)

    def close(self) -> None:
        """Leave the pool, which ends with its last connection."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        with pool.lock:
            if pool.listeners.get(self._sid) is self:
                del pool.listeners[self._sid]
                pool.model.pool.subscribed.discard(self._sid)


class MemoryConnection:
    """A connection in memory for an event loop, with the methods of redis-py's that are used."""

    def __init__(self, url: str, key: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._caller = _Caller(url, key, self._deliver)

    def _deliver(self, answer: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)

    async def send_packed_command(self, packed: bytes, check_health: bool = True) -> None:
        reader = hiredis.Reader()
        reader.feed(packed)
        self._caller.ask(reader.gets())

    async def send_command(self, *command: str, check_health: bool = True) -> None:
        self._caller.ask([word.encode() for word in command])

    async def read_response(self) -> Any:
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _close(self) -> None:
        self._caller.close()


class MemoryThreadConnection:
    """A connection in memory for a thread."""

    def __init__(self, url: str, key: str) -> None:
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._caller = _Caller(url, key, self._answers.put)

    def send_command(self, *command: Any, check_health: bool = True) -> None:
        words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
        self._caller.ask(words)

    def read_response(self) -> Any:
        answer = self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def disconnect(self) -> None:
        self._caller.close()
