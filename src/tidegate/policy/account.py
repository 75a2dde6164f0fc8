"""Other programs on an account: their use of its limits, measured from answers and counts. Pure.

Invariant: what others use is kept free by charges that end with the window of their limit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from tidegate.policy.learned import HeaderReading, OthersUse

# Fractions of a bound: others' use is acted on from NOTICED on until it falls below GONE. MARGIN is
# kept free in addition to their use, since it comes in bursts.
NOTICED, GONE, MARGIN = 0.05, 0.02, 0.03
# Levels of two buckets that differ by less than this fraction of the bound count as equal.
LEVEL_APART = 0.01
# Approximate time between two observations of the pool.
LOOK_S = 1.5
# Fraction of a difference that one observation corrects: single readings are late or rounded.
_STEP = 0.4
# While others use the account, or after its bound fell: once less than SPARE of the bound remains,
# an additional fraction is kept free that grows by GROWS with each observation up to MOST_MORE, and
# shrinks by ENDS afterwards.
SPARE, GROWS, ENDS, MOST_MORE = 0.06, 0.02, 0.01, 0.5
# A refusal shows that our count misses something, even if answers report little. For
# CAREFUL_WINDOWS windows after it, others' use counts below NOTICED too, with CAREFUL_MARGIN of the
# bound in addition. CUT of the bound is kept free besides, and declines evenly to 0 over
# CUT_WINDOWS windows.
CAREFUL_WINDOWS, CAREFUL_MARGIN = 10.0, 0.01
CUT, CUT_WINDOWS = 0.1, 3.0
# The same for a limit that no answer reports, so that only refusals show others' use. UNTOLD_CUT is
# kept free after a first refusal. All of it is kept for HELD_WINDOWS windows: a refusal within them
# halves what is left. Then UNTOLD_ENDS of the bound is released per window, and a refusal that
# follows adds NEXT_CUT, since what was released last was too much. MOST_UNTOLD_CUT is the most that
# is kept free, instead of MOST_MORE. All of it ends UNTOLD_WINDOWS windows after the last refusal.
# If a day's bound shows others' use, each refusal adds DAY_CUT, which ends over CAREFUL_WINDOWS.
UNTOLD_CUT, NEXT_CUT, MOST_UNTOLD_CUT = 0.35, 0.1, 0.9
HELD_WINDOWS, UNTOLD_WINDOWS, UNTOLD_ENDS, DAY_CUT = 4.0, 20.0, 0.03, 0.2
# A refusal that states when the window ends shows what others used of it. That use, extrapolated to
# a whole window, is kept free, plus REFUSED_MORE. Since it may have been a burst, the extrapolation
# is limited to what was used plus REFUSED_MOST. Others that came during that window used little of
# it, so a first refusal keeps UNTOLD_CUT free at least.
REFUSED_MORE, REFUSED_MOST = 0.1, 0.2
# For EVEN_WINDOWS windows after a refusal calls are admitted evenly while NEARLY_FULL of the bound
# is used: a window frees at one moment what was used at one moment, and all of that may be refused.
# Where only refusals show others, this lasts as long as a refusal counts, since the next will
# follow.
EVEN_WINDOWS, NEARLY_FULL = 2.0, 0.9
# How long a bound that a refusal stated is kept: below it no call is refused, so no refusal would
# report that it rose.
STATED_S = 3_600.0
# Refusals within this fraction of a window count as one, since calls in progress are refused too.
ONE_REFUSAL = 1 / 12
# How much later than the pool the headers of answers report a call, at most. Without this allowance
# a burst of our own calls would count as others' use.
READ_LATE_S = 5.0
# The longest call whose headers are used; our own counts are kept for that long.
MOST_LATE_S = 60.0
# A bucket is full again within this many windows; a later reset is not of a bucket of that window.
_MOST_WINDOWS = 2.0
# How long before the provider a pool counts a call, at most.
SENT_LATE_S = 1.0
# A charge of more than EVENLY_FROM of the bound is spread evenly over the last window, in _PARTS
# parts, and so are the charges of an earlier leader. If it ended at one moment, many calls would be
# admitted together, and all of them might be refused.
EVENLY_FROM, _PARTS = 0.02, 60
# A charge is renewed this long before it ends, so that no capacity is free in between.
RENEWED_S = 2.5
# If the account's bound is less than FAR of the bound in force, margins may exceed it. Once its
# bucket is full but for IDLE of it, or we have used less than that in a window, PROBED of what
# others leave is admitted, since otherwise no call, and so no answer, would ever come again.
FAR, IDLE, PROBED = 0.08, 0.1, 0.5
_DAY_MS = 86_400_000
# Factor by which the window that a header implies may differ from a day, for a daily bucket.
NEAR = 1.2
# Limits of a shorter window reset before others' use would be noticed.
LEAST_WINDOW_S = 4 * RENEWED_S


@dataclass(slots=True)
class _Window:
    """A window of a limit that resets, as answers report it. Times are in seconds since 1970."""

    began_at: float
    ends_at: float
    used: int


class _Charge(NamedTuple):
    """An amount that keeps capacity free. Times are in seconds since 1970.

    at: from when it counts in the window. made_at: when it was charged.
    """

    at: float
    amount: int
    made_at: float


@dataclass(slots=True)
class _Sample:
    """An observation of the pool's counts.

    own: our use in the window, without charges. since: when the provider's windows began, as known
    then. recent: the pool's count since that time, charges included. level: the level of a bucket
    before the charge of this observation. charged: that charge. charged_at: when the pool had it.
    """

    at: float
    own: int
    since: float | None = None
    recent: int | None = None
    level: int = 0
    charged: int = 0
    charged_at: float = -inf

    def level_at(self, at: float, per_s: float) -> float:
        """Return the level that a bucket has later without use. A charge that came late found it
        lower, but never below 0."""
        charged_at = min(max(self.at, self.charged_at), at)
        before = max(0.0, self.level - per_s * (charged_at - self.at))
        return max(0.0, before + self.charged - per_s * (at - charged_at))


@dataclass(slots=True)
class _DayBound:
    """A bound on a day's calls that answers report. Times are in seconds since 1970.

    usual: the value that corresponds to the bound in force. now: the latest value. at: when it was
    reported. fell_at: when it last fell.
    """

    usual: int
    now: int
    at: float
    fell_at: float = -inf

    def take(self, reading: HeaderReading) -> None:
        if reading.at > self.at:
            if reading.bound < self.now:
                self.fell_at = reading.at
            self.now, self.at = reading.bound, reading.at

    def overdrawn_until(self, window_s: float) -> float:
        """Return until when use from before the bound fell may leave a bucket empty."""
        windows = min(self.usual / self.now - 1, CAREFUL_WINDOWS)
        return self.fell_at + max(0.0, windows) * window_s


@dataclass(slots=True)
class AccountUse:
    """Use of one limit of an account in the last window, by all as headers report it, and by us.

    For a bucket, total use is what remained at one answer less what remained at the next, plus the
    refill between them; for a window that resets, it is what does not remain. The pool counts our
    use, and the rest is others'. If our count is above the provider's there are no others; if it is
    below, the difference is kept free, whatever its cause. Headers are as of the start of a call
    but arrive with its answer, so they are compared with what the pool counted at that time. After
    a refusal more of a window is kept free, since answers may report too little.

    refills: the limit is a bucket, unless its readings show that it resets.

    If no answer reports the limit, answers may report a day's bound on the same calls. That shows
    what others use but not what remains. It also shows a change of the account's tier, which
    changes all bounds of a model in about the same proportion.
    """

    window_s: float
    span_s: float
    refills: bool
    others: float = 0.0
    acts: bool = False
    _more: float = 0.0
    _last: HeaderReading | None = None
    _last_of_day: HeaderReading | None = None  # used if there is no other reading
    _day_bound: _DayBound | None = None
    # Times of two consecutive answers, and what was used between them.
    _used: deque[tuple[float, float, float]] = field(default_factory=deque)
    _windows: deque[_Window] = field(default_factory=deque)
    _others_use: deque[tuple[float, float]] = field(default_factory=deque)  # time, others' use
    _is_new: bool = False  # whether a reading of a window is not compared yet
    _samples: deque[_Sample] = field(default_factory=deque)
    _charges: deque[_Charge] = field(default_factory=deque)
    evenly: bool = False  # whether the last charge counts evenly over the last window
    _counted: int = 0  # the pool's count after the last observation and its charge
    _has_lost: bool = False
    _refused_at: float = -inf
    _cut: float = 0.0  # fraction of the bound kept free, as of the last refusal
    _known_until: float = -inf  # others' use is not lowered before
    _stated: tuple[int, float] = (0, -inf)  # a bound that a refusal stated, and when
    _cut_before: float = 0.0
    _least_cut: float = 0.0  # of the last refusal, whatever it shows of others
    # When the window of the last refusal began; None once others' use of it is known.
    _refused_from: float | None = None

    def read(self, reading: HeaderReading) -> None:
        """Take a reading.

        It is ignored if it is not newer than the last, or if its call took longer than MOST_LATE_S.
        """
        last = self._last
        if reading.remaining is None or (last is not None and reading.at <= last.at):
            return
        if reading.received_at - reading.at > MOST_LATE_S:
            return
        self._last = reading
        is_window = not self.refills or reading.reset_ms is not None
        is_comparable = last is not None and last.bound == reading.bound
        if not is_window or not is_comparable:
            self._windows.clear()
            self._others_use.clear()
        if is_window:
            self._read_window(reading, reading.bound - reading.remaining)
            return
        if last is None or last.remaining is None or not is_comparable:
            return
        if (passed_s := reading.at - last.at) > self.window_s:
            return
        before = self._left_at(last, last.remaining)
        used = before - self._left_at(reading, reading.remaining)
        used += _refilled_to(reading, before, self.window_s * 1000, passed_s)
        self._used.append((last.at, reading.at, used))

    def read_day(self, reading: HeaderReading | None) -> None:
        """Take a reading of a day's bound that refills evenly, for a limit that no answer reports.

        None: no answer reports the day's bound either.
        """
        last = self._last_of_day
        if reading is not None and self._day_bound is None:
            self._day_bound = _DayBound(reading.bound, reading.bound, reading.at)
        elif reading is not None and self._day_bound is not None:
            self._day_bound.take(reading)
        if reading is None or not _refills_in_a_day(reading):
            self._last_of_day = None
            if last is not None:
                self._used.clear()
            return
        is_known = last is not None and reading.at <= last.at
        if self.is_reported or is_known or reading.received_at - reading.at > MOST_LATE_S:
            return
        self._last_of_day = reading
        if last is None or last.remaining is None or last.bound != reading.bound:
            return
        if (passed_s := reading.at - last.at) <= self.window_s:
            used = float(last.remaining - (reading.remaining or 0))
            used += _refilled_to(reading, last.remaining, _DAY_MS, passed_s)
            self._used.append((last.at, reading.at, used))

    def refuse(self, at: float, reset_s: float | None = None) -> None:
        """Take a refusal of a call that fits our own count.

        Others that use little before a backlog of ours takes the rest hardly show in answers, and
        not at all if no header reports the limit. `reset_s`: seconds until the limit's window
        resets, as the refusal states.
        """
        day = self._day_bound
        if day is not None and not self.is_reported and at <= day.overdrawn_until(self.window_s):
            return
        if at > self._refused_at + ONE_REFUSAL * self.window_s:
            before, self._least_cut = self._cut_left(at), 0.0
            if self.is_reported:
                self._cut = min(before + CUT, MOST_MORE)
            else:
                cut = before + DAY_CUT if self._newest else self._untold_cut(at, before)
                self._cut = min(cut, MOST_UNTOLD_CUT)
            self._cut_before = before
            self._refused_at, self._refused_from = at, None
            if not self.is_reported and reset_s is not None and 0 < reset_s < self.window_s:
                self._refused_from = at + reset_s - self.window_s

    def _untold_cut(self, at: float, before: float) -> float:
        """Return what a refusal keeps free of a limit that only refusals show.

        `before`: what the earlier ones do. It is 0 within HELD_WINDOWS if a stated bound explained
        the last refusal.
        """
        is_held = at < self._refused_at + HELD_WINDOWS * self.window_s
        is_first = not before if is_held else not self.is_careful(at)
        if is_first:
            self._least_cut = UNTOLD_CUT
            return UNTOLD_CUT
        return before + ((1 - before) / 2 if is_held else NEXT_CUT)

    def take_stated(self, bound: int, in_force: int, at: float) -> None:
        """Take a bound that an answer states without what remains.

        A bound that is lower than known explains the refusals at that time; they
        no longer keep capacity free for others.
        """
        known, known_at = self._stated
        if at - known_at > STATED_S:
            known = in_force
        if bound < known and at > self._refused_at:
            self._cut, self._refused_at = self._cut_left(at), at
        self._stated = bound, at

    def forgive(self) -> None:
        """Note that the bound in force changed.

        Earlier refusals no longer count, and the bound corresponds to the day's latest value.
        """
        self._forget_refusals()
        if self._day_bound is not None:
            self._day_bound.usual = self._day_bound.now

    def _forget_refusals(self) -> None:
        self._refused_at, self._cut, self._stated = -inf, 0.0, (0, -inf)

    def by_day(self, in_force: int) -> int:
        """Return the account's bound of a limit that no answer reports.

        It differs from the bound in force in proportion to the change of the day's bound.
        """
        day = self._day_bound
        if self.is_reported or day is None:
            return in_force
        return max(1, round(in_force * day.now / day.usual))

    @property
    def is_reported(self) -> bool:
        """Whether an answer has reported the limit."""
        return self._last is not None

    @property
    def _newest(self) -> HeaderReading | None:
        return self._last_of_day if self._last is None else self._last

    def is_careful(self, now: float) -> bool:
        """Return whether a refusal is so recent that others' use counts however little it is."""
        return now < self._refused_at + self._careful_s

    @property
    def _careful_s(self) -> float:
        return (UNTOLD_WINDOWS if self._newest is None else CAREFUL_WINDOWS) * self.window_s

    def ramp_ms(self, now: float, used: int, in_force: int, waiting: int = 0) -> int | None:
        """Return over what time the bound of a window is to be admitted evenly; None for no ramp.

        `waiting`: calls that wait for the limit. What a window takes together it frees together,
        and answers would show others only once a window. No one ends a ramp that was begun, so it
        lasts no longer than a refusal counts.
        """
        for_s = EVEN_WINDOWS * self.window_s if self.is_reported else self._careful_s
        is_near = now < self._refused_at + for_s
        is_backlog = waiting > 0 and self._newest is not None
        if not (is_near or is_backlog) or used < NEARLY_FULL * in_force:
            return None
        windows = min(in_force / max(1, in_force - self.kept(now)), CAREFUL_WINDOWS)
        return round(self.window_s * 1000 * windows)

    def _cut_at(self, now: float) -> float:
        """Return the fraction of the bound that is kept free after refusals."""
        return self._cut_left(now) if self.is_careful(now) else 0.0

    def _cut_left(self, now: float) -> float:
        passed = max(0.0, now - self._refused_at) / self.window_s
        if self.is_reported:
            return max(0.0, self._cut - CUT * passed / CUT_WINDOWS)
        if self._newest is not None:
            return max(0.0, self._cut - DAY_CUT * passed / CAREFUL_WINDOWS)
        ends = max(UNTOLD_ENDS, self._cut / (UNTOLD_WINDOWS - HELD_WINDOWS))
        return max(0.0, self._cut - ends * max(0.0, passed - HELD_WINDOWS))

    def _read_window(self, reading: HeaderReading, used: int) -> None:
        """Take a reading of a window that resets.

        With concurrent calls a later answer may report less use, so the highest report of a window
        counts. A window that ends later by more than half its length is the next one.
        """
        length_s = self.window_s
        if reading.window_ms:
            length_s = min(length_s, reading.window_ms / 1000)
        now = self._windows[-1] if self._windows else None
        if reading.reset_ms is not None:
            ends_at = reading.at + reading.reset_ms / 1000
        elif now is None or used < now.used - reading.bound / 2 or reading.at > now.ends_at:
            ends_at = reading.at + length_s
        else:
            ends_at = now.ends_at
        if now is None or ends_at > now.ends_at + length_s / 2:
            self._windows.append(_Window(ends_at - length_s, ends_at, used))
        elif ends_at > now.ends_at - length_s / 2:
            now.used, now.ends_at = max(now.used, used), min(now.ends_at, ends_at)
            now.began_at = now.ends_at - length_s
        most, over = max(1, round(self.window_s / length_s)), reading.at - self.window_s
        while len(self._windows) > most or self._windows[0].ends_at < over:
            self._windows.popleft()
        self._is_new = True

    @property
    def _margin(self) -> float:
        """The fraction of a bound kept free besides others' use until the next observation."""
        return max(MARGIN, LOOK_S / self.window_s)

    @property
    def since(self) -> float | None:
        """From when the pool's count is needed to compare windows that reset; None if it is not.

        In seconds since 1970.
        """
        began_at = self._windows[0].began_at if self._windows else self._refused_from
        return None if began_at is None else began_at - SENT_LATE_S

    def kept(self, now: float) -> int:
        """Return how much the charges of the last window keep free.

        Charges of the window before are kept for the observations that count them.
        """
        while self._charges and self._charges[0].at <= now - self.span_s - MOST_LATE_S:
            self._charges.popleft()
        since = now - self.span_s
        return sum([one.amount for one in self._charges if one.at > since])

    def inherit(self, before: OthersUse, now: float) -> None:
        """Continue with the charges and the knowledge of an earlier leader.

        Its charges are spread evenly: all were made in the last window, and are renewed as they
        end. Its figure for others holds until answers cover a whole window.
        """
        self._remember_evenly(before.kept, now, made_at=-inf)
        self.others, self.acts = float(before.amount), before.amount > 0
        self._known_until = now + self.span_s

    def inherit_day(self, bound: int, in_force: int, day: HeaderReading) -> None:
        """Continue with the account's bound that an earlier leader derived from the day's bound."""
        usual = max(1, round(day.bound * in_force / bound))
        self._day_bound = _DayBound(usual, day.bound, day.at)

    def inherit_refusals(self, before: OthersUse, bound: int, now: float) -> None:
        """Continue with an earlier leader's state of a limit that only refusals show.

        The last refusal counts as of now.
        """
        self._remember_evenly(before.kept, now, made_at=-inf)
        self._refused_at, self._cut = now, min(before.amount / max(1, bound), MOST_UNTOLD_CUT)

    def taken_by_others(self, now: float, bound: int) -> int:
        """Return others' known use in a window; 0 if it is too little to act on.

        Refusals count too, if no answer reports the limit, or as a minimum for windows, since
        answers show little of others if our backlog takes the rest.
        """
        others, refused = self.others if self.acts else 0.0, self._cut_at(now) * bound
        if not self.is_reported:
            others += refused
        elif self._windows:
            others = max(others, refused)
        return round(min(others, bound))

    def _remember_evenly(self, total: int, now: float, *, made_at: float) -> None:
        part_s = self.span_s / _PARTS
        for part in range(1, _PARTS + 1):
            amount = total * part // _PARTS - total * (part - 1) // _PARTS
            if amount > 0:
                self._charges.append(_Charge(now - part_s * (_PARTS - part), amount, made_at))

    def lose(self) -> None:
        """Note that Valkey has lost its data.

        Processes report again what they have counted. What is missing at the next observation must
        be charges, which are then charged again.
        """
        self._has_lost = True

    def _recount(self, now: float, counted: int) -> None:
        if self._samples and now < self._samples[-1].at:
            self._start_over(now)
        missing, self._has_lost = self._counted - counted if self._has_lost else 0, False
        while missing > 0 and self._charges:
            one = self._charges.popleft()
            if one.at <= now - self.span_s:
                continue
            if one.amount > missing:
                self._charges.appendleft(one._replace(amount=one.amount - missing))
            missing -= one.amount

    def due(
        self, now: float, counted: int, in_force: int, bound: int, *, recent: int | None = None
    ) -> int:
        """Return how much to charge now to keep room for others and for a bound that fell.

        `counted`: the pool's count in the window, charges included. `recent`: the same from `since`
        on.
        """
        lower = min(in_force, bound)
        self._recount(now, counted)
        kept = self.kept(now)
        self._add_sample(_Sample(now, counted - kept, self.since, recent))
        self._notice(now, lower)
        if self._refused_from is not None and recent is not None:
            own = recent - self._charged_since(self._refused_from - SENT_LATE_S, now)
            self._reckon(now, self._refused_from, (bound - own) / max(1, lower))
        lasts_from = now - self.span_s + RENEWED_S
        lasting = sum([one.amount for one in self._charges if one.at > lasts_from])
        # What the account leaves for us may be more than the limit in force allows.
        for_others = 0.0
        if self.acts:
            for_others = self.others + self._margin * lower
        elif self.is_careful(now):
            for_others = self.others + CAREFUL_MARGIN * lower
        for_others += self._cut_at(now) * lower
        needed = max(0.0, in_force - bound + for_others)
        needed += self._short(now, lower, bound) if needed else 0.0
        target = round(min(needed, in_force))
        evenly = target - kept > EVENLY_FROM * lower
        amount = min(target - lasting, self._most(now, counted, counted, in_force, bound, None))
        return self._record(now, counted, max(0, amount), evenly=evenly)

    def level_due(self, now: float, taken: int, level: int, in_force: int, bound: int) -> int:
        """Return how much to charge now to a bucket: by how much its level is below the account's.

        `taken`: the pool's count in the window.

        If little remains, a margin covers what others take until the next observation, and what
        refills here but not at the account; once present it costs nothing, since all that refills
        may be used. At that point others cannot be distinguished from our own calls, since a full
        account refuses the rest. An answer is as old as the interval of observations and of shared
        notes: others and we have used some of the refill since then. For an older answer, after a
        long call or a pause, others' use since then is assumed to be as before and ours is known;
        after a pause, a backlog takes the rest in a moment.
        """
        lower, last, remaining = min(in_force, bound), self._last, float(bound)
        self._recount(now, taken)
        self._add_sample(_Sample(now, taken - self.kept(now), level=level))
        self._notice(now, lower)
        if last is not None and last.remaining is not None and last.bound == bound:
            remaining = min(remaining, self._left_now(last, last.remaining, in_force))
        margin = in_force * self._margin
        excess = max(0, in_force - bound) + (self.others if self.acts else 0.0)
        margin += RENEWED_S * excess / self.window_s
        is_old = last is not None and now - last.received_at > READ_LATE_S
        is_due = remaining < 2 * margin or (is_old and excess > 0)
        needed = in_force - remaining + (margin if is_due else 0.0)
        amount = round(needed) - level
        amount = min(amount, self._most(now, taken, level, in_force, bound, remaining))
        return self._record(now, taken, amount if amount > LEVEL_APART * lower else 0)

    def _most(
        self, now: float, counted: int, used: int, in_force: int, bound: int, left: float | None
    ) -> int:
        """Return the most that may be charged beside `used`, so that some calls are admitted
        though the bound in force is far above the account's.

        `left`: what a bucket has left, None for a window.
        """
        is_full = left is not None and left > (1 - IDLE) * bound
        is_idle = counted - self.kept(now) < IDLE * bound
        if bound >= FAR * in_force or not (is_full or is_idle):
            return in_force
        leaves = float(bound - self.taken_by_others(now, bound))
        leaves = leaves if left is None else max(0.0, min(left, leaves))
        return round(in_force - PROBED * leaves) - used

    def _left_now(self, reading: HeaderReading, remaining: int, in_force: int) -> float:
        """Return what remains at the last observation, assuming that others continue.

        Our use since the reading is subtracted; before the first observation it is unknown.
        """
        left, from_s = self._left_at(reading, remaining), reading.at + RENEWED_S
        refills, before = in_force / self.window_s, None
        for sample in self._samples:
            if sample.at > from_s:
                passed_s = sample.at - from_s
                left = self._refilled(left, reading.bound, passed_s)
                if before is not None:
                    between_s = sample.at - before.at
                    used = sample.level - before.level_at(sample.at, refills)
                    left -= used * min(1.0, passed_s / between_s)
                from_s = sample.at
            before = sample
        return left

    def _refilled(self, left: float, bound: int, passed_s: float) -> float:
        """Return what remains after `passed_s` with others' use; none is taken while overdrawn."""
        per_s = bound / self.window_s
        if left < 0:
            overdrawn_s = min(passed_s, -left / per_s)
            left, passed_s = left + per_s * overdrawn_s, passed_s - overdrawn_s
        by_others = self.others / self.window_s if self.acts else 0.0
        return min(bound, left + max(0.0, per_s - by_others) * passed_s)

    def _left_at(self, reading: HeaderReading, remaining: int) -> float:
        """Return what a reading leaves; negative if the bound fell below what was used.

        Such a bucket is full again later than one window afterwards.
        """
        if remaining or reading.window_ms is None:
            return remaining
        windows = reading.window_ms / 1000 / self.window_s
        return reading.bound * (1 - max(1.0, min(windows, _MOST_WINDOWS)))

    def _record(self, now: float, counted: int, amount: int, *, evenly: bool = False) -> int:
        """Record a charge, and the pool's count after it."""
        self.evenly = evenly
        if amount:
            if evenly:
                self._remember_evenly(amount, now, made_at=now)
            else:
                self._charges.append(_Charge(now, amount, now))
            self._samples[-1].charged = amount
        self._counted = counted + amount
        return amount

    def note_charged(self, now: float) -> None:
        """Note that the pool has the last charge, which may take long on a busy machine."""
        self._samples[-1].charged_at = now

    def take_back(self, amount: int) -> None:
        """Undo the last charge, which could not be made."""
        made_at = self._charges[-1].made_at
        while self._charges and self._charges[-1].made_at == made_at:
            self._charges.pop()
        self._samples[-1].charged = 0
        self._counted -= amount

    def lower(self, by: int, now: float) -> None:
        """Note that the bound in force fell by `by`, so that charges for the difference end.

        The pool counts as much less of the last window's charges, of each in proportion.
        """
        total, passed, removed, remaining = self.kept(now), 0, 0, deque[_Charge]()
        by = min(by, total)
        for one in self._charges:
            ended = 0
            if one.at > now - self.span_s:
                passed += one.amount
                ended = by * passed // total - removed
            removed += ended
            remaining.append(one._replace(amount=one.amount - ended))
        self._charges = remaining
        self._counted -= removed
        if self._samples:
            self._samples[-1].level = max(0, self._samples[-1].level - removed)

    def _add_sample(self, sample: _Sample) -> None:
        self._samples.append(sample)
        while self._samples[0].at < sample.at - MOST_LATE_S - READ_LATE_S:
            self._samples.popleft()

    def _start_over(self, now: float) -> None:
        """Handle a clock that was set back: everything remembered is of future times."""
        charged, self._last, self._last_of_day = self.kept(self._samples[-1].at), None, None
        self._forget_refusals()
        if self._day_bound is not None:
            self._day_bound.at = -inf
        for remembered in (
            self._used,
            self._windows,
            self._others_use,
            self._samples,
            self._charges,
        ):
            remembered.clear()
        self._remember_evenly(charged, now, made_at=-inf)

    def _notice(self, now: float, lower: int) -> None:
        """Update others' use: total use in the last window that answers report, less ours.

        Without answers, as in a pause, others are assumed to continue for as long as it may last.
        """
        last = self._newest
        if last is None and not self.acts:  # there is nothing to compare
            return
        silent_s = 0.0 if last is None else now - last.received_at
        if READ_LATE_S < silent_s <= _MOST_WINDOWS * self.window_s:
            return
        until = now if last is None or silent_s > READ_LATE_S else min(now, last.at)
        if (since := self.since) is not None:
            by_others: float | None = self._in_windows(now, since)
        else:
            by_others = self._in_bucket(until)
        if by_others is None:
            return
        if by_others < self.others and now < self._known_until:
            return
        self.others += _STEP * (max(0.0, by_others) - self.others)
        self.acts = self.others > (GONE if self.acts else NOTICED) * lower

    def _in_bucket(self, until: float) -> float | None:
        """Return others' use; None if our own count of that time is no longer known."""
        since = until - self.span_s
        while self._used and self._used[0][1] <= since:
            self._used.popleft()
        by_all = sum(used for _, _, used in self._used)
        if self._used:  # the first interval may have begun before the window
            last, at, used = self._used[0]
            by_all -= used * max(0.0, since - last) / (at - last)
        begin, end = until - READ_LATE_S, until + LOOK_S
        own = max(
            (sample.own for sample in self._samples if begin < sample.at <= end), default=None
        )
        return None if own is None else by_all - own

    def _in_windows(self, now: float, since: float) -> float:
        """Return the most that answers in the last two windows' time report beyond our count.

        Our count is of the time since the provider's windows began. A window shows all its use only
        at its end, so at its start the previous one counts.
        """
        sample = self._sample_after(since)
        if self._is_new and sample.recent is not None:
            self._is_new = False
            own = sample.recent - self._charged_since(since, sample.at)
            others = sum([one.used for one in self._windows]) - own
            while self._others_use and self._others_use[-1][1] <= others:
                self._others_use.pop()
            self._others_use.append((now, others))
        while self._others_use and self._others_use[0][0] <= now - 2 * self.span_s:
            self._others_use.popleft()
        return self._others_use[0][1] if self._others_use else 0.0

    def _charged_since(self, since: float, at: float) -> int:
        """Return the charges contained in the pool's count at `at`."""
        since = max(since, at - self.span_s)  # earlier charges no longer counted
        return sum([one.amount for one in self._charges if one.at > since and one.made_at < at])

    def _reckon(self, now: float, began_at: float, taken: float) -> None:
        """Assume that others continue as in a window that was full at a refusal.

        `taken`: what we did not use of that window, as a fraction of the bound.
        """
        self._refused_from = None
        if now >= began_at + self.window_s:
            return
        passed = max(self._refused_at - began_at, 1.0) / self.window_s
        found = min(taken / passed, taken + REFUSED_MOST)
        cut = max(max(found, self._cut_before) + REFUSED_MORE, self._least_cut)
        self._cut = min(cut, MOST_UNTOLD_CUT)

    def _sample_after(self, since: float) -> _Sample:
        """Return the first observation after the last reading with the count since `since`.

        Otherwise the last observation, whose count also includes our use since the reading. By the
        clock of another process a reading may be in the future.
        """
        reported_at = self._samples[-1].at
        if self._last is not None:
            reported_at = min(reported_at, self._last.at)
        for sample in self._samples:
            of = sample.since if sample.at >= reported_at and sample.recent is not None else None
            if of is not None and abs(of - since) < SENT_LATE_S / 2:
                return sample
        return self._samples[-1]

    def _short(self, now: float, lower: int, bound: int) -> float:
        """Return how much more is to be kept free because hardly anything remains.

        For a window: if less remains than others use until its end, counted from the start of the
        call for the header of a long call.
        """
        left, least = None if self._last is None else self._last.remaining, SPARE * bound
        if self._windows:
            window = self._windows[-1]
            late_s = 0.0 if self._last is None else self._last.received_at - self._last.at
            at = now - late_s if late_s > READ_LATE_S else now
            least = self.others * max(0.0, window.ends_at - at) / self.window_s
        if left is not None and left < least:
            self._more = min(self._more + GROWS * lower, MOST_MORE * lower)
        else:
            self._more = max(0.0, self._more - ENDS * lower)
        return self._more


@dataclass(slots=True)
class DayUse:
    """Others' use of a day's bound: what the provider has less of the day than the pool.

    Charges last until the end of the pool's day, so they cover only what is certain: what
    remained at the last answer plus all refill until then.
    """

    kept: int = 0

    def due(
        self, reading: HeaderReading, counted: int, in_force: int, left_ms: float, now: float
    ) -> int:
        """Return how much to charge now.

        `counted`: the pool's count of its day, charges included. `left_ms`: until its day ends.
        """
        self.kept = min(self.kept, counted)  # another day may have begun
        room = day_room(reading, left_ms, now)
        if room is None:
            return 0
        beyond = round(in_force - counted - room)
        if beyond <= NOTICED * min(in_force, reading.bound):
            return 0
        self.kept += beyond
        return beyond

    def take_back(self, amount: int) -> None:
        """Undo the last charge, which could not be made."""
        self.kept -= amount

    def lower(self, by: int) -> None:
        """Note that the bound in force fell by `by`, as `AccountUse.lower` does."""
        self.kept = max(0, self.kept - by)


def day_room(reading: HeaderReading, left_ms: float, now: float) -> float | None:
    """Return how much of a day's bound is available in the next `left_ms` without others' use.

    None if no header reports it. A bound that resets does so when its header says; any other
    refills evenly, as does one whose header does not say.
    """
    if reading.remaining is None:
        return None
    age_ms = (now - reading.at) * 1000
    window_ms, reset_ms = reading.window_ms, reading.reset_ms
    if reset_ms is None and (window_ms is None or _refills_in_a_day(reading)):
        return reading.remaining + reading.bound * (left_ms + age_ms) / _DAY_MS
    if reset_ms is None:
        reset_ms = (window_ms or 0) * (reading.bound - reading.remaining) / reading.bound
    return reading.remaining + (reading.bound if reset_ms - age_ms < left_ms else 0)


def _refills_in_a_day(reading: HeaderReading) -> bool:
    """Return whether the header implies a bucket that refills in a day."""
    is_bucket = reading.reset_ms is None and reading.remaining is not None
    return is_bucket and 1 / NEAR < (reading.window_ms or 0.0) / _DAY_MS < NEAR


def _refilled_to(reading: HeaderReading, before: float, window_ms: float, passed_s: float) -> float:
    """Return how much of a bucket refilled until a reading; `before`: what remained at first."""
    refilled = reading.bound * passed_s * 1000 / window_ms
    return min(refilled, max(0.0, reading.bound - before))
