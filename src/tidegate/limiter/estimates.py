"""Estimates of waits at a limit, from its queue as Valkey describes it. Pure.

Under concurrent calls it is distance over speed: that of virtual time to the waiter's place, and
that of the band lately. Under a rate the next admissions are gone through one by one. An estimate
decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import ceil
from typing import Any, NamedTuple

from tidegate.limiter.policy import CALL_USE

# A rate is measured over this time at most and at least; it counts alone from the third on.
MEASURED_MS, LEAST_MEASURED_MS, TRUSTED_MS = 30_000, 3_000, 20_000
_UNITS = 100_000  # of virtual time in a ms of use by a tenant of weight 1
_DAY_MS = 86_400_000
# So many admissions are looked at one by one, some ms of work.
_MOST_SIMULATED = 1_000


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


class Rival(NamedTuple):
    """Another tenant of the same band: where its next call starts in virtual time, its weight, how
    many calls it has waiting, whether it comes first where both start together, and what each of
    its first calls takes of a rate."""

    tag: int
    weight: int
    waiting: int
    is_first: int = 0
    amounts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """The waiters of one tenant and band at a limit, and what decides when they are admitted.

    Virtual time is that of start-time fair queueing (`lua/lib/queues.lua`): `tag` is where the
    tenant's next call starts, `virtual` where the band is. samples: (ms, virtual time, cost_ms) of
    the time in which calls have waited without a break. above: calls that wait in higher bands.
    free: when a rate gets back how much. even, pace: of a smoothed rate, in microseconds; of one
    that refills (sort `b`) when all has refilled, and its window. amount:
    what a call takes on average; amounts: what each of the first calls takes, of those before the
    one that is asked about. width: of the buckets in which a rate is counted, 0 where each
    admission is. use: what shares count of a call, 0 where that is the time that it takes. share:
    the least of the band in what the limit gives, in thousandths.
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

    def estimate(self, ahead: int, cost_ms: float = 0, amount: int | None = None) -> WaitEstimate:
        """For a call with `ahead` calls of its own tenant before it. cost_ms: how long calls take,
        where the limit does not know; amount: what it takes of a rate."""
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
        """Behind higher bands, not measured yet: after them, or by the band's least share."""
        rate = self.bound * 1000 / usual_ms
        first = before + self.above + 1
        slots = min(first, (before + 1) * 1000 / self.share) if self.share else first
        wait_ms = slots * 1000 / rate
        total_ms = self._with_pause(wait_ms, usual_ms)
        return WaitEstimate(round(total_ms), before + self.above, rate)

    def _with_pause(self, wait_ms: float, usual_ms: float) -> float:
        """A wait goes on after a pause, within which calls that are open end."""
        return self.paused_ms + max(0.0, wait_ms - min(usual_ms, self.paused_ms))

    def _least(self, speed: float) -> float:
        """What a band's least share is, of the speed that it would have alone. Of calls that cost
        more or less than others' it is not known how fast virtual time goes by them."""
        is_by_cost = self.use not in (0, CALL_USE)
        if not self.above or (is_by_cost and self.rivals):
            return 0.0
        return speed * self.share / 1000

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

    def _before(self, distance: float, rival: Rival, use: float) -> int:
        """How many calls of another tenant are admitted before ours. One that has several waiting
        goes on asking; a single call may have been the only one."""
        gap = distance - (rival.tag - self.virtual)
        if gap < 0 or not rival.waiting:
            return 0
        if use <= 0:
            return rival.waiting
        count = 1 + int(gap * rival.weight / (use * _UNITS))
        return min(count, rival.waiting) if rival.waiting == 1 else count

    def _of_rate(self, ahead: int, cost_ms: float, amount: int) -> WaitEstimate:
        """By the window, the pace and the reset of a rate or a day quota."""
        is_certain = not self.rivals and not self.above
        if self.above or self.bound <= 0 or ahead > _MOST_SIMULATED:
            use = self.use or self._usual_ms() or cost_ms
            distance = self.tag - self.virtual + ahead * use * _UNITS / self.weight
            others = sum(self._before(distance, rival, use) for rival in self.rivals)
            before = ahead + others + self.above
            wait_ms = self._by_total(before, amount)
        else:
            wait_ms, before = _RateQueue(self, ahead, cost_ms, amount).run()
        return WaitEstimate(round(max(0.0, wait_ms, self.paused_ms)), before, None, is_certain)

    def _by_total(self, before: int, amount: int) -> float:
        """Where the order of the calls before is not known: when there is room for all of them."""
        total = before * self.amount + amount
        if self.above and self.share:
            total = min(total, round((total - self.above * self.amount) * 1000 / self.share))
        at = self._window_ms(total)
        if self.pace > 0 and self.bound > 0:
            each = self.span * 1000 / self.bound
            at = max(at, (self.even - self.pace + total * each) / 1000 - self.now_ms)
        return at

    def _window_ms(self, total: int) -> float:
        """When so much more fits. What is admitted into a part of the window that became free
        becomes free again a window later. A rate that refills is an even flow, see `pace`."""
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
        # The rest was free before: it is spent now, and becomes free a window from now.
        return (windows + 1) * self.span


@dataclass(slots=True)
class _TenantCalls:
    """Calls of one tenant in a `_RateQueue`. goes_on: each one that ends is followed by another."""

    tag: float
    step: float
    order: tuple[int, int]
    waiting: int
    amounts: deque[int]
    usual: int
    goes_on: bool

    def take(self) -> int:
        """The amount of its next call, which it has no more."""
        self.waiting -= 1
        self.tag += self.step
        return self.amounts.popleft() if self.amounts else self.usual


class _RateQueue:
    """Admissions of a rate from now until a call's own, one by one.

    Room comes back in steps as large as a burst: a call that is one place too late waits for
    another window, so that no average tells its time. A tenant with several calls waiting asks
    again when one has ended; what calls really last moves later turns a little.
    """

    def __init__(self, line: WaitingLine, ahead: int, cost_ms: float, amount: int) -> None:
        self._line = line
        self._cost_ms = max(1.0, line.cost_ms or cost_ms)
        own = [*line.amounts[:ahead], *[line.amount] * (ahead - len(line.amounts[:ahead])), amount]
        self._own = self._queue(Rival(line.tag, line.weight, ahead + 1, 0, own), 0, goes_on=False)
        self._queues = [self._own]
        for number, rival in enumerate(line.rivals, 1):
            self._queues.append(self._queue(rival, number, goes_on=rival.waiting > 1))
        self._free = deque(sorted(line.free))
        self._used = sum(spent for _, spent in line.free)
        self._even = float(line.even)
        self._each = line.span * 1000 / line.bound
        self._coming: list[tuple[float, int]] = []

    def _queue(self, rival: Rival, number: int, *, goes_on: bool) -> _TenantCalls:
        amounts = deque(rival.amounts)
        usual = round(sum(amounts) / len(amounts)) if amounts else self._line.amount
        order = (-rival.is_first if number else 0, number)
        step = (self._line.use or self._cost_ms) * _UNITS / max(1, rival.weight)
        return _TenantCalls(rival.tag, step, order, rival.waiting, amounts, usual, goes_on)

    def run(self) -> tuple[float, int]:
        """The time to the call's admission, and how many come before it."""
        line, virtual, count = self._line, float(self._line.virtual), 0
        at = float(line.now_ms + line.paused_ms)
        turns = [(one.tag, one.order, n) for n, one in enumerate(self._queues) if one.waiting]
        heapify(turns)
        while count < _MOST_SIMULATED:
            tag, _, number = turns[0]
            queue = self._queues[number]
            amount = min(queue.amounts[0] if queue.amounts else queue.usual, line.bound)
            room_at = self._room_at(at, amount)
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
            if queue.goes_on:
                heappush(self._coming, (at + self._cost_ms, number))
        before = count + self._own.waiting
        return line._by_total(before, line.amount), before

    def _arrive(
        self, number: int, turns: list[tuple[float, tuple[int, int], int]], virtual: float
    ) -> None:
        queue = self._queues[number]
        if not queue.waiting:
            queue.tag = max(queue.tag, virtual)
            heappush(turns, (queue.tag, queue.order, number))
        queue.waiting += 1

    def _room_at(self, at: float, amount: int) -> float:
        """When there may be room: at `at`, or when some more is free."""
        while self._free and self._free[0][0] <= at:
            self._used -= self._free.popleft()[1]
        if self._line.pace > 0:
            ahead_us = max(0.0, self._line.pace - amount * self._each)
            at = max(at, ceil((self._even - ahead_us) / 1000))
        if self._used + amount > self._line.bound and self._free and self._line.sort != "b":
            at = max(at, self._free[0][0])
        return at

    def _take(self, at: float, amount: int) -> None:
        line = self._line
        self._used += amount
        if line.sort == "q":
            reset_at = line.free[0][0]
            day = ceil((at - reset_at + 1) / _DAY_MS) if at >= reset_at else 0
            self._free.append((reset_at + day * _DAY_MS, amount))
        elif line.sort == "r":
            end = (at // line.width + 1) * line.width if line.width else at
            self._free.append((int(end) + line.span, amount))
        if line.pace > 0:
            self._even = max(self._even, at * 1000) + amount * self._each


def read_line(values: list[Any]) -> WaitingLine:
    """The line in an answer of `position`."""
    line = WaitingLine(*values[:21])
    return replace(line, rivals=[Rival(*row[:5]) for row in line.rivals])
