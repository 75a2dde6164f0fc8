"""Spending of a rate or a day quota, counted in one of three ways.

Invariant: an admission counts until a whole window has passed, never for less. Times are ms of the
server's clock; amounts are in the limit's unit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil, floor

from tidegate.limiter.policy import MAX_BOUND, Limit, Quota, Rate

DAY_MS = 86_400_000
# A day that ends this much later is another day, even when clocks change.
NEXT_DAY_MS = 22 * 3_600_000
MINUTE_MS = 60_000

# A charge: the amount taken, and the end of the bucket or day that it was taken from.
Charge = tuple[int, int]


def span_of(rate: Rate) -> int:
    """Return how long an admission counts; the call may arrive later than it was admitted."""
    return rate.window_ms + rate.slack + 1


@dataclass(slots=True)
class Pacing:
    """State of a rate with a pace or a ramp. Lua: `pacing`.

    By `even_us` an even flow has caught up with all that was taken. A call is admitted if, with its
    own part, it is at most the pace ahead (GCRA, ITU-T I.371). Under a ramp a window may take at
    most `level`, plus the ramp's percentage of it for each minute since `since`. The first call
    after a minute sets the level to what was taken in the last window, at least the ramp's start;
    `since` is 0 before the first call of all. `even_us` is at most a window ahead, so that neither
    what was taken in shadow nor an earlier, longer window delays calls for longer.
    """

    even_us: int = 0
    level: int = 0
    since: int = 0

    @staticmethod
    def _lasts_us(limit: Rate, amount: int) -> int:
        return ceil(amount * span_of(limit) * 1000 / max(1, limit.bound))

    def bound(self, limit: Rate, now: int) -> int:
        """Return what a window may take now."""
        if limit.ramp is None or self.since == 0:
            return limit.bound
        percent = limit.ramp.percent_per_minute
        more = self.level * percent * max(0, now - self.since) / 6_000_000
        return min(limit.bound, self.level + floor(more))

    def bound_at(self, limit: Rate, at: int, now: int) -> int:
        """Return what a window may take at a later time if calls take all that the ramp admits."""
        assert limit.ramp is not None
        level: float = self.level
        since, percent = self.since, limit.ramp.percent_per_minute
        if now - since >= MINUTE_MS:
            level, since = max(limit.ramp.start, self.bound(limit, now)), now
        while at - since >= MINUTE_MS and level < limit.bound:
            level, since = level + level * percent / 100, since + MINUTE_MS
        return min(limit.bound, floor(level + level * percent * (at - since) / 6_000_000))

    def grown_at(self, limit: Rate, needed: int) -> int:
        """Return when the ramp's bound reaches `needed`, if nothing is taken until then."""
        assert limit.ramp is not None
        more = max(0, needed - self.level)
        return self.since + ceil(more * 6_000_000 / (self.level * limit.ramp.percent_per_minute))

    def even_after(self, limit: Rate, before: int, amount: int, now: int) -> int:
        """Return when an even flow has room for `amount` after `before`, if nothing is returned."""
        if limit.pace_ms is None:
            return 0
        even_us = self.even_us
        if before:
            even_us = max(even_us, now * 1000) + self._lasts_us(limit, before)
        earliest_us = even_us - max(0, limit.pace_ms * 1000 - self._lasts_us(limit, amount))
        return ceil(earliest_us / 1000) if earliest_us > now * 1000 else 0

    def take(self, limit: Rate, amount: int, spent: int, now: int) -> None:
        """Count an admission. `spent` already includes `amount`."""
        if limit.pace_ms is not None:
            self.even_us = max(self.even_us, now * 1000) + self._lasts_us(limit, amount)
            self.cap_even(limit, now)
        if limit.ramp is not None and now - self.since >= MINUTE_MS:
            self.level, self.since = max(limit.ramp.start, spent), now

    def return_excess(self, limit: Rate, amount: int, now: int) -> None:
        """Return what was reserved in excess, or, if negative, take what was used in addition."""
        if limit.pace_ms is None or amount == 0:
            return
        if amount > 0:
            self.even_us = max(0, self.even_us - self._lasts_us(limit, amount))
        else:
            self.even_us = max(self.even_us, now * 1000) + self._lasts_us(limit, -amount)
            self.cap_even(limit, now)

    def cap_even(self, limit: Rate, now: int) -> None:
        self.even_us = min(self.even_us, (now + span_of(limit)) * 1000)


@dataclass(slots=True)
class Bucket:
    """Level of a token bucket that refills evenly. Lua: `bucket`.

    One unit of the limit's amount is as many units here as its window has ms, so that `bound` units
    refill per ms. The level is the maximum over earlier times of what was taken since, less what
    has refilled since. It is computed from the parts of a window, so that what a call returns
    counts as never taken. A part counts as taken when the last of its calls may reach the provider,
    and refills from then on.

    units: the level at the part that ends at `end`, which includes all earlier parts. before: until
    `until`, the bucket refilled by this many units per ms. The level is at most twice the bound, so
    that no call waits for longer than a window.
    """

    units: int
    end: int
    window: int
    bound: int
    before: int = 0
    until: int = 0

    @staticmethod
    def _capped(limit: Rate, units: int) -> int:
        return min(units, 2 * (limit.bound or MAX_BOUND) * limit.window_ms)

    def _refilled(self, start: int, end: int) -> int:
        if end <= start:
            return 0
        if start >= self.until:
            return (end - start) * self.bound
        part = min(end, self.until)
        return (part - start) * self.before + (end - part) * self.bound

    def _fold_change(self, lag: int, buckets: dict[int, int]) -> None:
        """Fold what was taken before an earlier change of the bound into the level at that
        change.
        """
        at = self.end + lag
        if self.until <= at:
            return
        most = 2 * (max(self.bound, self.before) or MAX_BOUND) * self.window
        for end in sorted(buckets):
            if self.end < end <= self.until - lag:
                left = max(0, self.units - self._refilled(at, end + lag))
                self.units = min(most, left + buckets[end] * self.window)
                at = end + lag
        left = max(0, self.units - self._refilled(at, self.until))
        self.units = min(left, 2 * (self.bound or MAX_BOUND) * self.window)
        self.end = self.until - lag

    def _apply_policy(self, limit: Rate, buckets: dict[int, int], now: int) -> None:
        """Apply a new bound or window; what has refilled until now stays refilled."""
        lag = span_of(limit) - limit.window_ms
        self._fold_change(lag, buckets)
        before = self.bound * limit.window_ms // self.window
        units = -(-self.units * limit.window_ms // self.window)
        refilled_ms = max(0, now - self.end - lag)
        # A level above the maximum of the new bound is reduced to it.
        self.units = min(units, self._capped(limit, units) + refilled_ms * before)
        self.window, self.bound, self.before, self.until = limit.window_ms, limit.bound, before, now

    def fold(self, limit: Rate, buckets: dict[int, int], now: int) -> None:
        """Forget parts from before the last window, except for the level that they led to."""
        if (self.window, self.bound) != (limit.window_ms, limit.bound):
            self._apply_policy(limit, buckets, now)
        lag = span_of(limit) - limit.window_ms
        for end in sorted(buckets):
            if self.end < end <= now - limit.window_ms:
                taken = buckets[end] * limit.window_ms
                self.units = self._with(limit, self.units, self.end + lag, end + lag, taken)
                self.end = end

    def _with(self, limit: Rate, units: int, at: int, moment: int, taken: int) -> int:
        """Return the level at `moment`, from `units` at an earlier time, plus what was taken then.

        The level at a change of the bound is at most two windows' worth from then on.
        """
        if self.until < moment:
            at, units = self._changed(limit, at, units)
            highest = limit.bound
        else:
            highest = max(self.bound, self.before)
        most = 2 * (highest or MAX_BOUND) * limit.window_ms
        return min(most, max(0, units - self._refilled(at, moment)) + taken)

    def _changed(self, limit: Rate, at: int, units: int) -> tuple[int, int]:
        """Return the time and level at the change of the bound, if that is later."""
        if at > self.until:
            return at, units
        left = max(0, units - self._refilled(at, self.until))
        return self.until, self._capped(limit, left)

    def _level(
        self, limit: Rate, buckets: dict[int, int], now: int
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return the level, and what does not refill yet: from when on, and how much."""
        lag = span_of(limit) - limit.window_ms
        units, at, fresh = self.units, self.end + lag, list[tuple[int, int]]()
        for end in sorted(end for end in buckets if end > self.end):
            taken = buckets[end] * limit.window_ms
            if end + lag > now:
                fresh.append((end + lag, taken))
            else:
                units = self._with(limit, units, at, end + lag, taken)
                at = end + lag
        if self.until <= now:
            at, units = self._changed(limit, at, units)
        return max(0, units - self._refilled(at, now)), fresh

    def units_at(self, limit: Rate, buckets: dict[int, int], now: int) -> int:
        level, fresh = self._level(limit, buckets, now)
        return self._capped(limit, level + sum(units for _, units in fresh))

    def room_at(self, limit: Rate, buckets: dict[int, int], amount: int, now: int) -> int:
        """Return when `amount` fits if nothing is returned."""
        level, fresh = self._level(limit, buckets, now)
        most, at = (limit.bound - amount) * limit.window_ms, now
        for position, (moment, units) in enumerate(fresh):
            rest = sum(each for _, each in fresh[position:])
            if rest <= most:
                room_at = at + max(0, -(-(level + rest - most) // limit.bound))
                if room_at < moment:
                    return room_at
            level = self._capped(limit, max(0, level - (moment - at) * limit.bound) + units)
            at = moment
        return at + max(0, -(-(level - most) // limit.bound))


@dataclass(slots=True)
class RateSpending:
    """All that was counted for one limit, also while it was of another type.

    log: the time of each admission. buckets: end in ms -> amount. used, reset_at: of the day.
    pacing: of a rate with a pace or a ramp. bucket: of a token bucket, once something was taken.
    charged: amounts charged beside a bound, by the part of a window or the day in which they count.
    changed: something was spent or returned in this call.
    """

    log: list[int] = field(default_factory=list)
    buckets: dict[int, int] = field(default_factory=dict)
    used: int = 0
    reset_at: int = 0
    charged: dict[int, int] = field(default_factory=dict)
    changed: bool = False
    pacing: Pacing | None = None
    bucket: Bucket | None = None

    def look(self, limit: Limit, now: int, reset_at: int) -> int:
        """Return what is spent, and forget what no longer counts.

        `reset_at`: the end of the day as reported by a process, 0 if not reported.
        """
        if isinstance(limit, Quota):
            is_over = self.reset_at <= now
            # A process that considers the day over a moment early reports the next day's end.
            is_this_day = is_over or reset_at - self.reset_at < NEXT_DAY_MS
            if is_over:
                self.used, self.reset_at = 0, now + DAY_MS
            if reset_at > now and is_this_day:
                self.reset_at = reset_at
            return self.used
        assert isinstance(limit, Rate)
        if limit.exact:
            while self.log and self.log[0] + span_of(limit) <= now:
                del self.log[0]
            return len(self.log)
        if self._is_due(limit, now):
            self._opened(limit).fold(limit, self.buckets, now)
        over = now - span_of(limit)
        if self.buckets and min(self.buckets) <= over:
            self.buckets = {end: amount for end, amount in self.buckets.items() if end > over}
        if limit.shape == "bucket":
            return -(-self._units(limit, now) // limit.window_ms)
        return sum(self.buckets.values())

    def taken(self, limit: Limit, now: int) -> int:
        """Return what was taken in the last window, for a bucket possibly more than is spent.

        Call it after `look`.
        """
        if isinstance(limit, Rate) and limit.shape == "bucket":
            return sum(self.buckets.values())
        return self.look(limit, now, 0)

    def taken_since(self, limit: Limit, at: int) -> int:
        """Return what was taken after a time, including the whole part of a window that contains
        it.

        Of a day, all. Call it after `look`.
        """
        if isinstance(limit, Quota):
            return self.used
        if isinstance(limit, Rate) and limit.exact:
            return sum(each > at for each in self.log)
        return sum(amount for end, amount in self.buckets.items() if end > at)

    def left_at(self, limit: Rate, at: int) -> int:
        """Return how much of what was taken in the last window still counts at a time.

        Call it after `look`.
        """
        span = span_of(limit)
        if limit.exact:
            return sum(each + span > at for each in self.log)
        return sum(amount for end, amount in self.buckets.items() if end + span > at)

    def _is_due(self, limit: Rate, now: int) -> bool:
        """Return whether the level must be updated: by parts, or by another bound or window."""
        if limit.shape != "bucket":
            return False
        found = self.bucket
        if found is not None and (found.window, found.bound) != (limit.window_ms, limit.bound):
            return True
        after = 0 if found is None else found.end
        return any(after < end <= now - limit.window_ms for end in self.buckets)

    def _opened(self, limit: Rate) -> Bucket:
        if self.bucket is None:
            self.bucket = Bucket(0, 0, limit.window_ms, limit.bound)
        return self.bucket

    def _units(self, limit: Rate, now: int) -> int:
        bucket = self.bucket or Bucket(0, 0, limit.window_ms, limit.bound)
        return bucket.units_at(limit, self.buckets, now)

    def level_us(self, limit: Rate, now: int) -> int:
        """Return the time until all has refilled. Call it after `look`."""
        return -(-self._units(limit, now) * 1000 // limit.bound) if limit.bound else 0

    def room_at(self, limit: Limit, amount: int, now: int) -> int:
        """Return when `amount` fits if nothing is returned. Call it after `look`."""
        if limit.bound == 0:
            return now + DAY_MS
        if isinstance(limit, Quota):
            return self.reset_at
        assert isinstance(limit, Rate)
        if limit.exact:
            return self.log[len(self.log) + amount - limit.bound - 1] + span_of(limit)
        if limit.shape == "bucket":
            bucket = self.bucket or Bucket(0, 0, limit.window_ms, limit.bound)
            return bucket.room_at(limit, self.buckets, min(amount, limit.bound), now)
        over = sum(self.buckets.values()) + min(amount, limit.bound) - limit.bound
        for end in sorted(self.buckets):
            over -= self.buckets[end]
            if over <= 0:
                return end + span_of(limit)
        return now + span_of(limit)

    def _end_now(self, limit: Limit, now: int) -> int:
        if isinstance(limit, Quota):
            return self.reset_at
        assert isinstance(limit, Rate)
        width = ceil(span_of(limit) / limit.buckets)
        return (now // width + 1) * width

    def _spend(self, limit: Limit, end: int, amount: int) -> None:
        self.changed |= amount != 0
        if isinstance(limit, Quota):
            self.used += amount
        else:
            self.buckets[end] = self.buckets.get(end, 0) + amount
            if isinstance(limit, Rate) and limit.shape == "bucket":
                self._opened(limit)

    def room_after(self, limit: Rate, total: int, now: int) -> int:
        """Return when calls that take `total` of a bucket, one after the other, have fitted."""
        if total <= limit.bound:
            return self.room_at(limit, total, now)
        over = self._units(limit, now) + (total - limit.bound) * limit.window_ms
        return now + -(-over // limit.bound)

    def take(self, limit: Limit, amount: int, now: int) -> Charge | None:
        """Count an admission; return what its settlement needs. Call it after `look`."""
        if amount == 0:
            return None
        if not limit.shadow:
            amount = min(amount, limit.bound)
        if isinstance(limit, Rate) and limit.exact:
            self.log.append(now)
            self.changed = True
            if self.is_paced(limit):
                self._paced().take(limit, 1, len(self.log), now)
            return None
        end = self._end_now(limit, now)
        self._spend(limit, end, amount)
        if isinstance(limit, Rate) and self.is_paced(limit):
            self._paced().take(limit, amount, self.taken(limit, now), now)
        return amount, end

    @staticmethod
    def is_paced(limit: Limit) -> bool:
        """Return whether a limit has a pace or a ramp."""
        return isinstance(limit, Rate) and (limit.pace_ms is not None or limit.ramp is not None)

    def _paced(self) -> Pacing:
        if self.pacing is None:
            self.pacing = Pacing()
        return self.pacing

    def paced_at(self, limit: Limit, amount: int, spent: int, now: int) -> int:
        """Return when an even flow and the ramp have room for `amount` if nothing is taken or
        returned until then; 0 for now.
        """
        if not isinstance(limit, Rate) or not self.is_paced(limit):
            return 0
        pacing = self.pacing or Pacing()
        at = pacing.even_after(limit, 0, amount, now)
        if spent > 0 and pacing.bound(limit, now) < min(spent + amount, limit.bound):
            at = max(at, now + 1, self._ramp_room_at(limit, amount, spent, now))
        return at

    def _ramp_room_at(self, limit: Rate, amount: int, spent: int, now: int) -> int:
        """Return when the ramp has room: its bound grows, and what was taken expires."""
        pacing, at, span = self.pacing or Pacing(), now, span_of(limit)
        parts = [(at, 1) for at in self.log] if limit.exact else sorted(self.buckets.items())
        for end, part in parts:
            needed = min(spent + amount, limit.bound)
            grown_at = pacing.grown_at(limit, needed) if spent > 0 else at
            if grown_at < end + span:
                return max(at, grown_at)
            at, spent = end + span, spent - part
        return at

    def grows_too_fast(self, limit: Rate, amount: int, now: int) -> bool:
        """Return whether a ramp has no room for `amount` beside what was taken.

        Call it after `look`.
        """
        taken, pacing = self.taken(limit, now), self.pacing or Pacing()
        return taken > 0 and pacing.bound(limit, now) < min(taken + amount, limit.bound)

    def paced_after(self, limit: Limit, before: int, amount: int, now: int) -> int:
        """Return as `paced_at`, after calls that take `before`, by the even flow alone.

        A ramp may have room sooner than its growth says: what was taken expires, and others that
        take more raise its level.
        """
        if not isinstance(limit, Rate) or not self.is_paced(limit):
            return 0
        return (self.pacing or Pacing()).even_after(limit, before, amount, now)

    def settle(self, limit: Limit, charge: Charge, actual: int, now: int) -> bool:
        """Correct a reservation; return True if something was returned. Call it after `look`.

        Excess is returned to the part it was taken from while that still counts, never to a window
        or day that has begun since. Additional use counts from now. The part is 0 if the server has
        lost it.
        """
        reserved, end = charge
        extra = actual - reserved
        if not extra:
            return False
        if isinstance(limit, Quota):
            if end >= self.reset_at:
                self._spend(limit, end, max(extra, -self.used))
            elif end == 0 and extra > 0:
                self._spend(limit, self.reset_at, extra)
        elif extra > 0:
            self._spend(limit, self._end_now(limit, now), extra)
        elif end in self.buckets and not self._is_folded(limit, end):
            self._spend(limit, end, max(extra, -self.buckets[end]))
        else:
            return True  # an even flow has made up for the call by now, too
        if isinstance(limit, Rate) and self.is_paced(limit):
            self._paced().return_excess(limit, -extra, now)
        return extra < 0

    def _is_folded(self, limit: Limit, end: int) -> bool:
        is_bucket = isinstance(limit, Rate) and limit.shape == "bucket"
        return is_bucket and self.bucket is not None and end <= self.bucket.end

    def add(self, limit: Limit, amount: int, now: int, most: int | None = None) -> None:
        """Count an amount spent elsewhere or before as spent now. Call it after `look`.

        A log counts at most `most`, if given, else at most its bound.
        """
        if amount <= 0:
            return
        if isinstance(limit, Rate) and limit.exact:
            counted = min(amount, limit.bound if most is None else most)
            self.log += [now] * counted
            self.changed |= counted > 0
        else:
            self._spend(limit, self._end_now(limit, now), amount)

    def add_evenly(self, limit: Limit, amount: int, now: int) -> None:
        """Count as `add`, but as if spent evenly over the last window. Call it after `look`.

        The amount then also expires evenly. A bucket refills evenly anyway.
        """
        if amount <= 0:
            return
        if not isinstance(limit, Rate) or limit.shape == "bucket":
            self.add(limit, amount, now)
        elif limit.exact:
            span, amount = span_of(limit), min(amount, limit.bound)
            times = [now - span * (amount - i) // amount for i in range(1, amount + 1)]
            self.log = sorted([*self.log, *times])
            self.changed |= amount > 0
        else:
            width, last = ceil(span_of(limit) / limit.buckets), self._end_now(limit, now)
            parts = span_of(limit) // width
            for part in range(1, parts + 1):
                own = amount * part // parts - amount * (part - 1) // parts
                if own:
                    self._spend(limit, last - (parts - part) * width, own)

    def _counted(self, limit: Limit) -> Counter[int]:
        """Return what counts, by the part of a window or the day."""
        if isinstance(limit, Quota):
            return Counter({self.reset_at: self.used})
        assert isinstance(limit, Rate)
        if limit.exact:
            return Counter(self._end_now(limit, at) for at in self.log)
        return Counter(self.buckets)

    def charge(self, limit: Limit, amount: int, now: int, *, evenly: bool) -> None:
        """Count an amount that an account has less than the bound in force. Call it after `look`.

        Counted as by `add` or `add_evenly`; a lower bound ends as much of it.
        """
        before, span = self._counted(limit), span_of(limit) if isinstance(limit, Rate) else 0
        (self.add_evenly if evenly else self.add)(limit, amount, now)
        known = Counter({end: n for end, n in self.charged.items() if end + span > now})
        self.charged = dict(known + (self._counted(limit) - before))

    def end_charges(self, limit: Limit, by: int, now: int) -> None:
        """Reduce charges because the bound will be lower by `by`. Call it after `look`.

        Each part is reduced in proportion, so that the rest expires as evenly as before. In a log,
        calls of a part continue to count until the part has expired for all of them.
        """
        counted, passed, removed = self._counted(limit), 0, 0
        ends = [end for end in sorted(self.charged) if not self._is_ending(limit, end, now)]
        parts = {end: min(self.charged[end], counted[end]) for end in ends}
        total = sum(parts.values())
        for end, amount in parts.items():
            passed += amount
            if amount and by < total:
                amount = min(amount, floor(by * (passed / total)) - removed)
            if amount:
                removed += amount
                self.charged[end] -= amount
                self._uncount(limit, end, amount)
        self.charged = {end: amount for end, amount in self.charged.items() if amount}

    def _is_ending(self, limit: Limit, end: int, now: int) -> bool:
        """Return whether part of a log's part may have expired, or a bucket's part is folded."""
        if isinstance(limit, Rate) and limit.exact:
            return self._end_now(limit, now - span_of(limit)) >= end
        return self._is_folded(limit, end)

    def _uncount(self, limit: Limit, end: int, amount: int) -> None:
        """Remove the first entries of a part of a log: what stays was admitted no earlier."""
        if isinstance(limit, Rate) and limit.exact:
            first = next(i for i, at in enumerate(self.log) if self._end_now(limit, at) == end)
            del self.log[first : first + amount]
            self.changed = True
        else:
            self._spend(limit, end, -amount)

    def rewind(self, by_ms: int) -> None:
        """Move times back after the clock was set back."""
        self.charged = {}
        self.log = [at - by_ms for at in self.log]
        self.buckets = {end - by_ms: amount for end, amount in self.buckets.items()}
        if self.bucket is not None:
            self.bucket.end = max(0, self.bucket.end - by_ms)
            self.bucket.until = max(0, self.bucket.until - by_ms)
        if self.pacing is not None:
            self.pacing.even_us = max(0, self.pacing.even_us - by_ms * 1000)
            self.pacing.since = max(0, self.pacing.since - by_ms)

    def carry_over(self, limit: Limit, now: int, bound_before: int) -> None:
        """Count what was counted in another way, before a change of the policy, as spent now.

        It may exceed a bound that was lowered too, so that it counts once the bound is raised
        again. Call it after `look`.
        """
        span, amount = (span_of(limit) if isinstance(limit, Rate) else DAY_MS), 0
        exact = isinstance(limit, Rate) and limit.exact
        if not exact:
            amount += sum(at + span > now for at in self.log)
            self.log = []
        # A clock that was set back while the limit was no rate left later times in the log.
        self.log = [min(at, now) for at in self.log]
        if exact or isinstance(limit, Quota):
            amount += sum(n for end, n in self.buckets.items() if end + span > now)
            self.buckets = {}
        if isinstance(limit, Rate):
            amount += self.used if self.reset_at > now else 0
            self.used = self.reset_at = 0
        if isinstance(limit, Rate) and limit.shape == "bucket" and self.bucket is None:
            # The bucket is as full as what was taken in its last window.
            units = limit.bound * limit.window_ms
            self.bucket = Bucket(units, now - span, limit.window_ms, limit.bound)
        if isinstance(limit, Rate) and self.pacing is not None:
            self.pacing.cap_even(limit, now)
        most = 2 * max(limit.bound, bound_before)
        self.add(limit, min(amount, most), now, most)
