"""Outlook of waiting calls: the estimated time of admission, and the calls ahead.

Invariant: a call is refused as certain only if no order of events could still admit it in time, as
long as no call leaves the queue, no limit is raised and no pause is ended.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import Any, NamedTuple

from tidegate.limiter.messages import Barred, Outlook
from tidegate.limiter.model.capacity import Capacity
from tidegate.limiter.model.queues import Permits
from tidegate.limiter.model.rates import Pacing, span_of
from tidegate.limiter.model.state import (
    BLOCKED,
    BandState,
    FlowName,
    LimitState,
    Member,
    PoolState,
    SessionQueue,
    read_member,
)
from tidegate.limiter.policy import CALL_USE, Quota, Rate

# A sample is (ms, virtual time, cost_ms).
Sample = tuple[int, int, int]
APART_MS, MOST_SAMPLES = 900, 60
# The shortest time over which a speed is measured.
MEASURED_MS = 3000
# Bounds of one position: queues counted, tenants read, and steps in which a rate gets back what was
# spent; amounts read of all tenants, of its own tenant, and of another one.
MOST_QUEUES, MOST_TENANTS, MOST_STEPS = 300, 500, 120
MOST_AMOUNTS, MOST_OWN, MOST_OF_RIVAL = 1000, 500, 100
# The usage that is reported of a limit that resumes gradually after a pause.
RESUMES = -2
# The most queues and tenants that are checked for coming before a new ticket.
MOST_BEFORE = 50


class Earliest(NamedTuple):
    """When there is room if nothing is returned.

    at: 0 if ending calls make room or it is unknown. used: -1 for a paused limit. firm: whether
    `at` is certain for every call. certain_at: before this there is certainly no room; earlier than
    `at` under a ramp.
    """

    at: int
    used: int
    firm: bool
    certain_at: int


class Before(NamedTuple):
    """How many calls come before one.

    certain, likely: of those that wait. expected: approximate, if current waiters continue to call.
    start: in virtual time.
    """

    certain: int
    likely: int
    expected: int
    start: int

    def elsewhere(self) -> Before:
        """Return the figures for the other limits of its lane."""
        return self._replace(likely=0, expected=self.certain)


class Late(NamedTuple):
    """The time at which a limit has room for a ticket, which is too late."""

    at: int
    limit: str
    used: int
    ahead: int
    is_estimate: int


def line_of(band: BandState, tenant: str) -> list[SessionQueue]:
    """Return the queues of a tenant by the age of their first tickets."""
    queues = (queue for queue in band.lines.get(tenant, {}).values() if queue.tickets)
    return sorted(queues, key=lambda queue: (queue.first()[1], queue.id))


def parked_at(band: BandState) -> list[str]:
    """Return the waiting tenants in the order of their turns."""
    return sorted(band.lines, key=lambda name: (band.tags[name], name))


def is_close(wait_ms: int, left_ms: int) -> bool:
    """Return whether an estimated wait is too close to the time left to refuse a call by it."""
    return 2 * wait_ms <= 3 * left_ms + 2000


@dataclass(eq=False, repr=False)
class Outlooks:
    """When there will be room. Lua: `outlook` and `progress`.

    waited: queues whose session may want to know what they wait for, by the number of their flow.
    progress: by limit and band, samples of admissions while calls waited. All other fields belong
    to one call.
    """

    pool: PoolState
    capacity: Capacity
    permits: Permits
    firm: frozenset[str] = field(default_factory=frozenset)
    barred: list[Barred] = field(default_factory=list)
    waited: dict[int, SessionQueue] = field(default_factory=dict)
    progress: defaultdict[tuple[str, int], list[Sample]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def _is_firm(self, limit: LimitState) -> bool:
        """Return whether nothing is returned: true for requests.

        Under other units a call may have reserved more than it uses.
        """
        exact = isinstance(limit.limit, Rate) and limit.limit.exact
        return exact or (limit.is_rate and limit.name in self.firm)

    def _earliest(self, limit: LimitState, amount: int) -> Earliest:
        pause, at, used, certain_at = self.pool.pause_of(limit), 0, limit.used, 0
        if limit.is_rate:
            used, at = self.capacity.spent(limit), self.capacity.free_at(limit, amount)
            certain_at = self.capacity.certain_at(limit, amount, at)
        if limit.limit.shadow:
            at = 0
        paused_at = pause.until if pause and pause.until > self.pool.now else 0
        if at > paused_at:
            certain_at = max(certain_at, paused_at)
            return Earliest(at, used, self._is_firm(limit) and certain_at == at, certain_at)
        if pause and paused_at:
            return Earliest(paused_at, -1, pause.gate is None, paused_at)
        return Earliest(0, used, firm=False, certain_at=0)

    def refuse_late(
        self,
        flow: FlowName,
        queue: SessionQueue | None,
        member: Member,
        left_ms: int,
        place: LimitState,
        stamp: float,
    ) -> bool:
        """Refuse a ticket that cannot be admitted within `left_ms`; return True if so.

        It would wait at `place` with this stamp, behind the tickets that come before it. With a
        negative `left_ms` no estimate refuses it.
        """
        latest = self.pool.now + abs(left_ms) - 1
        before = self._before(flow, queue, member, place, stamp)
        found = [
            late
            for position, limit in enumerate(self.pool.lane(flow))
            for ahead in [before if limit is place else before.elsewhere()]
            for late in self._late(limit, flow.band, member.amount(position), ahead, latest)
        ]
        if not found and left_ms > 0:
            found = self._probably_late(flow, queue, member, place, before, latest)
        if not found:
            return False
        last = max(found, key=lambda late: late.at)
        room_ms = last.at - self.pool.now
        self.barred.append(
            Barred(member.ticket, last.limit, room_ms, last.used, last.ahead, last.is_estimate)
        )
        return True

    def _before(
        self,
        flow: FlowName,
        own: SessionQueue | None,
        member: Member,
        place: LimitState,
        stamp: float,
    ) -> Before:
        """Return the waiting calls that come before a ticket.

        Calls of the same flow, in any process, are certain: they are admitted in order. A ticket
        that takes nothing of a limit may pass those of other processes that wait there. Others that
        come first in fair order are likely.
        """
        band, certain, likely = place.band(flow.band), 0, 0
        in_order = all(member.amount(position) > 0 for position in range(len(flow.lane)))
        for queue in line_of(band, flow.tenant)[:MOST_BEFORE]:
            waits = sum(one < stamp for one in queue.tickets.values())
            if queue is own or (in_order and queue.flow == flow):
                certain += waits
            else:
                likely += waits
        use = self.pool.probable_use(place, member.use)
        step = self.pool.step(use, flow.tenant)
        start = band.tag(flow.tenant) + (certain + likely) * step
        expected = certain + likely
        for tenant in parked_at(band)[:MOST_BEFORE]:
            gap = start - band.tags[tenant]
            if tenant != flow.tenant and gap > 0:
                turns = 1 + gap // max(1, self.pool.step(use, tenant))
                waiting = self.pool.waiting(tenant)
                likely += min(waiting, turns)
                expected += turns if waiting > 1 else 1
        return Before(certain, likely, expected, start)

    def _late(
        self, limit: LimitState, number: int, amount: int, before: Before, latest: int
    ) -> list[Late]:
        """Return when a limit has room, if that is certainly too late unless waiters leave."""
        if not limit.concerns(amount):
            return []
        returned = not limit.under and not any(self.permits.owed.values())
        settled = limit.is_rate and (self._is_firm(limit) or returned)
        if not settled and not self.pool.pause_of(limit):
            return []
        at, used, firm, certain_at = self._earliest(limit, amount)
        is_late = certain_at > latest and (firm or (settled and used >= 0))
        if self._is_firm(limit) or not (limit.is_rate or limit.by_tokens):
            by_ramp = self._late_by_ramp(limit, before, latest)
            if by_ramp and (by_ramp[0].at > at or not is_late):
                return by_ramp
        if used < 0 or not settled or limit.limit.shadow:
            return [Late(at, limit.name, used, 0, 0)] if is_late else []
        if self._is_firm(limit):
            behind = self.capacity.free_after(limit, before.certain * amount, amount)
            is_late = is_late or behind > latest
        if not is_late:
            return []
        count, is_beside = self.capacity.beside_bands(
            limit, number, before.expected * amount, amount
        )
        room_at = max(at, self.capacity.free_after(limit, count, amount))
        is_estimate = is_beside or before.expected > (before.certain if self._is_firm(limit) else 0)
        if self.capacity.is_behind_bands(limit, number):
            total = before.expected * amount + limit.clamped(amount)
            room_at = self.capacity.by_least_share(limit, number, total, room_at)
            is_estimate = True
        return [Late(room_at, limit.name, used, before.expected, int(is_estimate))]

    def _late_by_ramp(self, limit: LimitState, before: Before, latest: int) -> list[Late]:
        """Return the same for the ramp after a pause, if nothing is returned that calls took."""
        if self.capacity.ramp_after(limit, before.certain) <= latest:
            return []
        at, is_estimate = (
            self.capacity.ramp_after(limit, before.expected),
            before.expected > before.certain,
        )
        return [Late(at, limit.name, RESUMES, before.expected, int(is_estimate))]

    def _probably_late(
        self,
        flow: FlowName,
        queue: SessionQueue | None,
        member: Member,
        place: LimitState,
        before: Before,
        latest: int,
    ) -> list[Late]:
        """Return when a limit has room, if that is too late by a clear margin.

        A third of the calls that are likely to come first may not; half of what was reserved of a
        rate may be returned; calls may take two thirds of their recent time, less a second.
        """
        count = before.certain + before.likely
        pause = self.pool.pause_of(place)
        is_paced = place.spending.is_paced(place.limit)
        if (not count and not is_paced) or place.limit.shadow or (pause and pause.gate):
            return []
        amount = member.amount(flow.lane.index(place.name))
        first = list(queue.tickets)[:5] if queue else []
        position = flow.lane.index(place.name)
        amounts = [read_member(text).amount(position) for text in first] or [amount]
        mean = sum(amounts) // len(amounts)
        calls = before.certain + before.likely * 2 // 3
        if place.by_tokens:
            mean = max(1, mean)
        elif not place.is_rate:
            mean = 1
        elif self._is_firm(place):
            mean = amount
        is_settled = place.is_rate and not self._is_firm(place)
        least = (count - len(place.under)) * mean // 2 if is_settled else calls * mean
        if count and self.capacity.ramp_after(place, max(0, least)) > latest:
            room_at = self.capacity.ramp_after(place, before.expected * mean)
            return [Late(room_at, place.name, RESUMES, before.expected, 1)]
        if not place.is_rate:
            left_ms = latest + 1 - self.pool.now
            return self._late_by_time(place, flow.band, before, left_ms, mean)
        grown = self.capacity.grown_after(place, least, amount) > latest
        if not grown and (not count or self.capacity.free_after(place, least, amount) <= latest):
            return []
        total, _ = self.capacity.beside_bands(place, flow.band, before.expected * mean, amount)
        room_at = self.capacity.free_after(place, total, amount)
        if grown:
            grown_at = self.capacity.grown_after(place, before.expected * mean, amount)
            room_at = max(room_at, grown_at)
        if self.capacity.is_behind_bands(place, flow.band):
            total = before.expected * mean + place.clamped(amount)
            room_at = self.capacity.by_least_share(place, flow.band, total, room_at)
        return [Late(room_at, place.name, self.capacity.spent(place), before.expected, 1)]

    def _late_by_time(
        self, limit: LimitState, number: int, before: Before, left_ms: int, size: int
    ) -> list[Late]:
        """Return when a limit has room by the durations of calls, the last and over a minute.

        Behind higher bands a band advances as fast as it has recently, and no slower than by its
        least share of the admissions. `size`: what each call takes of the limit.
        """
        cap, count = self.capacity.cap(limit, number), before.certain + before.likely
        if cap <= 0 or not limit.cost_ms:
            return []
        cap = max(1, cap // size)
        wait_ms = count * limit.cost_ms // cap
        if is_close(wait_ms, left_ms):
            return []
        samples = self.progress_of(limit, number)
        costs = [cost for _, _, cost in samples if cost > 0]
        usual_ms = sum(costs) // len(costs) if costs else limit.cost_ms
        if is_close(count * usual_ms // cap, left_ms):
            return []
        wait_ms = before.expected * usual_ms // cap
        if any(limit.parked(higher) for higher in range(1, number)) and samples:
            at, virtual, _ = samples[0]
            band_at, age_ms = limit.band(number).virtual, self.pool.now - at
            if age_ms >= MEASURED_MS and band_at > virtual:
                distance = max(0, before.start - band_at)
                moved_ms = floor(distance / (band_at - virtual) * age_ms)
                is_even = self.pool.fair_by != "cost" and not limit.by_tokens
                if share := self.pool.band_rule(number)[0] if is_even else 0:
                    slots = (before.expected + 1) * usual_ms * 1000
                    moved_ms = min(moved_ms, slots // (cap * share))
                wait_ms = max(left_ms, moved_ms)
        return [Late(self.pool.now + wait_ms, limit.name, limit.used, before.expected, 1)]

    def outlook(self) -> list[Outlook]:
        """Return what each of `waited` waits for now."""
        found = []
        for number, queue in sorted(self.waited.items()):
            if queue.at is not None and queue.at != BLOCKED:
                limit, amount = self.pool.limit(queue.at), 1
                if limit.is_rate and not self._is_firm(limit):
                    member = read_member(queue.first()[0])
                    amount = member.amount(queue.flow.lane.index(limit.name))
                at, used, firm, _ = self._earliest(limit, amount)
                room_ms = max(0, at - self.pool.now)
                behind = firm and self.capacity.is_behind_bands(limit, queue.flow.band)
                found.append(Outlook(number, queue.at, room_ms, used, 2 if behind else int(firm)))
        return found

    def note_progress(self, limit: LimitState, number: int) -> None:
        """Take a sample while calls wait, at most one in `APART_MS`."""
        now, band = self.pool.now, limit.band(number)
        samples = self.progress[limit.name, number]
        at, virtual, _ = samples[-1] if samples else (None, 0, 0)
        if at is not None and virtual > band.virtual:
            samples.clear()
        if at is not None and 0 <= now - at < APART_MS:
            return
        samples.append((now, band.virtual, limit.cost_ms))
        del samples[:-MOST_SAMPLES]

    def progress_of(self, limit: LimitState, number: int) -> list[Sample]:
        """Return the samples since calls have waited without interruption."""
        found, later = list[Sample](), self.pool.now
        for sample in reversed(self.progress[limit.name, number]):
            if later - sample[0] > 1500 + self.pool.lease_ms:
                break
            found.insert(0, sample)
            later = sample[0]
        return found


@dataclass(eq=False, repr=False)
class Positions:
    """Positions of waiting tickets, and what decides when their turn comes. Lua: `position`.

    queues_left, amounts_left: how many may still be read for one position.
    """

    pool: PoolState
    capacity: Capacity
    outlooks: Outlooks
    queues_left: int = 0
    amounts_left: int = 0

    def of(self, sid: str, ticket: int) -> list[Any]:
        """Return the reply of `position` on a ticket; [0] if it does not wait."""
        self.queues_left, self.amounts_left = MOST_QUEUES, MOST_AMOUNTS
        session = self.pool.sessions.get(sid)
        for queue in session.queues.values() if session else ():
            for ahead, (text, stamp) in enumerate(queue.tickets.items()):
                if read_member(text).ticket == ticket:
                    return self._of(queue, read_member(text), stamp, ahead)
        return [0]

    def _of(self, queue: SessionQueue, member: Member, stamp: float, ahead: int) -> list[Any]:
        assert queue.at is not None
        if queue.at == BLOCKED:
            return [1, queue.key, "", ahead, 1, member.use, "", []]
        limit, flow = self.pool.limit(queue.at), queue.flow
        for other in limit.band(flow.band).lines[flow.tenant].values():
            if other is not queue:
                ahead += sum(each < stamp for each in other.tickets.values())
        amount = member.amount(flow.lane.index(limit.name))
        pause = self.pool.pause_of(limit)
        line = self.line(limit, flow.band, flow.tenant, stamp, member.use)
        reason = pause.reason if pause else ""
        return [1, queue.key, limit.name, ahead, amount, member.use, reason, line]

    def line(
        self,
        limit: LimitState,
        number: int,
        tenant: str,
        before: float | None = None,
        use: int = CALL_USE,
    ) -> list[Any]:
        """Return the line as in the script's header. `before`: only tickets with smaller stamps
        count as the tenant's. `use`: the probable use of a call."""
        pool, band = self.pool, limit.band(number)
        own = self._amounts(limit, band, tenant, before, MOST_OWN)
        rivals = [
            [
                band.tags[name],
                pool.weight(name),
                self._waiting(band, name),
                int(name < tenant),
                self._amounts(limit, band, name, None, MOST_OF_RIVAL),
            ]
            for name in parked_at(band)[:MOST_TENANTS]
            if name != tenant
        ]
        higher = [one for other, one in limit.bands.items() if other < number]
        above = sum(
            self._waiting(one, name) for one in higher for name in parked_at(one)[:MOST_TENANTS]
        )
        bound, free, even, pace, width = limit.limit.bound, list[list[int]](), 0, 0, 0
        span = span_of(limit.limit) if isinstance(limit.limit, Rate) else 0
        if limit.is_rate:
            free = [*self._free(limit), *self._kept(limit, number)]
            if isinstance(limit.limit, Rate) and not limit.limit.exact:
                width = ceil(span / limit.limit.buckets)
            if isinstance(limit.limit, Rate) and limit.spending.is_paced(limit.limit):
                pacing = limit.spending.pacing
                even, pace = pacing.even_us if pacing else 0, (limit.limit.pace_ms or 0) * 1000
            if isinstance(limit.limit, Rate) and limit.limit.shape == "bucket":
                span, width = limit.limit.window_ms, 0
                full = pool.now * 1000 + limit.spending.level_us(limit.limit, pool.now)
                if pace == 0 or full - span * 1000 > even - pace:
                    even, pace = full, span * 1000
        else:
            bound = self.capacity.cap(limit, number)
            if limit.by_tokens and bound > 0:
                bound = max(1, bound // self._mean(limit, band, tenant))
        pause = pool.pause_of(limit)
        paused_ms = max(1 if pause.gate else 0, pause.until - pool.now) if pause else 0
        return [
            *(pool.now, self._sort(limit), bound, span, band.virtual, band.tag(tenant)),
            *(pool.weight(tenant), limit.cost_ms, paused_ms, self._share(limit, number, tenant)),
            *(self._waiting(band, tenant), rivals, above),
            [list(sample) for sample in self.outlooks.progress_of(limit, number)],
            *(free, even, pace, self._mean(limit, band, tenant), own, width),
            *(self._use(limit, use), self._ramp(limit), self._owed_from(band)),
            *(self._held_ms(limit, higher), self.capacity.taken_above(limit, number)),
        ]

    def _held_ms(self, limit: LimitState, higher: list[BandState]) -> int:
        """Return for how much longer a band gets no more than its least share of a rate."""
        held_at = max((one.held_at for one in higher), default=0)
        if not held_at or not isinstance(limit.limit, Rate):
            return 0
        return max(0, held_at + span_of(limit.limit) - self.pool.now)

    def _use(self, limit: LimitState, use: int) -> int:
        return 0 if self.pool.fair_by == "seconds" else self.pool.probable_use(limit, use)

    @staticmethod
    def _ramp(limit: LimitState) -> list[int]:
        rule, pacing = limit.limit, limit.spending.pacing or Pacing()
        if not isinstance(rule, Rate) or rule.ramp is None:
            return []
        return [pacing.level, pacing.since, rule.ramp.percent_per_minute, rule.ramp.start]

    def _owed_from(self, band: BandState) -> int:
        return band.from_us // 1000 if band.passed_us else self.pool.now

    def _share(self, limit: LimitState, number: int, tenant: str) -> int:
        """Return a band's least share of what a limit gives.

        Under tokens in flight it differs from the share of admissions, if its calls take more or
        less than those of the highest waiting band.
        """
        share = self.pool.band_rule(number)[0]
        above = [one for other, one in sorted(limit.bands.items()) if other < number and one.lines]
        if not limit.by_tokens or not above:
            return share
        sizes = [self._mean(limit, above[0], name) for name in parked_at(above[0])[:10]]
        own = share * self._mean(limit, limit.band(number), tenant) * len(sizes)
        return 1000 * own // (own + (1000 - share) * sum(sizes))

    @staticmethod
    def _sort(limit: LimitState) -> str:
        if isinstance(limit.limit, Rate) and limit.limit.shape == "bucket":
            return "b"
        return "q" if isinstance(limit.limit, Quota) else "r" if limit.is_rate else "c"

    def _waiting(self, band: BandState, tenant: str) -> int:
        if self.queues_left <= 0:
            return self.pool.waiting(tenant)
        queues = line_of(band, tenant)[:MOST_QUEUES]
        self.queues_left -= len(queues)
        return sum(len(queue.tickets) for queue in queues)

    def _amounts(
        self, limit: LimitState, band: BandState, tenant: str, before: float | None, most: int
    ) -> list[int]:
        exact = isinstance(limit.limit, Rate) and limit.limit.exact
        if not limit.is_rate or exact or self.amounts_left <= 0:
            return []
        found = [
            (stamp, read_member(text).amount(queue.flow.lane.index(limit.name)))
            for queue in line_of(band, tenant)[:50]
            for text, stamp in queue.tickets.items()
            if before is None or stamp < before
        ]
        amounts = [amount for _, amount in sorted(found)[: min(most, self.amounts_left)]]
        self.amounts_left -= len(amounts)
        return amounts

    def _mean(self, limit: LimitState, band: BandState, tenant: str) -> int:
        amounts = [
            read_member(text).amount(queue.flow.lane.index(limit.name))
            for queue in line_of(band, tenant)[:10]
            for text in list(queue.tickets)[:10]
        ]
        return max(1, floor(sum(amounts) / len(amounts) + 0.5)) if amounts else 1

    def _kept(self, limit: LimitState, number: int) -> list[list[int]]:
        """Return what is kept free of a window for lower bands, as if it was taken now."""
        rule, kept = limit.limit, self.capacity.kept_below(limit, number)
        if not kept or not isinstance(rule, Rate) or rule.shape == "bucket":
            return []
        return [[self.pool.now + span_of(rule), kept]]

    def _free(self, limit: LimitState) -> list[list[int]]:
        spending = limit.spending
        if isinstance(limit.limit, Quota):
            day = replace(spending)  # a copy, since `look` changes it
            day.look(limit.limit, self.pool.now, 0)
            return [[day.reset_at, day.used]]
        self.capacity.spent(limit)
        assert isinstance(limit.limit, Rate)
        if limit.limit.shape == "bucket" and limit.limit.ramp is None:
            return []
        span, log = span_of(limit.limit), spending.log
        if not limit.limit.exact:
            return [[end + span, amount] for end, amount in sorted(spending.buckets.items())]
        step = max(1, ceil(len(log) / MOST_STEPS))
        found = [[log[i] + span, step] for i in range(step - 1, len(log), step)]
        rest = len(log) % step
        return [*found, [log[-1] + span, rest]] if rest else found
