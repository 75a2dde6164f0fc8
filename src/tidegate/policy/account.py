"""Other programs on an account: their use of its limits, measured from answers and counts.

Pure. Invariant: what others take is kept free by charges that end with the window of their limit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from tidegate.policy.learned import HeaderReading, OthersUse

# Shares of a bound: others are noticed from the first on, and gone below the second; the third is
# kept free beside what they take, since they come in bursts.
NOTICED, GONE, MARGIN = 0.05, 0.02, 0.03
# Levels of two buckets that are closer than such a share of the bound are the same.
LEVEL_APART = 0.01
# From one look to the next, about.
LOOK_S = 1.5
# How much of the difference one look makes up for: single readings are late or rounded.
_STEP = 0.4
# While there are others, or a bound fell, more is kept free for as long as less than the first
# remains: a part of the bound that grows each second, up to the last, and ends slowly.
SPARE, GROWS, ENDS, MOST_MORE = 0.06, 0.02, 0.01, 0.5
# A refusal shows that our count lacks something, however little answers told of it. For the first,
# in windows, others are taken into account below `NOTICED` too, with the second beside them; the
# third is kept free beside all of that, and ends evenly over so many windows.
CAREFUL_WINDOWS, CAREFUL_MARGIN = 10.0, 0.01
CUT, CUT_WINDOWS = 0.1, 3.0
# The same where no answer tells of the limit, so that refusals alone show what others take; and the
# most that they keep free, which is `MOST_MORE` elsewhere. All of it ends `CAREFUL_WINDOWS` after
# the last refusal.
UNTOLD_CUT, UNTOLD_CUT_WINDOWS, MOST_UNTOLD_CUT = 0.2, 10.0, 0.9
# A refusal of a window that tells when that begins again shows what others took of it: as much a
# window is kept free, and the first beside it. Since they may have taken it in a burst, it is no
# more than was taken, and the second.
REFUSED_MORE, REFUSED_MOST = 0.1, 0.2
# For so many windows after a refusal calls come evenly, where so large a share of the bound is
# used: a window frees together what came together, and all of that may be refused together. Where
# refusals alone show others, they do for as long as one counts, since the next one will follow.
EVEN_WINDOWS, NEARLY_FULL = 2.0, 0.9
# For how long a bound that a refusal stated is kept to: who does so is not refused, and would never
# hear that it rose.
STATED_S = 3_600.0
# Refusals within such a part of a window are one, since calls under way are refused too.
ONE_REFUSAL = 1 / 12
# How much later than the pool the headers of answers tell of a call, at most: under bursts what it
# used would else be taken for a use of others.
READ_LATE_S = 5.0
# How long a call takes at most whose headers tell of the account: what was ours is remembered.
MOST_LATE_S = 60.0
# In how many windows a bucket is full again at most; what resets later is no bucket of that window.
_MOST_WINDOWS = 2.0
# How long before the provider a pool counts a call, at most.
SENT_LATE_S = 1.0
# A charge that keeps so large a share of the bound free beside what is kept free already counts as
# if spent evenly over the last window: it ends in so many parts, and so do those of an earlier
# leader. Ending at one moment it would free room for many calls, and all of them may be refused.
EVENLY_FROM, _PARTS = 0.02, 60
# So long before it ends a charge is renewed, else there would be room for a moment.
RENEWED_S = 2.5
_DAY_MS = 86_400_000
# How near a day the window of a bucket that refills in one must be, as its header implies it.
NEAR = 1.2
# Limits of a shorter window are over before anything is noticed.
LEAST_WINDOW_S = 4 * RENEWED_S


@dataclass(slots=True)
class _Window:
    """Of a limit that begins again, as its answers tell. Times are in seconds since 1970."""

    began_at: float
    ends_at: float
    used: int


class _Charge(NamedTuple):
    """at: as of when it counts; made_at: when it was made. Times are in seconds since 1970."""

    at: float
    amount: int
    made_at: float


@dataclass(slots=True)
class _Look:
    """What the pool counted at one moment. ours: in the window, without what was charged here;
    lately: since the provider's windows began, as known then; level: of a bucket, before and after
    what was charged at this look."""

    at: float
    ours: int
    since: float | None = None
    lately: int | None = None
    level: int = 0
    charged: int = 0


@dataclass(slots=True)
class _DayBound:
    """usual: what goes with the bound in force. at: as of when it is `now`; fell_at: when it was
    more last; both in seconds since 1970."""

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
        """For how long what was used before it fell may leave nothing of a bucket."""
        windows = min(self.usual / self.now - 1, CAREFUL_WINDOWS)
        return self.fell_at + max(0.0, windows) * window_s


@dataclass(slots=True)
class AccountUse:
    """Use of one limit of an account in the last window: by all, as headers tell it, and by us.

    What remained at two answers of a bucket, and what has refilled between, is what all have used;
    in a window that begins again it is what does not remain. What the pool counts in that time is
    ours, and the rest is of others. Where our count is above the provider's there are no others;
    where it is below, the difference is kept free, whatever its cause. Headers are as of a call's
    beginning, and come with its answer: they are compared with what the pool counted then. After a
    refusal more is kept free in a window, since answers may tell of too little.
    refills: whether the limit is a bucket, where its readings do not show that it begins again.
    A limit of which no answer tells can have the same calls as a day's bound, of which each does:
    then that shows what others take, but not what remains; and a tier that changes, since that
    changes all bounds of a model, in about the same proportion.
    """

    window_s: float
    span_s: float
    refills: bool
    others: float = 0.0
    acts: bool = False
    _more: float = 0.0
    _last: HeaderReading | None = None
    _last_of_day: HeaderReading | None = None  # where there is no other
    _day_bound: _DayBound | None = None
    # Of when two answers were, and what was used between them.
    _used: deque[tuple[float, float, float]] = field(default_factory=deque)
    _windows: deque[_Window] = field(default_factory=deque)
    _apart: deque[tuple[float, float]] = field(default_factory=deque)  # of windows: all but ours
    _is_new: bool = False  # a reading of a window, not compared yet
    _looks: deque[_Look] = field(default_factory=deque)
    _kept: deque[_Charge] = field(default_factory=deque)
    evenly: bool = False  # whether the last charge is to count evenly over the last window
    _counted: int = 0  # as the pool counted after the last look
    _has_lost: bool = False
    _refused_at: float = -inf
    _cut: float = 0.0  # a part of the bound, as of the last refusal
    _known_until: float = -inf  # what others take at least
    _stated: tuple[int, float] = (0, -inf)  # a bound that an answer told alone, and as of when
    _cut_before: float = 0.0
    # When the window of the last refusal began, until what others took of it is known.
    _refused_from: float | None = None

    def read(self, reading: HeaderReading) -> None:
        """Take a reading; one that is not newer than the last is passed over, and one of a call
        that took too long."""
        last = self._last
        if reading.remaining is None or (last is not None and reading.at <= last.at):
            return
        if reading.came_at - reading.at > MOST_LATE_S:
            return
        self._last = reading
        is_window = not self.refills or reading.reset_ms is not None
        is_comparable = last is not None and last.bound == reading.bound
        if not is_window or not is_comparable:
            self._windows.clear()
            self._apart.clear()
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
        """The same of a day's bound that refills evenly, where no answer tells of the limit; None
        where none tells of the day either."""
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
        if self.is_told or is_known or reading.came_at - reading.at > MOST_LATE_S:
            return
        self._last_of_day = reading
        if last is None or last.remaining is None or last.bound != reading.bound:
            return
        if (passed_s := reading.at - last.at) <= self.window_s:
            used = float(last.remaining - (reading.remaining or 0))
            used += _refilled_to(reading, last.remaining, _DAY_MS, passed_s)
            self._used.append((last.at, reading.at, used))

    def refuse(self, at: float, reset_s: float | None = None) -> None:
        """Take a refusal of a call that fits our own count. Others who take little before a backlog
        of ours takes the rest are hardly seen in answers, and not at all where no header tells.
        reset_s: in how many seconds the limit's window begins again, as the refusal tells."""
        day = self._day_bound
        if day is not None and not self.is_told and at <= day.overdrawn_until(self.window_s):
            return
        if at > self._refused_at + ONE_REFUSAL * self.window_s:
            cut, most = (CUT, MOST_MORE) if self.is_told else (UNTOLD_CUT, MOST_UNTOLD_CUT)
            self._cut_before = self._cut_left(at)
            self._cut = min(self._cut_before + cut, most)
            self._refused_at, self._refused_from = at, None
            if not self.is_told and reset_s is not None and 0 < reset_s < self.window_s:
                self._refused_from = at + reset_s - self.window_s

    def take_stated(self, bound: int, in_force: int, at: float) -> None:
        """Take a bound that an answer tells without what remains. Where it is lower than was known,
        that is why calls were refused at that time: nothing is kept free for others beside it."""
        known, known_at = self._stated
        if at - known_at > STATED_S:
            known = in_force
        if bound < known and at > self._refused_at:
            self._cut, self._refused_at = self._cut_left(at), at
        self._stated = bound, at

    def forgive(self) -> None:
        """The bound in force was changed: refusals were of before, and it goes with the day's."""
        self._forget_refusals()
        if self._day_bound is not None:
            self._day_bound.usual = self._day_bound.now

    def _forget_refusals(self) -> None:
        self._refused_at, self._cut, self._stated = -inf, 0.0, (0, -inf)

    def by_day(self, in_force: int) -> int:
        """The account's bound of a limit of which no answer tells: as much less or more than in
        force as the day's bound is than before."""
        day = self._day_bound
        if self.is_told or day is None:
            return in_force
        return max(1, round(in_force * day.now / day.usual))

    @property
    def is_told(self) -> bool:
        """Whether an answer has told of the limit."""
        return self._last is not None

    @property
    def _newest(self) -> HeaderReading | None:
        return self._last_of_day if self._last is None else self._last

    def is_careful(self, now: float) -> bool:
        """Whether a refusal is so near that what others take counts however little it is."""
        return now < self._refused_at + CAREFUL_WINDOWS * self.window_s

    def ramp_ms(self, now: float, used: int, in_force: int, waiting: int = 0) -> int | None:
        """Of a limit that is a window: in which time as much as the bound is to be admitted,
        evenly; None where calls may come as they fit. waiting: calls that wait for it. What a
        window takes together it frees together, and answers would tell of others once a window.
        Nobody ends what was begun, so that it is no longer than a refusal counts."""
        for_s = (EVEN_WINDOWS if self.is_told else CAREFUL_WINDOWS) * self.window_s
        is_near = now < self._refused_at + for_s
        is_backlog = waiting > 0 and self._newest is not None
        if not (is_near or is_backlog) or used < NEARLY_FULL * in_force:
            return None
        windows = min(in_force / max(1, in_force - self.kept(now)), CAREFUL_WINDOWS)
        return round(self.window_s * 1000 * windows)

    def _cut_at(self, now: float) -> float:
        """The share of the bound that is kept free after refusals."""
        return self._cut_left(now) if self.is_careful(now) else 0.0

    def _cut_left(self, now: float) -> float:
        cut, windows = CUT, CUT_WINDOWS
        if not self.is_told:
            cut, windows = UNTOLD_CUT, UNTOLD_CUT_WINDOWS
        passed = max(0.0, now - self._refused_at) / (windows * self.window_s)
        return max(0.0, self._cut - cut * passed)

    def _read_window(self, reading: HeaderReading, used: int) -> None:
        """Of concurrent calls an answer that comes later may tell of less: in a window the most
        that any answer tells of is used. One that ends by more than half of its length later is the
        next one."""
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
        """The share of a bound that is kept free beside what others take until the next look."""
        return max(MARGIN, LOOK_S / self.window_s)

    @property
    def since(self) -> float | None:
        """From when on the pool's own count is needed to compare windows that begin again, in
        seconds since 1970; None where it is not."""
        began_at = self._windows[0].began_at if self._windows else self._refused_from
        return None if began_at is None else began_at - SENT_LATE_S

    def kept(self, now: float) -> int:
        """How much is kept free by what was charged in the last window. Charges of the one before
        are remembered for the looks that count them."""
        while self._kept and self._kept[0].at <= now - self.span_s - MOST_LATE_S:
            self._kept.popleft()
        since = now - self.span_s
        return sum([one.amount for one in self._kept if one.at > since])

    def inherit(self, before: OthersUse, now: float) -> None:
        """Go on with what an earlier leader has charged, evenly, since all of it was in the last
        window, and is charged again as it ends; and with what it knew of others, until answers tell
        of a whole window."""
        self._remember_evenly(before.kept, now, made_at=-inf)
        self.others, self.acts = float(before.amount), before.amount > 0
        self._known_until = now + self.span_s

    def inherit_day(self, bound: int, in_force: int, day: HeaderReading) -> None:
        """Go on with the account's bound as an earlier leader had it by the day's."""
        usual = max(1, round(day.bound * in_force / bound))
        self._day_bound = _DayBound(usual, day.bound, day.at)

    def inherit_refusals(self, before: OthersUse, bound: int, now: float) -> None:
        """The same of a limit of which refusals alone show others: the last of them is now."""
        self._remember_evenly(before.kept, now, made_at=-inf)
        self._refused_at, self._cut = now, min(before.amount / max(1, bound), MOST_UNTOLD_CUT)

    def taken_by_others(self, now: float, bound: int) -> int:
        """In a window, as far as it is known: 0 where it is too little to act on. Where no answer
        tells of it, or what others got before our backlog took the rest, refusals tell more."""
        others, refused = self.others if self.acts else 0.0, self._cut_at(now) * bound
        if not self.is_told:
            others += refused
        elif self._windows:
            others = max(others, refused)
        return round(min(others, bound))

    def _remember_evenly(self, kept: int, now: float, *, made_at: float) -> None:
        part_s = self.span_s / _PARTS
        for part in range(1, _PARTS + 1):
            amount = kept * part // _PARTS - kept * (part - 1) // _PARTS
            if amount > 0:
                self._kept.append(_Charge(now - part_s * (_PARTS - part), amount, made_at))

    def lose(self) -> None:
        """Valkey has lost its data. Processes report again what they have seen of it: what is
        missing at the next look is taken for what was charged here, so that it is charged again."""
        self._has_lost = True

    def _recount(self, now: float, counted: int) -> None:
        if self._looks and now < self._looks[-1].at:
            self._start_over(now)
        missing, self._has_lost = self._counted - counted if self._has_lost else 0, False
        while missing > 0 and self._kept:
            one = self._kept.popleft()
            if one.at <= now - self.span_s:
                continue
            if one.amount > missing:
                self._kept.appendleft(one._replace(amount=one.amount - missing))
            missing -= one.amount

    def due(
        self, now: float, counted: int, in_force: int, bound: int, *, lately: int | None = None
    ) -> int:
        """How much to charge now so that room is left for others, and for a bound that fell.

        counted: what the pool counts in the window, with all that was charged here; lately: the
        same from `since` on."""
        lower = min(in_force, bound)
        self._recount(now, counted)
        self._look(_Look(now, counted - self.kept(now), self.since, lately))
        self._notice(now, lower)
        if self._refused_from is not None and lately is not None:
            ours = lately - self._charged_since(self._refused_from - SENT_LATE_S, now)
            self._reckon(now, self._refused_from, (bound - ours) / max(1, lower))
        lasts_from = now - self.span_s + RENEWED_S
        lasting = sum([one.amount for one in self._kept if one.at > lasts_from])
        # What the account has left for us may be more than the limit in force allows.
        for_others = 0.0
        if self.acts:
            for_others = self.others + self._margin * lower
        elif self.is_careful(now):
            for_others = self.others + CAREFUL_MARGIN * lower
        for_others += self._cut_at(now) * lower
        wanted = max(0.0, in_force - bound + for_others)
        wanted += self._short(now, lower, bound) if wanted else 0.0
        target = round(min(wanted, in_force))
        evenly = target - self.kept(now) > EVENLY_FROM * lower
        return self._keep(now, counted, max(0, target - lasting), evenly=evenly)

    def level_due(self, now: float, taken: int, level: int, in_force: int, bound: int) -> int:
        """As `due`, of a limit that refills as the account's does: by how much its level is lower
        than the account's. taken: what the pool counts in the window.

        Where little remains, a margin is for what others take until the next look, and for what
        refills here and not at the account: once there, it costs nothing, since all that refills
        may be used. Others can't be distinguished from our own calls by then, since an account that
        is full refuses the rest. An answer is as old as a look and a share of notes: what has
        refilled meanwhile, others and we have taken too. Where it is older, as after a long call or
        a pause, what others took since then is as before, what we took is known, and after a pause
        a backlog takes the rest in a moment.
        """
        lower, last, remaining = min(in_force, bound), self._last, float(bound)
        self._recount(now, taken)
        self._look(_Look(now, taken - self.kept(now), level=level))
        self._notice(now, lower)
        if last is not None and last.remaining is not None and last.bound == bound:
            remaining = min(remaining, self._left_now(last, last.remaining, in_force))
        margin = in_force * self._margin
        apart = max(0, in_force - bound) + (self.others if self.acts else 0.0)
        margin += RENEWED_S * apart / self.window_s
        is_old = last is not None and now - last.came_at > READ_LATE_S
        is_due = remaining < 2 * margin or (is_old and apart > 0)
        wanted = in_force - remaining + (margin if is_due else 0.0)
        amount = round(wanted) - level
        return self._keep(now, taken, amount if amount > LEVEL_APART * lower else 0)

    def _left_now(self, reading: HeaderReading, remaining: int, in_force: int) -> float:
        """What remains at the last look, with others going on and what we took since the reading;
        what we took before the first look that is remembered is not known."""
        left, from_s = self._left_at(reading, remaining), reading.at + RENEWED_S
        refills, before = in_force / self.window_s, None
        for look in self._looks:
            if look.at > from_s:
                passed_s = look.at - from_s
                left = self._refilled(left, reading.bound, passed_s)
                if before is not None:
                    between_s = look.at - before.at
                    stayed = before.level + before.charged - refills * between_s
                    left -= (look.level - max(0.0, stayed)) * min(1.0, passed_s / between_s)
                from_s = look.at
            before = look
        return left

    def _refilled(self, left: float, bound: int, passed_s: float) -> float:
        """What remains after so long, with others going on; nobody takes what is overdrawn."""
        per_s = bound / self.window_s
        if left < 0:
            overdrawn_s = min(passed_s, -left / per_s)
            left, passed_s = left + per_s * overdrawn_s, passed_s - overdrawn_s
        by_others = self.others / self.window_s if self.acts else 0.0
        return min(bound, left + max(0.0, per_s - by_others) * passed_s)

    def _left_at(self, reading: HeaderReading, remaining: int) -> float:
        """Below nothing where a bound fell below what was used: then a bucket is full again later
        than a window after."""
        if remaining or reading.window_ms is None:
            return remaining
        windows = reading.window_ms / 1000 / self.window_s
        return reading.bound * (1 - max(1.0, min(windows, _MOST_WINDOWS)))

    def _keep(self, now: float, counted: int, amount: int, *, evenly: bool = False) -> int:
        """Note what is charged now, and what the pool counts with it."""
        self.evenly = evenly
        if amount:
            if evenly:
                self._remember_evenly(amount, now, made_at=now)
            else:
                self._kept.append(_Charge(now, amount, now))
            self._looks[-1].charged = amount
        self._counted = counted + amount
        return amount

    def take_back(self, amount: int) -> None:
        """The last charge could not be made."""
        made_at = self._kept[-1].made_at
        while self._kept and self._kept[-1].made_at == made_at:
            self._kept.pop()
        self._looks[-1].charged = 0
        self._counted -= amount

    def lower(self, by: int, now: float) -> None:
        """The bound in force is lower by `by`: the pool counts as much less of what was charged
        here in the last window, of each charge alike, since it was for the difference."""
        total, passed, gone, kept = self.kept(now), 0, 0, deque[_Charge]()
        by = min(by, total)
        for one in self._kept:
            ended = 0
            if one.at > now - self.span_s:
                passed += one.amount
                ended = by * passed // total - gone
            gone += ended
            kept.append(one._replace(amount=one.amount - ended))
        self._kept = kept
        self._counted -= gone
        if self._looks:
            self._looks[-1].level = max(0, self._looks[-1].level - gone)

    def _look(self, look: _Look) -> None:
        self._looks.append(look)
        while self._looks[0].at < look.at - MOST_LATE_S - READ_LATE_S:
            self._looks.popleft()

    def _start_over(self, now: float) -> None:
        """The clock was set back: what is remembered is of times that are yet to come."""
        kept, self._last, self._last_of_day = self.kept(self._looks[-1].at), None, None
        self._forget_refusals()
        if self._day_bound is not None:
            self._day_bound.at = -inf
        for remembered in (self._used, self._windows, self._apart, self._looks, self._kept):
            remembered.clear()
        self._remember_evenly(kept, now, made_at=-inf)

    def _notice(self, now: float, lower: int) -> None:
        """Compare what all have used in the last window that answers tell of with what is ours of
        it. Without answers, as in a pause, others are taken to go on for as long as it may last."""
        last = self._newest
        if last is None and not self.acts:  # there is nothing to compare
            return
        silent_s = 0.0 if last is None else now - last.came_at
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
        """None where it is not remembered what was ours then."""
        since = until - self.span_s
        while self._used and self._used[0][1] <= since:
            self._used.popleft()
        by_all = sum(used for _, _, used in self._used)
        if self._used:  # the first may have begun before the window
            last, at, used = self._used[0]
            by_all -= used * max(0.0, since - last) / (at - last)
        begin, end = until - READ_LATE_S, until + LOOK_S
        ours = max((look.ours for look in self._looks if begin < look.at <= end), default=None)
        return None if ours is None else by_all - ours

    def _in_windows(self, now: float, since: float) -> float:
        """The most that the answers of two windows' time have told of, beyond what the pool had
        counted since the provider's windows began: one shows all of its use at its end, and at its
        beginning the one before counts."""
        look = self._look_after(since)
        if self._is_new and look.lately is not None:
            self._is_new = False
            ours = look.lately - self._charged_since(since, look.at)
            self._apart.append((now, sum(one.used for one in self._windows) - ours))
        while self._apart and self._apart[0][0] <= now - 2 * self.span_s:
            self._apart.popleft()
        return max((apart for _, apart in self._apart), default=0.0)

    def _charged_since(self, since: float, at: float) -> int:
        """What was charged here of what the pool counted then."""
        since = max(since, at - self.span_s)  # what was before counted no more
        return sum([one.amount for one in self._kept if one.at > since and one.made_at < at])

    def _reckon(self, now: float, began_at: float, taken: float) -> None:
        """Take it that others go on as in a window that had no room left at a refusal. taken: as a
        part of the bound, what we did not take of it."""
        self._refused_from = None
        if now >= began_at + self.window_s:
            return
        passed = max(self._refused_at - began_at, 1.0) / self.window_s
        found = min(taken / passed, taken + REFUSED_MOST)
        self._cut = min(max(found, self._cut_before) + REFUSED_MORE, MOST_UNTOLD_CUT)

    def _look_after(self, since: float) -> _Look:
        """The first look after the last reading that knows what was taken since then; else the
        last one, which counts what is ours since the reading too. By the clock of another process
        a reading may be of a time that is yet to come."""
        told_at = self._looks[-1].at
        if self._last is not None:
            told_at = min(told_at, self._last.at)
        for look in self._looks:
            of = look.since if look.at >= told_at and look.lately is not None else None
            if of is not None and abs(of - since) < SENT_LATE_S / 2:
                return look
        return self._looks[-1]

    def _short(self, now: float, lower: int, bound: int) -> float:
        """How much more is to be kept free, since hardly anything remains: of a window, less than
        others take until it ends, from when the header of a long call is of."""
        left, least = None if self._last is None else self._last.remaining, SPARE * bound
        if self._windows:
            window = self._windows[-1]
            late_s = 0.0 if self._last is None else self._last.came_at - self._last.at
            at = now - late_s if late_s > READ_LATE_S else now
            least = self.others * max(0.0, window.ends_at - at) / self.window_s
        if left is not None and left < least:
            self._more = min(self._more + GROWS * lower, MOST_MORE * lower)
        else:
            self._more = max(0.0, self._more - ENDS * lower)
        return self._more


@dataclass(slots=True)
class DayUse:
    """What others take of a day's bound: as much as the provider has less of the day than the pool.

    Charges last until the pool's day ends, so that they are for what is sure: what remained at the
    last answer, and all that refills until then.
    """

    kept: int = 0

    def due(
        self, reading: HeaderReading, counted: int, in_force: int, left_ms: float, now: float
    ) -> int:
        """How much to charge now. counted: what the pool counts in its day, with all that was
        charged here; left_ms: until its day ends."""
        self.kept = min(self.kept, counted)  # another day may have begun
        given = day_room(reading, left_ms, now)
        if given is None:
            return 0
        beyond = round(in_force - counted - given)
        if beyond <= NOTICED * min(in_force, reading.bound):
            return 0
        self.kept += beyond
        return beyond

    def take_back(self, amount: int) -> None:
        """The last charge could not be made."""
        self.kept -= amount

    def lower(self, by: int) -> None:
        """As of an `AccountUse`."""
        self.kept = max(0, self.kept - by)


def day_room(reading: HeaderReading, left_ms: float, now: float) -> float | None:
    """How much of a day's bound the provider gives in the next `left_ms`, if nobody else takes any;
    None where no header tells. A bound that begins again does so when its header says; any other,
    or one that does not say, refills evenly."""
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
    """Whether its header implies so."""
    is_bucket = reading.reset_ms is None and reading.remaining is not None
    return is_bucket and 1 / NEAR < (reading.window_ms or 0.0) / _DAY_MS < NEAR


def _refilled_to(reading: HeaderReading, before: float, window_ms: float, passed_s: float) -> float:
    """How much of a bucket has refilled until a reading. before: what remained then."""
    refilled = reading.bound * passed_s * 1000 / window_ms
    return min(refilled, max(0.0, reading.bound - before))
