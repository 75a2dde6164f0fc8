"""Views of a pool: snapshot of the whole pool, local state, and observer callbacks.

A snapshot asks Valkey; the local state is read without I/O. Observers run on the event loop and
must not block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.limiter.messages import InspectReply, lane_of
from tidegate.limiter.session import State


@dataclass(frozen=True, slots=True)
class LimitView:
    """One limit over all processes. `used` counts permits held, `lapsing` included, or what is
    spent of a rate. `waiting` are the tickets that this limit holds up. `current` is the bound that
    an adaptive limit has found. `room_in_ms`: when only time frees it, in how long. `reserved`: of
    `used`, the estimates of calls that have not ended. `cost_ms`: how long its last calls took on
    average, 0 while none has ended."""

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


@dataclass(frozen=True, slots=True)
class SessionView:
    """A process in the pool. `blocked`: it takes no grants, being paused or unreachable."""

    sid: str
    name: str
    left_ms: int
    held: int
    blocked: bool


@dataclass(frozen=True, slots=True)
class TenantView:
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
    """What one process has waiting of one flow, and the limit that holds its first ticket up; None
    while the process takes no grants."""

    sid: str
    process: str
    band: int
    tenant: str
    limits: tuple[str, ...]
    held_up_by: str | None
    waiting: int
    first_ticket: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool as Valkey sees it. `recovering_ms` is the quiet time left after a loss."""

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


# A rate is measured over this time at most and at least; it counts alone from the third on.
MEASURED_MS, LEAST_MEASURED_MS, TRUSTED_MS = 30_000, 3_000, 20_000
_UNITS = 100_000  # of virtual time in a ms of use by a tenant of weight 1


@dataclass(frozen=True, slots=True)
class WaitEstimate:
    """How long the next admission of a waiter takes, about.

    wait_ms: None where nothing is known. ahead: calls of all tenants that come before, about.
    rate_per_s: how many calls a second the limit has admitted lately, or admits by the time that
    its calls take; None of rates. is_certain: the time is that of a window, a quota or a pause, and
    not an estimate from the time that calls take.
    """

    wait_ms: int | None
    ahead: int
    rate_per_s: float | None = None
    is_certain: bool = False


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """The waiters of one tenant and band at a limit, and what decides when they are admitted.

    Virtual time is that of start-time fair queueing (`lua/lib/queues.lua`): `tag` is where the
    tenant's next call starts, `virtual` where the band is. samples: (ms, virtual time, cost_ms) of
    the time in which calls have waited without a break. rivals: (tag, weight, waiting) of the other
    tenants of the band; above: calls that wait in higher bands. free: when a rate gets back how
    much. even, pace: of a smoothed rate, in microseconds. amount: what a call takes on average.
    """

    now_ms: int
    sort: str
    bound: int
    span: int
    virtual: int
    tag: int
    weight: int
    cost_ms: int
    paused_ms: int
    share: int
    waiting: int
    rivals: list[tuple[int, int, int]]
    above: int
    samples: list[tuple[int, int, int]]
    free: list[tuple[int, int]]
    even: int
    pace: int
    amount: int

    def estimate(self, ahead: int, cost_ms: float = 0, amount: int | None = None) -> WaitEstimate:
        """For a call with `ahead` calls of its own tenant before it. cost_ms: how long calls take,
        where the limit does not know; amount: what it takes of a rate."""
        usual_ms = self._usual_ms() or cost_ms
        distance = self.tag - self.virtual + ahead * usual_ms * _UNITS / self.weight
        others = sum(self._before(distance, *rival, usual_ms) for rival in self.rivals)
        before = ahead + others + self.above
        if self.sort != "c":
            return self._of_rate(before, self.amount if amount is None else amount)
        if self.bound <= 0 or usual_ms <= 0:
            wait_ms = self.paused_ms or None
            return WaitEstimate(wait_ms, before, is_certain=self.paused_ms > 0)
        own = usual_ms * _UNITS / self.weight
        weights = self.weight + sum(weight for _, weight, _ in self.rivals)
        speed = self.bound * _UNITS / weights
        measured = self._speed(MEASURED_MS)
        if measured is not None:
            known = min(1.0, measured[1] / TRUSTED_MS) if not self.above else 1.0
            speed = known * measured[0] + (1 - known) * speed
        elif self.above:
            return self._behind_others(ahead + others, usual_ms)
        rate = 1000 * speed / own * (before + 1) / (ahead + 1)
        waits_ms = (max(0.0, distance) + own / 2) / speed
        return WaitEstimate(round(max(waits_ms, self.paused_ms)), before, rate)

    def _behind_others(self, before: int, usual_ms: float) -> WaitEstimate:
        """Behind higher bands, not measured yet: after them, or by the band's least share."""
        rate = self.bound * 1000 / usual_ms
        first = before + self.above + 1
        slots = min(first, (before + 1) * 1000 / self.share) if self.share else first
        wait_ms = slots * 1000 / rate
        return WaitEstimate(round(max(wait_ms, self.paused_ms)), before + self.above, rate)

    def _usual_ms(self) -> float:
        """How long calls take: the mean over the samples moves less than the last value."""
        recent = [cost for at, _, cost in self.samples if self.now_ms - at <= 2 * MEASURED_MS]
        known = [cost for cost in recent if cost > 0]
        return sum(known) / len(known) if known else self.cost_ms

    def _speed(self, longest_ms: float) -> tuple[float, float] | None:
        """Virtual time per ms of late, and over how many ms; None where it was not measured."""
        aged = ((self.now_ms - at, virtual) for at, virtual, _ in self.samples)
        usable = [one for one in aged if LEAST_MEASURED_MS <= one[0] <= longest_ms]
        if not usable:
            return None
        age_ms, virtual = max(usable)
        return ((self.virtual - virtual) / age_ms, age_ms) if self.virtual > virtual else None

    def _before(self, distance: float, tag: int, weight: int, waiting: int, usual_ms: float) -> int:
        """How many calls of another tenant are admitted before ours. One that has several waiting
        goes on asking; a single call may have been the only one."""
        gap = distance - (tag - self.virtual)
        if gap < 0 or not waiting:
            return 0
        if usual_ms <= 0:
            return waiting
        count = 1 + int(gap * weight / (usual_ms * _UNITS))
        return min(count, waiting) if waiting == 1 else count

    def _of_rate(self, before: int, amount: int) -> WaitEstimate:
        """By the window, the pace and the reset of a rate or a day quota."""
        total = before * self.amount + amount
        if self.above and self.share:
            total = min(total, round((total - self.above * self.amount) * 1000 / self.share))
        at = self._window_ms(total)
        if self.pace > 0 and self.bound > 0:
            each = self.span * 1000 / self.bound
            at = max(at, (self.even - self.pace + total * each) / 1000 - self.now_ms)
        return WaitEstimate(round(max(0.0, at, self.paused_ms)), before, None, is_certain=True)

    def _window_ms(self, total: int) -> float:
        """When so much more fits. What is admitted into a part of the window that became free
        becomes free again a window later."""
        if self.bound <= 0:
            return self.span
        used = sum(amount for _, amount in self.free)
        over = total - max(0, self.bound - used)
        if over <= 0:
            return 0.0
        windows, over = divmod(over - 1, self.bound)
        over += 1
        for at, amount in self.free:
            over -= amount
            if over <= 0:
                return at - self.now_ms + windows * self.span
        # The rest was free before: it is spent now, and becomes free a window from now.
        return (windows + 1) * self.span


@dataclass(frozen=True, slots=True)
class Place:
    """How far from its turn a waiting ticket is.

    held_up_by: the limit that it waits for; None while its process takes no grants. ahead: tickets
    of its tenant before it; ahead_of_all: of all tenants, about. wait_ms: an estimate of the time
    left, None where nothing is known; is_certain: it is that of a window, a quota or a pause.
    rate_per_s: how many calls the limit admits, where that is known. paused_ms and paused_by: when
    that limit is paused.
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


@dataclass(frozen=True, slots=True)
class Why:
    """Why a ticket waits: its place, the limit that holds it up, and who has that limit."""

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
    """What of one flow waits in this process, and for how long its first."""

    band: int
    tenant: str
    limits: tuple[str, ...]
    waiting: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class LocalState:
    """This process alone. `held` and `waiting` count by limit, and are 0 for one that has none.
    `silent_ms` since Valkey last confirmed our session; inf for never."""

    state: State
    held: Counter[str]
    waiting: Counter[str]
    silent_ms: float
    sessions: int
    revision: int
    permits: int
    waiters: int


def read_snapshot(reply: InspectReply, state: State) -> Snapshot:
    """The answer of `inspect` as a snapshot."""
    names = {row[0]: row[1] for row in reply.sessions}
    return Snapshot(
        limits={row[0]: LimitView(*row[:13]) for row in sorted(reply.limits)},
        sessions=sum(row[2] > 0 for row in reply.sessions),
        epoch=reply.epoch,
        revision=reply.revision,
        recovering_ms=reply.recovering_ms,
        state=state,
        processes=tuple(
            SessionView(sid, name, left_ms, held, bool(blocked))
            for sid, name, left_ms, held, blocked, *_ in reply.sessions
        ),
        tenants=tuple(TenantView(*row[:3]) for row in sorted(reply.tenants)),
        queues=tuple(_queue(row, names) for row in reply.queues),
        permits=tuple(_permit(row, names) for row in sorted(reply.permits)),
    )


def _flow(flow: str) -> tuple[int, str, tuple[str, ...]]:
    band, tenant, _ = flow.split("|", 2)
    return int(band), tenant, tuple(lane_of(flow).split(" "))


def _queue(row: list[Any], names: Mapping[str, str]) -> QueueView:
    sid, flow, at, waiting, _stamp, member, *_ = row
    first = int(member.split("|")[0]) if member else 0
    return QueueView(
        sid, names.get(sid, ""), *_flow(flow), at if at != "!" else None, waiting, first
    )


def _permit(row: list[Any], names: Mapping[str, str]) -> PermitView:
    sid, ticket, seq, left_ms, flow, *_ = row
    return PermitView(sid, names.get(sid, ""), ticket, seq, left_ms, *_flow(flow))


def read_line(values: list[Any]) -> WaitingLine:
    """The line in an answer of `position`."""
    return WaitingLine(*values[:18])


def read_place(values: list[Any]) -> Place | None:
    """The answer of `position` on a ticket; None for one that does not wait."""
    found, *rest = values
    if not found:
        return None
    flow, at, ahead, amount, cost_ms, said, raw, *_ = rest
    band, tenant, limits = _flow(flow)
    ahead = int(ahead)
    if not at:
        return Place(tenant, band, limits, None, ahead, None, ahead_of_all=ahead)
    line = read_line(raw)
    told = line.estimate(ahead, cost_ms, amount)
    return Place(
        tenant,
        band,
        limits,
        at,
        ahead,
        told.wait_ms,
        line.paused_ms,
        said,
        told.ahead,
        told.is_certain,
        told.rate_per_s,
    )
