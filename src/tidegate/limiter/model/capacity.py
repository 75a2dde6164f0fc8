"""Capacity of a limit: whether a call fits, beside pauses, bands and their least shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor

from tidegate.limiter.messages import SyncRequest
from tidegate.limiter.model.rates import DAY_MS, span_of
from tidegate.limiter.model.state import LimitState, PoolState, Restored, read_member
from tidegate.limiter.policy import Concurrency, Quota, Rate

# The bound by which a limit without a bound resumes after a pause.
RAMP_BOUND = 64

# While a higher band uses a rate, lower bands leave 1/LEFT_FREE of it free.
LEFT_FREE = 20


@dataclass(eq=False, repr=False)
class Capacity:
    """The room under each limit of a pool. Lua: `limits`, `capacity`, `pauses` and `rates`.

    local: session -> limit -> the total that its process has admitted by its local share, as last
    reported.
    """

    pool: PoolState
    local: dict[str, dict[str, int]] = field(default_factory=dict)

    def cap(self, limit: LimitState, band: int) -> int:
        """Return how many calls, or tokens in flight, a band may have under a concurrency limit."""
        bound = limit.adapted() // 1000 if limit.minimum else limit.limit.bound
        passing, passed = limit.passing
        above = self.pool.band_rule(passed if band == passing else band)[1]
        if above == 0:
            return bound
        return max(min(bound, 1), bound * (1000 - above) // 1000)

    def spent(self, limit: LimitState) -> int:
        spending = limit.spending
        reset_at = spending.reset_at
        spent = spending.look(limit.limit, self.pool.now, self.pool.resets.get(limit.name, 0))
        if spending.reset_at < reset_at and limit.waits:
            limit.note_room_at(spending.reset_at)  # its timer is too late
        return spent

    def restore(
        self,
        limit: LimitState,
        q: SyncRequest,
        seen: int,
        seq: int,
        since: Sequence[int],
        *,
        is_new: bool,
    ) -> None:
        """Restore a rate after a loss by what a session saw, and has admitted since.

        is_new: it has changed in this epoch, whose usage is in no report if the record was empty.
        """
        if not limit.is_rate:
            return
        spent, kept = self.spent(limit), self.pool.kept
        found = limit.restored
        if found is None:
            base = limit.asserted
            if base == 0 and (kept or isinstance(limit.limit, Quota) or not is_new):
                base = spent
            found = limit.restored = Restored(*(kept or (0, 0)), base)
        more = found.more_seen(q.epoch, seen, seq) + found.more_later(q.epoch, q.sid, since)
        limit.spending.add(limit.limit, more, self.pool.now)
        limit.asserted = max(found.base, 1)

    def count_local(self, sid: str, own: Sequence[tuple[str, int, int]]) -> None:
        """Count what a process admitted of rates by its local share.

        A join whose reply was lost is repeated: what an earlier one reported is not counted again.
        """
        before = self.local.pop(sid, {})
        for name, amount, total in own:
            limit = self.pool.limit(name)
            if limit.is_rate:
                self.spent(limit)
                more = min(amount, total - before.get(name, 0))
                limit.spending.add(limit.limit, more, self.pool.now)
            self.local.setdefault(sid, {})[name] = total

    def is_admitted_by_pause(self, limit: LimitState) -> bool:
        """Return whether a pause or gate admits a call; if only time frees it, set `retry_at`."""
        pause = self.pool.pause_of(limit)
        bound = RAMP_BOUND if limit.is_implicit else limit.limit.bound
        if pause is None:
            return True
        if self.pool.now < pause.until:
            limit.note_room_at(pause.until)
            return False
        if pause.gate is not None:
            if not self.pool.is_tried(pause.gate):
                return True
            limit.note_room_at(self.pool.now + pause.gate.every_ms)
            return False
        if pause.passed < 1 + bound * (self.pool.now - pause.until) // pause.ramp_ms:
            return True
        at = pause.until + -(-pause.passed * pause.ramp_ms // max(1, bound))
        limit.note_room_at(max(min(at, pause.until + pause.ramp_ms), self.pool.now + 1))
        return False

    def ramp_after(self, limit: LimitState, before: int) -> int:
        """Return when the ramp after a pause admits a call, after calls that take `before`.

        0 for now, or for a gate.
        """
        pause = self.pool.pause_of(limit)
        if pause is None or pause.gate is not None:
            return 0
        bound = RAMP_BOUND if limit.is_implicit else limit.limit.bound
        ramp_ms = ceil((pause.passed + before) * pause.ramp_ms / max(1, bound))
        at = pause.until + min(pause.ramp_ms, ramp_ms)
        return at if at > self.pool.now else 0

    def is_full(self, limit: LimitState, band: int, amount: int) -> bool:
        """Return True if `amount` does not fit; if only time frees it, set `retry_at`."""
        if not self.is_admitted_by_pause(limit):
            return True
        if isinstance(limit.limit, Concurrency):
            cap = self.cap(limit, band)
            needed = max(1, min(amount, cap)) if limit.by_tokens else 1
            if limit.by_tokens and amount > limit.limit.bound:
                return True
            return cap <= 0 or limit.used + limit.reserved + needed > cap
        spent, bound = self.spent(limit), limit.limit.bound
        if amount == 0:
            return False
        amount = limit.clamped(amount)
        if bound and self._paced_at(limit, amount):
            limit.note_room_at(self.free_at(limit, amount))
            return True
        if 0 < spent + amount <= bound:
            at = self._beside_bands_at(limit, band, amount)
            if at:
                limit.note_room_at(at)
            return at > 0
        limit.note_room_at(limit.spending.room_at(limit.limit, amount, self.pool.now))
        return True

    def is_used_up(self, limit: LimitState, amount: int) -> bool:
        """Return whether a demand lacks what calls have used, not only the next moment of an
        even flow.
        """
        assert isinstance(limit.limit, Rate)
        spent, bound, amount = self.spent(limit), limit.limit.bound, limit.clamped(amount)
        if not bound or not self._paced_at(limit, amount) or spent + amount > bound:
            return True
        return limit.spending.grows_too_fast(limit.limit, amount, self.pool.now)

    def free_at(self, limit: LimitState, amount: int) -> int:
        """Return when time alone makes room for `amount`; 0 if there is room, or never any."""
        spent, bound, amount = self.spent(limit), limit.limit.bound, limit.clamped(amount)
        if amount == 0 or bound == 0:
            return 0
        at = self._paced_at(limit, amount)
        if spent + amount <= bound:
            return at
        return max(at, limit.spending.room_at(limit.limit, amount, self.pool.now))

    def certain_at(self, limit: LimitState, amount: int, at: int) -> int:
        """Return the time before which there is certainly no room, where time alone makes it `at`.

        Calls that are admitted until then may raise the bound of a ramp.
        """
        if isinstance(limit.limit, Rate) and limit.limit.ramp is not None and at:
            return self.free_after(limit, 0, amount)
        return at

    def _paced_at(self, limit: LimitState, amount: int) -> int:
        now = self.pool.now
        return limit.spending.paced_at(
            limit.limit, amount, limit.spending.taken(limit.limit, now), now
        )

    def free_after(self, limit: LimitState, before: int, amount: int) -> int:
        """Return as `free_at`, after calls that take `before` together.

        `before` may be negative: the amount expected to be returned. Never later than the actual
        time if no waiter leaves.
        """
        spent, bound, amount = self.spent(limit), limit.limit.bound, limit.clamped(amount)
        total = before + amount
        if amount == 0 or bound == 0 or total <= 0:
            return 0
        at = limit.spending.paced_after(limit.limit, max(0, before), amount, self.pool.now)
        if isinstance(limit.limit, Quota):
            over = spent + total - bound
            days = (over - 1) // bound * DAY_MS
            return max(at, limit.spending.reset_at + days) if over > 0 else at
        assert isinstance(limit.limit, Rate)
        if limit.limit.shape == "bucket":
            if spent + total <= bound:
                return at
            return max(at, limit.spending.room_after(limit.limit, total, self.pool.now))
        windows = (total - 1) // bound
        rest, room_at = total - windows * bound, 0
        if spent + rest > bound:
            room_at = limit.spending.room_at(limit.limit, rest, self.pool.now)
        if windows:
            room_at = max(room_at, self.pool.now) + windows * span_of(limit.limit)
        return max(at, room_at)

    def grown_after(self, limit: LimitState, before: int, amount: int) -> int:
        """Return when a ramp has grown enough for `amount`, after calls that take `before`, with as
        many calls as it admits: an estimate. 0 for now, or without a ramp.
        """
        rule, now = limit.limit, self.pool.now
        self.spent(limit)
        pacing, amount = limit.spending.pacing, limit.clamped(amount)
        total = before + amount
        if not isinstance(rule, Rate) or rule.ramp is None or pacing is None:
            return 0
        if pacing.since == 0 or amount == 0 or total <= 0:
            return 0

        def fits(at: int) -> bool:
            left = limit.spending.left_at(rule, at)
            return (left == 0 and before <= 0) or left + total <= pacing.bound_at(rule, at, now)

        if fits(now):
            return 0
        span = span_of(rule)
        start, end, windows = now, now + span, 0
        if not fits(end):
            # What a window admits is spread over it.
            while windows < 1000 and total > pacing.bound_at(rule, end, now):
                total -= pacing.bound_at(rule, end, now)
                start, end, windows = end, end + span, windows + 1
            return start + floor(max(0, total) / pacing.bound_at(rule, end, now) * span)
        while end - start > max(1, span / 4096):
            middle = (start + end) // 2
            start, end = (start, middle) if fits(middle) else (middle, end)
        return end

    def has_room(self, limit: LimitState, band: int, amount: int) -> bool:
        """Return whether `amount` fits; a limit in shadow mode delays only by a pause."""
        if limit.limit.shadow:
            return self.is_admitted_by_pause(limit)
        return not self.is_full(limit, band, amount)

    def share(self, number: int) -> int:
        return self.pool.band_rule(number)[0] if number > 1 else 0

    def _lasts_us(self, limit: LimitState, number: int, amount: int) -> int:
        """Return how long the band's share takes to give `amount`.

        Under a ramp it is a share of what a window may take now.
        """
        assert isinstance(limit.limit, Rate)
        bound, span_ms = limit.limit.bound, span_of(limit.limit)
        if limit.spending.pacing is not None:
            bound = limit.spending.pacing.bound(limit.limit, self.pool.now)
        return floor(amount / bound * span_ms * 1_000_000 / self.share(number)) if bound else 0

    def head_amount(self, limit: LimitState, number: int) -> int:
        """Return how much the first ticket of a band takes."""
        band = limit.band(number)
        _, queue = band.line_front(band.front()[1])
        member = read_member(queue.first()[0])
        return limit.clamped(member.amount(queue.flow.lane.index(limit.name)))

    def _reserved_for(self, limit: LimitState, number: int) -> int:
        """Return how much of its first ticket's amount is kept free for a band.

        As much as it is owed, if a window's share is enough for the ticket. For a larger ticket
        nothing until the last window before all of it is owed, then increasingly more.
        """
        assert isinstance(limit.limit, Rate)
        band = limit.band(number)
        if not band.lines or band.passed_us <= band.from_us or not self.share(number):
            return 0
        amount = self.head_amount(limit, number)
        needed_us = self._lasts_us(limit, number, amount)
        rising_us = min(needed_us, span_of(limit.limit) * 1000)
        left_us = needed_us - (band.passed_us - band.from_us)
        if left_us <= 0:
            return amount
        return max(0, floor(amount * ((rising_us - left_us) / rising_us)))

    def kept_below(self, limit: LimitState, number: int) -> int:
        """Return how much of a rate is kept free for the calls of lower bands."""
        if not isinstance(limit.limit, Rate):
            return 0
        return sum(self._reserved_for(limit, below) for below in limit.bands if below > number)

    def has_saved(self, limit: LimitState, number: int, amount: int) -> bool:
        band = limit.band(number)
        if band.passed_us <= band.from_us or not self.share(number):
            return False
        return band.passed_us - band.from_us >= self._lasts_us(limit, number, amount)

    def _beside_bands_at(self, limit: LimitState, number: int, amount: int) -> int:
        """Return when a demand that fits leaves free what is kept for other bands; 0 for now.

        Never so much is kept that the demand could not be met at all.
        """
        if not isinstance(limit.limit, Rate):
            return 0
        now, span_ms, kept = self.pool.now, span_of(limit.limit), self.kept_below(limit, number)
        at = self._room_beside(limit, amount, kept)
        if number == 1 or self.has_saved(limit, number, amount):
            return at
        above = [band for higher, band in limit.bands.items() if higher < number]
        held_at = max((min(band.held_at, now) for band in above), default=0)
        if held_at + span_ms > now:
            return held_at + span_ms
        used_at = max((band.used_at for band in above), default=0)
        if used_at + span_ms <= now:
            return at
        left_at = self._room_beside(limit, amount, kept + limit.limit.bound // LEFT_FREE)
        return min(left_at, max(at, used_at + span_ms))

    def taken_above(self, limit: LimitState, number: int) -> int:
        """Return about how much bands above `number` took of a rate in the last window."""
        if not isinstance(limit.limit, Rate):
            return 0
        now, span_ms = self.pool.now, span_of(limit.limit)
        higher = (band for other, band in limit.bands.items() if other < number)
        return sum(band.taken_lately(now, span_ms) for band in higher)

    def beside_bands(
        self, limit: LimitState, number: int, before: int, amount: int
    ) -> tuple[int, bool]:
        """Return `before` with what higher bands take of a rate until so much and `amount` more are
        admitted, as in the last window; and whether they take any.
        """
        taken, bound = self.taken_above(limit, number), limit.limit.bound
        if not taken or not bound:
            return before, False
        left = max(1, bound - taken - bound // LEFT_FREE, bound * self.share(number) // 1000)
        amount = limit.clamped(amount)
        return floor((before + amount) * (bound / left)) - amount, True

    def is_behind_bands(self, limit: LimitState, number: int) -> bool:
        """Return whether higher bands take what a rate gives beyond the least share of a band."""
        if not isinstance(limit.limit, Rate):
            return False
        now, span_ms = self.pool.now, span_of(limit.limit)
        above = [one for higher, one in limit.bands.items() if higher < number]
        held_at = max((min(one.held_at, now) for one in above), default=0)
        return any(one.lines for one in above) or (held_at > 0 and held_at + span_ms > now)

    def by_least_share(self, limit: LimitState, number: int, total: int, room_at: int) -> int:
        """Return when the least share of a band has given it `total`, not before `room_at`.

        A window has room at one moment of each window, when what it took together is free again:
        for a quarter of it at most.
        """
        rule, band, now = limit.limit, limit.band(number), self.pool.now
        assert isinstance(rule, Rate)
        if not self.share(number) or rule.bound == 0:
            return room_at
        owed_us = band.from_us if band.passed_us else now * 1000
        owed_us = max(owed_us, (now - span_of(rule)) * 1000)
        at = ceil((owed_us + self._lasts_us(limit, number, total)) / 1000)
        if at <= room_at or rule.shape == "bucket" or limit.spending.is_paced(rule):
            return max(at, room_at)
        windows, rest_ms = divmod(at - room_at, span_of(rule))
        return at if rest_ms * 4 <= span_of(rule) else room_at + (windows + 1) * span_of(rule)

    def _room_beside(self, limit: LimitState, amount: int, kept: int) -> int:
        """Return when `amount` and what is kept fit; 0 if they fit now."""
        total = min(amount + kept, limit.limit.bound)
        if self.spent(limit) + total <= limit.limit.bound:
            return 0
        return limit.spending.room_at(limit.limit, total, self.pool.now)

    def count_shares(self, limit: LimitState, number: int, amount: int) -> None:
        """Record that a call of a band took something of a rate.

        Waiting lower bands are passed by it, and it uses the band's own share.
        """
        if not isinstance(limit.limit, Rate) or amount == 0:
            return
        now_us, window_us = self.pool.now * 1000, span_of(limit.limit) * 1000
        limit.band(number).take(limit.clamped(amount), self.pool.now, span_of(limit.limit))
        for below, band in limit.bands.items():
            if below > number and band.lines and self.share(below):
                if not band.passed_us:
                    band.from_us = max(band.from_us, now_us)
                band.passed_us = now_us
        if self.share(number):
            band = limit.band(number)
            needed_us = self._lasts_us(limit, number, limit.clamped(amount))
            earliest = band.passed_us - needed_us - window_us if band.passed_us else now_us
            band.from_us = min(max(band.from_us, earliest) + needed_us, now_us + window_us)
