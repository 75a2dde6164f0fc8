"""Views of a pool: snapshot of the whole pool, local state, and which calls give way.

A snapshot is read from Valkey by a function that is passed; the local state needs no I/O.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Reversible, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tidegate.limiter.estimates import read_line
from tidegate.limiter.messages import InspectReply, lane_of, pack
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.session import State


@dataclass(frozen=True, slots=True)
class LimitView:
    """One limit over all processes.

    used: permits held, including `lapsing` ones, or what is spent of a rate. waiting: the tickets
    that this limit blocks. current: the bound that an adaptive limit has found. room_in_ms: time
    until there is room, if only time frees it. reserved: the estimates of calls that have not
    ended, contained in `used`. cost_ms: the average duration of its last calls, 0 before the first
    has ended. taken: of a bucket, what was taken in its last window, which may exceed `used`; of
    any other rate the same as `used`. shadow: it delays no call except by a pause. lately: what was
    taken of a rate since the requested time; None if none was requested.
    """

    limit: str
    sort: str
    bound: int
    used: int
    waiting: int
    lapsing: int
    current: int
    shadowed: int
    paused_ms: int
    paused_by: str
    room_in_ms: int
    reserved: int = 0
    cost_ms: int = 0
    taken: int = 0
    shadow: bool = False
    lately: int | None = None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A process in the pool.

    blocked: it takes no grants, because it is paused or unreachable. revision: of the policy that
    it has; 0 if unknown, as for one of an older version.
    """

    sid: str
    name: str
    left_ms: int
    held: int
    blocked: bool
    revision: int = 0


@dataclass(frozen=True, slots=True)
class TenantView:
    """A waiting tenant."""

    tenant: str
    waiting: int
    weight: int


@dataclass(frozen=True, slots=True)
class PermitView:
    """A permit in use. `left_ms` is the time to its call's hard deadline."""

    sid: str
    process: str
    ticket: int
    seq: int
    left_ms: int
    band: int
    tenant: str
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueueView:
    """The waiters of one flow in one process.

    held_up_by: the limit that blocks the first ticket; None while the process takes no grants.
    Tickets are numbered per process in order of arrival.
    """

    sid: str
    process: str
    band: int
    tenant: str
    limits: tuple[str, ...]
    held_up_by: str | None
    waiting: int
    first_ticket: int
    last_ticket: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool as Valkey has it. `recovering_ms`: the rest of the quiet time after a loss."""

    limits: Mapping[str, LimitView]
    sessions: int
    epoch: int
    revision: int
    recovering_ms: int
    state: State
    processes: tuple[SessionView, ...] = ()
    tenants: tuple[TenantView, ...] = ()
    queues: tuple[QueueView, ...] = ()
    permits: tuple[PermitView, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """How far a waiting ticket is from its admission.

    held_up_by: the limit that it waits for; None while its process takes no grants. ahead: tickets
    of its tenant before it. ahead_of_all: the approximate number of tickets of all tenants.
    wait_ms: an estimate of the time left, None if unknown. is_certain: it is that of a window, a
    quota or a pause. rate_per_s: how many calls the limit admits, if known. paused_ms, paused_by:
    the pause of that limit. stalled_ms: see `WaitEstimate`.
    """

    tenant: str
    band: int
    limits: tuple[str, ...]
    held_up_by: str | None
    ahead: int
    wait_ms: int | None
    paused_ms: int = 0
    paused_by: str = ""
    ahead_of_all: int = 0
    is_certain: bool = False
    rate_per_s: float | None = None
    stalled_ms: int = 0


@dataclass(frozen=True, slots=True)
class Why:
    """Why a ticket waits: its place, the limit that blocks it, and the holders of that limit."""

    place: Place
    limit: LimitView | None
    holders: tuple[PermitView, ...]


@dataclass(frozen=True, slots=True)
class LocalPermit:
    """A permit that this process holds. `left_ms` is the time to its call's hard deadline."""

    seq: int
    tenant: str
    limits: tuple[str, ...]
    held_ms: int
    waited_ms: int
    left_ms: int


@dataclass(frozen=True, slots=True)
class LocalQueueView:
    """The waiters of one flow in this process, and how long the first has waited."""

    band: int
    tenant: str
    limits: tuple[str, ...]
    waiting: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class LocalState:
    """The state of this process alone.

    held, waiting: counts by limit, 0 for limits without any. silent_ms: time since Valkey last
    confirmed the session; inf for never.
    """

    state: State
    held: Counter[str]
    waiting: Counter[str]
    silent_ms: float
    sessions: int
    revision: int
    permits: int
    waiters: int


async def read_pool(
    run: Callable[[bytes], Awaitable[bytes]],
    state: State,
    *,
    permits: bool = False,
    limits: Sequence[str] | None = None,
    since_ms: Mapping[str, int] | None = None,
) -> Snapshot:
    """Return the pool, from as many runs of `inspect` as necessary; only `limits` if given."""
    request: dict[str, Any] = {"permits": permits, "of": "all" if limits is None else "limits"}
    if limits is not None:
        request["limits"] = list(limits)
    if since_ms:
        request["since"] = dict(since_ms)
    found = SnapshotParts()
    found.add(InspectReply.unpack(await run(pack(request))))
    while (place := found.last.place) is not None:
        found.add(InspectReply.unpack(await run(pack({**request, "place": place}))))
    return found.snapshot(state)


class SnapshotParts:
    """Accumulates the parts of a pool. Repeated rows count once."""

    last: InspectReply

    def __init__(self) -> None:
        self._limits: dict[str, LimitView] = {}
        self._counts: dict[str, list[int]] = {}
        self._sessions: dict[str, list[Any]] = {}
        self._tenants: dict[str, TenantView] = {}
        self._queues: dict[tuple[str, str], list[Any]] = {}
        self._permits: dict[tuple[str, int], list[Any]] = {}

    def add(self, reply: InspectReply) -> None:
        """Add one part of a pool."""
        self.last = reply
        for row in reply.sessions:
            before = self._sessions.setdefault(row[0], row)
            before[3] += row[3] if before is not row else 0
        for name, *numbers in reply.counts:
            known = self._counts.get(name, (0, 0, 0))
            self._counts[name] = [a + b for a, b in zip(known, numbers, strict=True)]
        for row in reply.limits:
            # Counts of waiters and permits have been read completely before any limit.
            waiting, lapsing, reserved = self._counts.get(row[0], row[4:6] + row[11:12])
            figures = [*row[:4], waiting, lapsing, *row[6:11], reserved, *row[12:14]]
            recent = next((each for each in row[15:16] if each is not False), None)
            self._limits[row[0]] = LimitView(*[*figures, bool(row[14]), recent])
        self._tenants |= {row[0]: TenantView(*row[:3]) for row in reply.tenants}
        self._queues |= {(row[0], row[1]): row for row in reply.queues}
        self._permits |= {(row[0], row[1]): row for row in reply.permits}

    def snapshot(self, state: State) -> Snapshot:
        """Return the snapshot, once all parts are added."""
        names = {sid: row[1] for sid, row in self._sessions.items()}
        return Snapshot(
            limits={name: self._limits[name] for name in sorted(self._limits)},
            sessions=sum(row[2] > 0 for row in self._sessions.values()),
            epoch=self.last.epoch,
            revision=self.last.revision,
            recovering_ms=self.last.recovering_ms,
            state=state,
            processes=tuple(
                SessionView(sid, name, left_ms, held, bool(blocked), revision)
                for sid, name, left_ms, held, blocked, revision in self._sessions.values()
            ),
            tenants=tuple(self._tenants[name] for name in sorted(self._tenants)),
            queues=tuple(_queue(row, names) for row in self._queues.values()),
            permits=tuple(_permit(row, names) for _, row in sorted(self._permits.items())),
        )


def _flow(flow: str) -> tuple[int, str, tuple[str, ...]]:
    band, tenant, _ = flow.split("|", 2)
    return int(band), tenant, tuple(lane_of(flow).split(" "))


def _queue(row: list[Any], names: Mapping[str, str]) -> QueueView:
    sid, flow, at, waiting, _stamp, *members = row
    first, last = (int(member.split("|")[0]) if member else 0 for member in members[:2])
    held_up_by = at if at != "!" else None
    return QueueView(sid, names.get(sid, ""), *_flow(flow), held_up_by, waiting, first, last)


def _permit(row: list[Any], names: Mapping[str, str]) -> PermitView:
    sid, ticket, seq, left_ms, flow, *_ = row
    return PermitView(sid, names.get(sid, ""), ticket, seq, left_ms, *_flow(flow))


def read_place(values: list[Any]) -> Place | None:
    """Return the reply of `position` on a ticket; None if it does not wait."""
    found, *rest = values
    if not found:
        return None
    flow, at, ahead, amount, use, reason, raw, *_ = rest
    band, tenant, limits = _flow(flow)
    ahead = int(ahead)
    if not at:
        return Place(tenant, band, limits, None, ahead, None, ahead_of_all=ahead)
    line = read_line(raw)
    # A call's probable use is its duration only if shares are measured in time.
    estimate = line.estimate(ahead, 0 if line.use else use, amount)
    return Place(
        tenant,
        band,
        limits,
        at,
        ahead,
        estimate.wait_ms,
        line.paused_ms,
        reason,
        estimate.ahead,
        estimate.is_certain,
        estimate.rate_per_s,
        estimate.stalled_ms,
    )


_READS = 4  # of a pool, per the time after which calls give way
_LEAST_CLAIM_MS = 500  # longer than from a release to the next admission


class HigherWaits:
    """How long the first tickets of a pool's queues have waited, from its snapshots.

    every_ms: how often to read a snapshot. claim_ms: how long no other call gives way for a ticket.
    """

    MOST_PER_READ = 4

    def __init__(self, after_ms: float) -> None:
        self._after_ms = after_ms
        self.every_ms = after_ms / _READS
        self.claim_ms = round(max(_LEAST_CLAIM_MS, after_ms))
        # By queue: when it was seen, and its last ticket at that time.
        self._seen: dict[tuple[object, ...], deque[tuple[float, int]]] = {}

    def overdue(self, snapshot: Snapshot, now_ms: float) -> list[QueueView]:
        """Return the queues whose first ticket was seen waiting for at least `after_ms`.

        Highest bands first. The ticket need not have been the first one all that time.
        """
        seen: dict[tuple[object, ...], deque[tuple[float, int]]] = {}
        found = []
        for queue in snapshot.queues:
            if queue.held_up_by is None or not queue.waiting:
                continue
            key = (queue.sid, queue.band, queue.tenant, queue.limits)
            marks = seen[key] = self._seen.get(key) or deque()
            marks.append((now_ms, queue.last_ticket))
            while len(marks) > 1 and now_ms - marks[1][0] >= self._after_ms:
                marks.popleft()
            since_ms, last_ticket = marks[0]
            if now_ms - since_ms >= self._after_ms and queue.first_ticket <= last_ticket:
                found.append(queue)
        self._seen = seen
        return sorted(found, key=lambda queue: queue.band)


class Preemptible(Protocol):
    """A call under a permit for `limits`."""

    @property
    def limits(self) -> tuple[str, ...]: ...

    def may_give_way(self, limit: str, band: int) -> bool:
        """Return whether the call may give way to a waiter of `band` at `limit`."""


PreemptibleT = TypeVar("PreemptibleT", bound=Preemptible)


def newest_to_give_way(
    calls: Reversible[PreemptibleT], snapshot: Snapshot, queue: QueueView, policy: PoolPolicy
) -> PreemptibleT | None:
    """Return the newest of `calls` whose end would admit the first ticket of a queue, or None.

    `calls` are ordered from the oldest.
    """
    limit = snapshot.limits.get(str(queue.held_up_by))
    if limit is None or limit.sort != "c" or limit.paused_ms:
        return None
    if limit.used != _cap(limit, queue.band, policy):  # above the cap, more calls would have to end
        return None
    for call in reversed(calls):
        if call.may_give_way(limit.limit, queue.band):
            others = (snapshot.limits.get(one) for one in queue.limits if one not in call.limits)
            if all(other is None or _has_room(other, queue.band, policy) for other in others):
                return call
    return None


def _has_room(limit: LimitView, band: int, policy: PoolPolicy) -> bool:
    if limit.paused_ms:
        return False
    return limit.used < _cap(limit, band, policy) if limit.sort == "c" else not limit.room_in_ms


def _cap(limit: LimitView, band: int, policy: PoolPolicy) -> int:
    """Return up to how many open calls the limit admits one of a band.

    The headroom of higher bands is left out.
    """
    above = sum(round(one.headroom * 1000) for one in policy.bands[: band - 1])
    if not above:
        return limit.current
    return max(min(limit.current, 1), limit.current * (1000 - above) // 1000)
