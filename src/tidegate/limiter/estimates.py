"""Estimates of waits at a limit, from its queue as Valkey describes it. Pure.

Under a concurrency limit an estimate is distance over speed: the distance in virtual time to the
waiter's place, and the recent speed of the band. Under a rate the next admissions are simulated one
by one. No decision depends on an estimate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import ceil, inf, sqrt
from typing import Any, NamedTuple

from tidegate.limiter.policy import CALL_USE

# The longest and shortest time over which a speed is measured; from the third on, the measurement
# alone counts.
MEASURED_MS, LEAST_MEASURED_MS, TRUSTED_MS = 30_000, 3_000, 20_000
# How much sooner than by its least share a band is served, to count as served so.
_CLEARLY = 1.5
# The part of a rate from which on higher bands that found no room take all of it.
_MOST_TAKEN = 0.8
# While a higher band uses a rate, lower bands leave 1/_LEFT_FREE of it free (`lua/lib/rates.lua`).
_LEFT_FREE = 20
# Into how many calls at most a window's use by higher bands is divided.
_STEPS_ABOVE = 100
_UNITS = 100_000  # units of virtual time for one ms of use by a tenant of weight 1
_MINUTE_MS, _DAY_MS = 60_000, 86_400_000
# Calls that all take longer than this many times the usual duration have no usual end any more.
_STALLED = 2
# The most admissions that are simulated one by one, which takes some ms.
_MOST_SIMULATED = 1_000


@dataclass(frozen=True, slots=True)
class WaitEstimate:
    """An estimate of the time to a waiter's admission.

    wait_ms: None if unknown. ahead: the approximate number of calls of all tenants that come
    before. rate_per_s: how many calls a second the limit has admitted recently, or admits by the
    duration of its calls; None for rates. is_certain: the time follows from a window, a quota or a
    pause, not from the duration of calls. stalled_ms: no call under the limit has ended for at
    least this long, which is much longer than calls take; `wait_ms` is None then.
    """

    wait_ms: int | None
    ahead: int
    rate_per_s: float | None = None
    is_certain: bool = False
    stalled_ms: int = 0


class Rival(NamedTuple):
    """Another tenant of the same band.

    tag: the virtual start of its next call. weight: its weight. waiting: its waiting calls.
    is_first: whether it precedes at equal starts. amounts: what each of its first calls takes of a
    rate.
    """

    tag: int
    weight: int
    waiting: int
    is_first: int = 0
    amounts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """The waiters of one tenant and band at a limit, and what decides their admission.

    Virtual time is that of start-time fair queueing (`lua/lib/queues.lua`): `tag` is the start of
    the tenant's next call, `virtual` the time of the band. samples: (ms, virtual time, cost_ms)
    while calls have waited without interruption. above: calls waiting in higher bands. free: when a
    rate gets back how much. even, pace: of a smoothed rate, in microseconds; for a bucket (sort
    `b`) when it is full again, and its window. amount: the average that a call takes. amounts: what
    each of the first calls before this one takes. width: of the buckets in which a rate is counted,
    0 if each admission is logged. use: what a call counts in shares, 0 if that is its duration.
    share: the band's least share of what the limit gives, in thousandths. ramp: of a rate that may
    only grow slowly, see `_Growth`; `free` of a bucket is then what its last window took.
    owed_from: since when the band is owed its least share. held_ms: for how much longer the band
    gets no more than that, as a higher one has found no room. taken: what higher bands took of a
    rate in its last window.
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
    rivals: list[Rival]
    above: int
    samples: list[tuple[int, int, int]]
    free: list[tuple[int, int]]
    even: int
    pace: int
    amount: int
    amounts: Sequence[int] = ()
    width: int = 0
    use: int = 0
    ramp: Sequence[int] = ()
    owed_from: int = 0
    held_ms: int = 0
    taken: int = 0

    def estimate(self, ahead: int, cost_ms: float = 0, amount: int | None = None) -> WaitEstimate:
        """Return an estimate for a call with `ahead` calls of its own tenant before it.

        cost_ms: the duration of calls, if the limit has none on record. amount: what the call takes
        of a rate.
        """
        if self.sort != "c":
            return self._of_rate(ahead, cost_ms, self.amount if amount is None else amount)
        usual_ms = self._usual_ms() or cost_ms
        use = self.use or usual_ms
        distance = self.tag - self.virtual + ahead * use * _UNITS / self.weight
        others = sum(self._before(distance, rival, use) for rival in self.rivals)
        before = ahead + others + self.above
        if self.bound <= 0 or usual_ms <= 0:
            wait_ms = self.paused_ms or None
            return WaitEstimate(wait_ms, before, is_certain=self.paused_ms > 0)
        if (stalled_ms := self._stalled_ms()) > max(LEAST_MEASURED_MS, _STALLED * usual_ms):
            return WaitEstimate(None, before, stalled_ms=stalled_ms)
        own = use * _UNITS / self.weight
        weights = self.weight + sum(rival.weight for rival in self.rivals)
        speed = self.bound * _UNITS * use / usual_ms / weights
        measured = None if self.paused_ms else self._speed(MEASURED_MS)
        if measured is not None:
            known = min(1.0, measured[1] / TRUSTED_MS) if not self.above else 1.0
            speed = max(known * measured[0] + (1 - known) * speed, self._least(speed))
        elif self.above:
            return self._behind_others(ahead + others, usual_ms)
        rate = 1000 * speed / own * (before + 1) / (ahead + 1)
        waits_ms = (max(0.0, distance) + own / 2) / speed
        return WaitEstimate(round(self._with_pause(waits_ms, usual_ms)), before, rate)

    def _behind_others(self, before: int, usual_ms: float) -> WaitEstimate:
        """Return an estimate behind higher bands without a measurement.

        The call comes after them, or sooner by the band's least share.
        """
        rate = self.bound * 1000 / usual_ms
        first = before + self.above + 1
        slots = min(first, (before + 1) * 1000 / self.share) if self.share else first
        wait_ms = slots * 1000 / rate
        total_ms = self._with_pause(wait_ms, usual_ms)
        return WaitEstimate(round(total_ms), before + self.above, rate)

    def _with_pause(self, wait_ms: float, usual_ms: float) -> float:
        """Return a wait that continues after a pause, during which open calls end."""
        return self.paused_ms + max(0.0, wait_ms - min(usual_ms, self.paused_ms))

    def _least(self, speed: float) -> float:
        """Return the part of `speed`, the band's speed if alone, that its least share guarantees.

        0 if unknown: among rivals whose calls cost more or less, virtual time has no known pace.
        """
        is_by_cost = self.use not in (0, CALL_USE)
        if not self.above or (is_by_cost and self.rivals):
            return 0.0
        return speed * self.share / 1000

    def _stalled_ms(self) -> int:
        """For how long no call has ended, as far as samples go back: each admission behind another
        one moves virtual time, and each end moves the mean duration. 0 during a pause."""
        since = self.now_ms
        for at, virtual, cost_ms in reversed(self.samples):
            if (virtual, cost_ms) != (self.virtual, self.cost_ms):
                break
            since = at
        return 0 if self.paused_ms else self.now_ms - since

    def _usual_ms(self) -> float:
        """Return the duration of calls: the mean over the samples, which varies less than the
        last.
        """
        recent = [cost for at, _, cost in self.samples if self.now_ms - at <= 2 * MEASURED_MS]
        known = [cost for cost in recent if cost > 0]
        return sum(known) / len(known) if known else self.cost_ms

    def _speed(self, longest_ms: float) -> tuple[float, float] | None:
        """Return the recent virtual time per ms, and over how many ms; None if not measured."""
        aged = ((self.now_ms - at, virtual) for at, virtual, _ in self.samples)
        usable = [one for one in aged if LEAST_MEASURED_MS <= one[0] <= longest_ms]
        if not usable:
            return None
        age_ms, virtual = max(usable)
        return ((self.virtual - virtual) / age_ms, age_ms) if self.virtual > virtual else None

    def _before(self, distance: float, rival: Rival, use: float) -> int:
        """Return how many calls of another tenant are admitted before ours.

        A tenant with several waiting calls is assumed to continue; a single one may be its only.
        """
        gap = distance - (rival.tag - self.virtual)
        if gap < 0 or not rival.waiting:
            return 0
        if use <= 0:
            return rival.waiting
        count = 1 + int(gap * rival.weight / (use * _UNITS))
        return min(count, rival.waiting) if rival.waiting == 1 else count

    def _of_rate(self, ahead: int, cost_ms: float, amount: int) -> WaitEstimate:
        """Return an estimate by the window, pace and reset of a rate or day quota."""
        is_certain = not (self.rivals or self.above or self.held_ms or self.taken)
        if self._is_behind() or self.bound <= 0 or ahead > _MOST_SIMULATED:
            use = self.use or self._usual_ms() or cost_ms
            distance = self.tag - self.virtual + ahead * use * _UNITS / self.weight
            others = [(rival, self._before(distance, rival, use)) for rival in self.rivals]
            before = ahead + sum(count for _, count in others)
            total = amount + _sum_of(self.amounts, ahead, self.amount)
            total += sum(_sum_of(rival.amounts, n, self.amount) for rival, n in others)
            wait_ms = self._by_total(total)
            if self._has_least_share() and use > 0 and not self.paused_ms:
                is_exact = before == ahead or self.use == CALL_USE
                served_ms = self._as_served(before, use)
                wait_ms = self._behind_bands(total, before, is_exact, served_ms, wait_ms)
            before += self.above
        else:
            wait_ms, before = _RateQueue(self, ahead, cost_ms, amount).run()
            if self.held_ms and self.share:
                total = amount + _sum_of(self.amounts, ahead, self.amount)
                wait_ms = min(wait_ms, self._by_least_share(total))
        return WaitEstimate(round(max(0.0, wait_ms, self.paused_ms)), before, None, is_certain)

    def _is_behind(self) -> bool:
        """Return whether higher bands take all but the least share."""
        return self.above > 0 or (self.held_ms > 0 and self.taken >= _MOST_TAKEN * self.bound)

    def _has_least_share(self) -> bool:
        """Return whether the band waits behind others under a rate: a day quota has no shares."""
        return self._is_behind() and self.bound > 0 and self.sort != "q"

    def _behind_bands(
        self, total: int, before: int, is_exact: bool, served_ms: float | None, first_ms: float
    ) -> float:
        """Return the wait behind higher bands whose calls continue to come.

        first_ms: the wait if only those that wait now come first, which is all that is known until
        calls of this band have waited for a while. From then on it is what the band's least share
        gives, or, if that is clearly more, what the band got lately: `served_ms`. is_exact: whether
        it is certain which calls come before. Otherwise the durations of calls change the order
        of tenants, and what becomes free a moment too early for a call comes a window later: the
        answer is the mean, since it is off by the least.
        """
        oldest_ms = max((self.now_ms - at for at, *_ in self.samples), default=0)
        if oldest_ms < min(self.span, TRUSTED_MS):
            return first_ms
        if not self.share:
            return first_ms if served_ms is None else served_ms
        off = 0 if is_exact else round(self.amount * sqrt(before) / 2)
        least_ms = sum(self._by_least_share(total + more) for more in (-off, 0, off)) / 3
        return least_ms if served_ms is None or served_ms * _CLEARLY > least_ms else served_ms

    def _as_served(self, before: int, use: float) -> float | None:
        """Return when a call is admitted if the band is served as it was lately, None if unknown.

        Counted in calls: each that ends corrects its tenant's tag, by more than calls are apart.
        What becomes free comes in bursts, a window apart: of a part of one is no speed.
        """
        longest_ms = MEASURED_MS if self.sort == "b" else MEASURED_MS // self.span * self.span
        measured = self._speed(longest_ms) if longest_ms else None
        if measured is None:
            return None
        weights = self.weight + sum(rival.weight for rival in self.rivals)
        return (before + 0.5) * use * _UNITS / weights / measured[0]

    def _by_least_share(self, total: int) -> float:
        """Return when the band's least share has given `total`: the call and those before it.

        Higher bands take all the rest, so that there is room only as something becomes free.
        """
        if self.ramp:
            return self._by_growing_share(total)
        each_ms = self.span * 1000 / (self.bound * self.share)
        first = self.amounts[0] if self.amounts else self.amount
        owed_from = max(self.owed_from, self.now_ms - self.span - first * each_ms)
        wait_ms = max(0.0, owed_from + total * each_ms - self.now_ms)
        if self.sort != "r" or not self.free:
            return wait_ms
        windows, rest_ms = divmod(wait_ms, self.span)
        freed = (at - self.now_ms for at, _ in self.free)
        next_ms = min((at for at in freed if at >= rest_ms), default=None)
        if next_ms is None:
            windows, next_ms = windows + 1, self.free[0][0] - self.now_ms
        return windows * self.span + next_ms

    def _by_growing_share(self, total: int) -> float:
        """Return the same under a ramp: a share of what it admits, which grows."""
        growth = _Growth(*self.ramp)
        owed_ms = min(self.now_ms - self.owed_from, self.span)
        owed = growth.bound_at(self.now_ms, self.bound) * owed_ms / self.span
        return self._growing_ms(growth, total * 1000 / self.share - owed)

    def _by_total(self, total: int) -> float:
        """Return when there is room for the calls of the band before a call, which take `total`
        with it, and for those that wait in higher bands now."""
        most = total + self.above * self.amount
        if self.taken and not self._is_behind():
            most = round(total * self.bound / max(1, self.bound - self.taken - self.left_free()))
        if self.share and self._has_least_share():
            most = min(most, round(total * 1000 / self.share))
        return self._until_room(most)

    def left_free(self) -> int:
        """Return how much is left free for higher bands that use the rate."""
        return self.bound // _LEFT_FREE if self.taken else 0

    def _until_room(self, total: int) -> float:
        """Return the time until `total` more is admitted."""
        at = self._window_ms(total)
        if self.ramp:
            at = max(at, self._grown_ms(total))
        if self.pace > 0 and self.bound > 0:
            each = self.span * 1000 / self.bound
            at = max(at, (self.even - self.pace + total * each) / 1000 - self.now_ms)
        return at

    def _window_ms(self, total: int) -> float:
        """Return the time until `total` more fits.

        What is admitted into a freed part of the window is freed again a window later. A bucket is
        an even flow: see `pace`.
        """
        if self.sort == "b":
            return 0.0
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
        # The rest was free already: it is spent now, and freed a window from now.
        return (windows + 1) * self.span

    def _grown_ms(self, total: int) -> float:
        """Return the time until a ramp admits `total` more, if calls take all that it admits."""
        growth = _Growth(*self.ramp)
        used = sum(amount for _, amount in self.free)
        over = total - max(0, growth.bound_at(self.now_ms, self.bound) - used)
        return self._growing_ms(growth, over)

    def _growing_ms(self, growth: _Growth, over: float) -> float:
        """Return the time in which windows admit `over`, if calls take all that a ramp admits."""
        for windows in range(_MOST_SIMULATED):
            end_ms = self.now_ms + (windows + 1) * self.span
            growth.take(end_ms, growth.bound_at(end_ms, self.bound))
            each = max(1, growth.bound_at(end_ms, self.bound))
            if over <= each:
                return (windows + max(0, over) / each) * self.span
            over -= each
        return _MOST_SIMULATED * self.span


@dataclass(slots=True)
class _Growth:
    """What a ramp lets a window take.

    That is `level`, and `percent` of it more for each minute since `since`. The first call after a
    minute sets the level to what the last window took, at least `start` (`lua/lib/pacing.lua`).
    """

    level: int
    since: float
    percent: int
    start: int

    def bound_at(self, at_ms: float, bound: int) -> int:
        if self.since == 0:
            return bound
        more = self.level * self.percent * max(0.0, at_ms - self.since) / (100 * _MINUTE_MS)
        return min(bound, self.level + int(more))

    def grown_at(self, needed: int) -> int:
        """Return when a window may take `needed`, if it takes nothing until then."""
        more = max(0, needed - self.level)
        return ceil(self.since + more * 100 * _MINUTE_MS / max(1, self.level * self.percent))

    def take(self, at_ms: float, used: int) -> None:
        """Count a call, which the last window's use includes."""
        if at_ms - self.since >= _MINUTE_MS:
            self.level, self.since = max(self.start, used), at_ms


@dataclass(slots=True)
class _TenantCalls:
    """Calls of one tenant in a `_RateQueue`. goes_on: each call that ends is followed by
    another.
    """

    tag: float
    step: float
    order: tuple[int, int]
    waiting: int
    amounts: deque[int]
    usual: int
    repeats: bool

    def take(self) -> int:
        """Remove its next call, and return its amount."""
        self.waiting -= 1
        self.tag += self.step
        return self.amounts.popleft() if self.amounts else self.usual


class _RateQueue:
    """A simulation of the admissions of a rate, one by one, up to a call's own.

    Capacity returns in steps as large as a burst: a call one place too late waits for another
    window, which no average shows. Higher bands take their part evenly between. A tenant with
    several waiting calls makes another when one has ended; actual durations of calls shift later
    turns a little.
    """

    def __init__(self, line: WaitingLine, ahead: int, cost_ms: float, amount: int) -> None:
        self._line = line
        self._cost_ms = max(1.0, line.cost_ms or cost_ms)
        own = [*line.amounts[:ahead], *[line.amount] * (ahead - len(line.amounts[:ahead])), amount]
        self._own = self._queue(Rival(line.tag, line.weight, ahead + 1, 0, own), 0, repeats=False)
        self._queues = [self._own]
        for number, rival in enumerate(line.rivals, 1):
            self._queues.append(self._queue(rival, number, repeats=rival.waiting > 1))
        self._free = deque(sorted(line.free))
        self._used = sum(spent for _, spent in line.free)
        self._growth = _Growth(*line.ramp) if line.ramp else None
        self._even = float(line.even)
        self._each = line.span * 1000 / line.bound
        self._coming: list[tuple[float, int]] = []
        self._held_until = float(line.now_ms + line.held_ms)
        self._step = max(1, min(line.amount, line.taken), line.taken // _STEPS_ABOVE)
        self._above_each = line.span * self._step / line.taken if line.taken else inf
        self._above_at = line.now_ms + self._above_each / 2

    def _queue(self, rival: Rival, number: int, *, repeats: bool) -> _TenantCalls:
        amounts = deque(rival.amounts)
        usual = round(sum(amounts) / len(amounts)) if amounts else self._line.amount
        order = (-rival.is_first if number else 0, number)
        step = (self._line.use or self._cost_ms) * _UNITS / max(1, rival.weight)
        return _TenantCalls(rival.tag, step, order, rival.waiting, amounts, usual, repeats)

    def run(self) -> tuple[float, int]:
        """Return the time to the call's admission, and how many calls come before it."""
        line, virtual, count, steps = self._line, float(self._line.virtual), 0, 0
        at = float(line.now_ms + line.paused_ms)
        turns = [(one.tag, one.order, n) for n, one in enumerate(self._queues) if one.waiting]
        heapify(turns)
        while max(count, steps) < _MOST_SIMULATED:
            tag, _, number = turns[0]
            queue = self._queues[number]
            amount = min(queue.amounts[0] if queue.amounts else queue.usual, line.bound)
            room_at = max(self._held_until, self._room_at(at, amount + line.left_free()))
            if self._above_at <= min(room_at, self._coming[0][0] if self._coming else inf):
                at, steps = max(at, self._above_at), steps + 1
                self._admit_above(at)
                continue
            if self._coming and self._coming[0][0] <= room_at:
                at = max(at, self._coming[0][0])
                self._arrive(heappop(self._coming)[1], turns, virtual)
                continue
            if room_at > at:
                at = room_at
                continue
            heappop(turns)
            queue.take()
            if queue is self._own and not queue.waiting:
                return at - line.now_ms, count
            count, virtual = count + 1, max(virtual, tag)
            self._take(at, amount)
            if queue.waiting:
                heappush(turns, (queue.tag, queue.order, number))
            if queue.repeats:
                heappush(self._coming, (at + self._cost_ms, number))
        before = count + self._own.waiting
        return line._by_total((before + 1) * line.amount), before

    def _admit_above(self, at: float) -> None:
        """Admit a call of a higher band, which take as much a window as in the last one."""
        room_at = at
        while (later := self._room_at(room_at, self._step)) > room_at:
            room_at = later
        if room_at > at:
            self._held_until = room_at + self._line.span
        self._take(room_at, self._step)
        self._above_at = room_at + self._above_each

    def _arrive(
        self, number: int, turns: list[tuple[float, tuple[int, int], int]], virtual: float
    ) -> None:
        queue = self._queues[number]
        if not queue.waiting:
            queue.tag = max(queue.tag, virtual)
            heappush(turns, (queue.tag, queue.order, number))
        queue.waiting += 1

    def _room_at(self, at: float, amount: int) -> float:
        """Return when there may be room: at `at`, or when more is free."""
        while self._free and self._free[0][0] <= at:
            self._used -= self._free.popleft()[1]
        if self._line.pace > 0:
            ahead_us = max(0.0, self._line.pace - amount * self._each)
            at = max(at, ceil((self._even - ahead_us) / 1000))
        if self._used + amount > self._line.bound and self._free and self._line.sort != "b":
            at = max(at, self._free[0][0])
        if self._growth is not None and self._used > 0:
            needed = min(self._used + amount, self._line.bound)
            if self._growth.bound_at(at, self._line.bound) < needed:
                grown_at = max(at + 1, self._growth.grown_at(needed))
                at = min(grown_at, max(at, self._free[0][0])) if self._free else grown_at
        return at

    def _take(self, at: float, amount: int) -> None:
        line = self._line
        self._used += amount
        if self._growth is not None:
            self._growth.take(at, self._used)
        if line.sort == "q":
            reset_at = line.free[0][0]
            day = ceil((at - reset_at + 1) / _DAY_MS) if at >= reset_at else 0
            self._free.append((reset_at + day * _DAY_MS, amount))
        elif line.sort == "r" or self._growth is not None:
            end = (at // line.width + 1) * line.width if line.width else at
            self._free.append((int(end) + line.span, amount))
        if line.pace > 0:
            self._even = max(self._even, at * 1000) + amount * self._each


def _sum_of(amounts: Sequence[int], count: int, usual: int) -> int:
    """Return what the first `count` calls take, of which some amounts are known."""
    known = amounts[:count]
    mean = round(sum(amounts) / len(amounts)) if amounts else usual
    return sum(known) + (count - len(known)) * mean


def read_line(values: list[Any]) -> WaitingLine:
    """Return the line in a reply of `position`."""
    line = WaitingLine(*values[:25])
    return replace(line, rivals=[Rival(*row[:5]) for row in line.rivals])
