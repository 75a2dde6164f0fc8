"""What counts of a rate, against the list of all that it admitted.

The list knows each moment; the rate counts in parts of its window, to the end of each. So it never
counts less than a provider that gets each call when it was admitted, and never more than if each
came at the end of its part.
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass, field
from math import ceil
from random import Random

import pytest

from tidegate.limiter import Rate
from tidegate.limiter.simulation import RateSpending, span_of

RATES = int(os.environ.get("TIDEGATE_MODEL_STEPS", "20000")) // 100
SEED = int(os.environ.get("TIDEGATE_MODEL_SEED", "0")) * RATES
STEPS = 200


@dataclass(slots=True, eq=False)
class Entry:
    """A call. most: what may still count of it, if it returned the rest late in its window."""

    at: int
    amount: int
    most: int
    charge: tuple[int, int] | None = None


@dataclass(slots=True)
class Book:
    """A rate, and the list of its calls. Times are ms."""

    limit: Rate
    now: int
    spending: RateSpending = field(default_factory=RateSpending)
    entries: list[Entry] = field(default_factory=list)
    running: list[Entry] = field(default_factory=list)

    @property
    def width(self) -> int:
        return 0 if self.limit.exact else ceil(span_of(self.limit) / self.limit.buckets)

    @property
    def spent(self) -> int:
        return self.spending.look(self.limit, self.now, 0)

    def least(self) -> float:
        """Return what counts at a provider that gets each call when it is admitted."""
        limit = self.limit
        if limit.shape == "bucket":
            return self._level([(one.at, one.amount) for one in self.entries])
        return sum(one.amount for one in self.entries if one.at + limit.window_ms > self.now)

    def most(self) -> float:
        """Return what counts if each call arrives as late as it may."""
        span, width = span_of(self.limit), self.width
        if self.limit.shape == "bucket":
            late_ms = span - self.limit.window_ms + width
            return self._level([(one.at + late_ms, one.most) for one in self.entries])
        return sum(one.most for one in self.entries if one.at + span + width > self.now)

    def _level(self, taken: list[tuple[int, int]]) -> float:
        level, before, rate = 0.0, 0, self.limit.bound / self.limit.window_ms
        for at, amount in sorted(taken):
            if at <= self.now:
                level = max(0.0, level - (at - before) * rate) + amount
                level, before = min(level, 2 * self.limit.bound), at
        level = max(0.0, level - (self.now - before) * rate)
        level += sum(amount for at, amount in taken if at > self.now)
        return min(level, 2 * self.limit.bound)

    def take(self, amount: int) -> None:
        """Admit a call if the rate has room, which it must have if the list has."""
        bound, spent = self.limit.bound, self.spent
        if spent + amount > bound:
            # A level is rounded up.
            assert self.most() + amount > bound - (self.limit.shape == "bucket"), "it wastes room"
            self._check_time_of_room(amount)
            return
        entry = Entry(self.now, amount, amount)
        entry.charge = self.spending.take(self.limit, amount, self.now)
        self.entries.append(entry)
        self.running.append(entry)
        assert self.least() <= bound + 0.001, "it admits more than its bound"

    def _check_time_of_room(self, amount: int) -> None:
        limit, at = self.limit, self.spending.room_at(self.limit, amount, self.now)
        assert at > self.now
        assert deepcopy(self.spending).look(limit, at, 0) + amount <= limit.bound
        assert deepcopy(self.spending).look(limit, at - 1, 0) + amount > limit.bound

    def settle(self, entry: Entry, used: int) -> None:
        self.running.remove(entry)
        if entry.charge is None:
            return
        _ = self.spent
        self.spending.settle(self.limit, entry.charge, used, self.now)
        if used > entry.amount:
            more = used - entry.amount
            self.entries.append(Entry(self.now, more, more))
            return
        entry.amount = used
        if self.now < entry.at + self.limit.window_ms - self.width:
            entry.most = used


def random_rate(random: Random) -> Rate:
    window_ms = random.choice([1000, 7777, 10_000, 60_000])
    return Rate(
        random.choice([5, 100, 1000]),
        window_ms,
        random.choice(["tokens", "tokens", "requests"]),
        slack_ms=random.choice([0, None, window_ms // 3]),
        shape=random.choice(["window", "bucket"]),
    )


def play(random: Random, limit: Rate) -> None:
    book = Book(limit, 1_000_000 + random.randrange(1_000_000))
    bound, window_ms = limit.bound, limit.window_ms
    amounts = [1] if limit.unit == "requests" else [1, bound // 20 or 1, bound // 3, bound]
    for _ in range(STEPS):
        match random.choice(["take", "take", "take", "settle", "settle", "pass"]):
            case "take":
                book.take(random.choice(amounts))
            case "settle" if book.running:
                entry = random.choice([book.running[0], *book.running[-3:]])
                amount = entry.amount
                book.settle(entry, random.choice([0, amount // 2, amount, amount * 2]))
            case "pass":
                parts = [window_ms // 7, window_ms // 2, window_ms]
                book.now += random.choice([1, 10, 100, 1000, *parts])


@pytest.mark.timeout(max(120, RATES // 10))
def test_a_rate_admits_no_more_than_its_bound_and_wastes_no_room() -> None:
    """Also where calls used less or more than they took, however late that is known."""
    for number in range(SEED, SEED + RATES):
        random = Random(number)
        play(random, random_rate(random))
