"""Accounts that are used by us and by others, and that a learner of their limits sees."""

from __future__ import annotations

from collections import deque
from typing import Any

from tidegate.policy.account import AccountUse
from tidegate.policy.learned import HeaderReading


def count_charge(counted: deque[tuple[float, Any]], use: AccountUse, now: float, due: int) -> None:
    """As the pool counts it: now, or evenly over the last window."""
    if not use.evenly:
        counted.append((now, due))
        return
    before, parts = list(counted), 120
    counted.clear()
    width_s = use.span_s / parts
    evenly = [
        (now - width_s * (parts - part), due * part // parts - due * (part - 1) // parts)
        for part in range(1, parts + 1)
    ]
    counted.extend(sorted([*before, *evenly], key=lambda each: each[0]))


class WindowAccount:
    """An account of which each minute begins again, used by others evenly and by us as far as our
    limit allows, half a second at a time. What does not fit is refused, and ends our calls until
    the next minute."""

    def __init__(self, bound: int, late_s: float = 0.0, ends_at: float = 43.0) -> None:
        """late_s: how long a call takes, whose answer has headers of its beginning; a refusal comes
        immediately. ends_at: the first minute."""
        self.bound, self.late_s = bound, late_s
        self.now, self.ends_at, self.used = 0.0, ends_at, 0
        self.pool: deque[tuple[float, int]] = deque()
        self.total = 0
        self.use = AccountUse(60.0, 60.5, refills=False)
        # When each comes, of which bound, what remains as of when, and when it begins again.
        self.answers: deque[tuple[float, int, int, float, float]] = deque()
        self.refused = self.others_refused = 0
        self._others_due, self._held_until = 0.0, 0.0
        self.ahead_s = 0.0  # the clock of the process that hears the answers
        self.tells_refusals = self.has_headers = True
        self.tells_resets = False
        self.uncounted = 0  # of each call, what our count lacks

    def counted(self, since: float) -> int:
        found = 0
        for at, amount in reversed(self.pool):
            if at <= since:
                break
            found += amount
        return found

    def half_second(self, wanted: int, others: float) -> None:
        self.now += 0.5
        if self.now >= self.ends_at:
            self.ends_at, self.used = self.ends_at + 60.0, 0
        self._others_due += others * 0.5
        while self._others_due >= 100:
            self._others_due -= 100
            self.others_refused += not self._take()
        while self.pool and self.pool[0][0] <= self.now - self.use.span_s:
            self.total -= self.pool.popleft()[1]
        counted = before = self.total
        for _ in range(wanted):
            if self.now < self._held_until or counted + 100 > self.bound:
                break
            counted += 100
            fits = self._take(100 + self.uncounted)
            if not fits:
                self.refused += 1
                self._held_until = self.ends_at
                if self.tells_refusals:
                    reset_s = self.ends_at - self.now if self.tells_resets else None
                    self.use.refuse(self.now, reset_s)
                self.answers.clear()  # older ones are passed over
            comes_at, reset_ms = self.now + self.late_s * fits, (self.ends_at - self.now) * 1000
            left = self.bound - self.used
            self.answers.append((comes_at, self.bound, left, self.now, reset_ms))
        if counted > before:
            self.pool.append((self.now, counted - before))
            self.total = counted
        while not self.now % 1 and self.answers and self.answers[0][0] <= self.now:
            _, bound, left, at, reset_ms = self.answers.popleft()
            if not self.has_headers:
                continue
            at, heard_at = at + self.ahead_s, self.now + self.ahead_s
            self.use.read(
                HeaderReading("m", "tpm", bound, left, at, reset_ms=reset_ms, heard_at=heard_at)
            )
        since = self.use.since
        lately = None if since is None else self.counted(since)
        due = self.use.due(self.now, counted, self.bound, self.bound, recent=lately)
        if due:
            count_charge(self.pool, self.use, self.now, due)
            self.total += due

    def _take(self, amount: int = 100) -> bool:
        fits = self.used + amount <= self.bound
        self.used += amount if fits else 0
        return fits

    def run(self, minutes: int, wanted: int, others: float) -> tuple[int, int]:
        """How many calls were refused meanwhile: of ours and of others."""
        before = self.refused, self.others_refused
        for _ in range(120 * minutes):
            self.half_second(wanted, others)
        return self.refused - before[0], self.others_refused - before[1]
