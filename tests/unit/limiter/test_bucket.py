"""A rate that refills evenly, beside a provider that keeps every arrival and counts from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.limiter import Rate
from tidegate.limiter.model.rates import Charge, RateSpending

START_MS = 1_700_000_000_000
WINDOW_MS = 6_000
LIMIT = Rate(1_000, WINDOW_MS, "tokens", shape="bucket")


@dataclass
class Provider:
    """A bucket, by its definition: since no time has it given more than its bound and what has
    refilled since. What a call did not use was never taken."""

    limit: Rate
    arrivals: list[list[int]] = field(default_factory=list)

    def take(self, at_ms: int, amount: int) -> list[int]:
        arrival = [at_ms, amount]
        self.arrivals.append(arrival)
        taken = 0
        for came_ms, part in sorted(self.arrivals, reverse=True):
            taken += part
            most = self.limit.bound * (self.limit.window_ms + at_ms - came_ms)
            assert taken * self.limit.window_ms <= most, f"refused: {taken} since {came_ms}"
        return arrival


@dataclass
class Gateway:
    """Admits what fits. A call arrives `late` ms after its admission, at most the slack."""

    limit: Rate
    now: int = START_MS
    spending: RateSpending = field(default_factory=RateSpending)
    provider: Provider = field(init=False)
    calls: list[tuple[Charge, list[int]]] = field(default_factory=list)
    coming: list[tuple[int, int, Charge]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.provider = Provider(self.limit)

    def spent(self) -> int:
        return self.spending.look(self.limit, self.now, 0)

    def pass_time(self, ms: int) -> None:
        until = self.now + ms
        for at_ms, amount, charge in sorted(one for one in self.coming if one[0] <= until):
            self.calls.append((charge, self.provider.take(at_ms, amount)))
        self.coming = [one for one in self.coming if one[0] > until]
        self.now = until

    def ask(self, amount: int, late_ms: int) -> bool:
        if self.spent() + amount > self.limit.bound:
            return False
        charge = self.spending.take(self.limit, amount, self.now)
        assert charge is not None
        self.coming.append((self.now + late_ms, amount, charge))
        return True

    def end(self, which: int, used: int) -> None:
        """The provider knows before the gateway that a call has used less than it took."""
        charge, arrival = self.calls.pop(which)
        arrival[1] = min(arrival[1], used)
        self.spent()
        self.spending.settle(self.limit, charge, min(charge[0], used), self.now)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 1_000), st.sampled_from([0, LIMIT.slack])),
        st.tuples(st.just("pass"), st.sampled_from([1, 40, 99, 700, 5_900]), st.just(0)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("seed", range(8))
def test_the_provider_never_refuses_what_was_admitted(seed: int) -> None:
    """Takes of all sizes fill the bucket, some return a part later, and sometimes it rests."""
    random, gateway = Random(seed), Gateway(LIMIT)
    for _ in range(300):
        room = LIMIT.bound - gateway.spent()
        if room > 0 and random.random() < 0.7:
            late_ms = random.choice([0, LIMIT.slack])
            assert gateway.ask(random.choice([room, random.randint(1, room)]), late_ms)
        if gateway.calls and random.random() < 0.3:
            gateway.end(random.randrange(len(gateway.calls)), random.randint(0, 1_000))
        gateway.pass_time(random.choice([1, 10, 40, 99, 300, 700, random.randint(1, WINDOW_MS)]))


@pytest.mark.parametrize("seed", range(3))
def test_a_full_backlog_uses_all_that_refills(seed: int) -> None:
    """Half of each reservation is returned; calls arrive as late as they may."""
    random, gateway, used = Random(seed), Gateway(LIMIT), 0
    wanted = random.randint(50, 400)
    for _ in range(8 * WINDOW_MS // 10):
        gateway.pass_time(10)
        while gateway.ask(wanted, random.randint(0, LIMIT.slack)):
            wanted = random.randint(50, 400)
        while gateway.calls and random.random() < 0.05:
            half = gateway.calls[0][0][0] // 2
            gateway.end(0, half)
            used += half
    outstanding = sum(charge[0] for charge, _ in gateway.calls)
    assert used + outstanding >= 8 * LIMIT.bound  # and nearly one that was free at first


def test_a_return_is_no_room_for_what_others_have_taken_since() -> None:
    """Taken from the level it would be: of 980 that others have, 800 would be free again."""
    gateway = Gateway(LIMIT)
    assert gateway.ask(1_000, 0)
    gateway.pass_time(WINDOW_MS)
    assert gateway.spent() <= 70  # a sixtieth and the slack refill later
    assert gateway.ask(930, 0)
    gateway.end(0, 200)
    assert 930 <= gateway.spent() <= 1_000
    gateway.pass_time(1_000)


def test_a_return_is_room_while_its_call_is_in_the_level() -> None:
    gateway = Gateway(LIMIT)
    assert gateway.ask(1_000, 0)
    gateway.pass_time(500)
    assert not gateway.ask(800, 0)
    gateway.end(0, 200)
    assert gateway.ask(800, 0)


@given(STEPS, st.integers(1, 1_000))
def test_room_comes_when_it_was_foretold_and_no_sooner(
    steps: list[tuple[str, int, int]], amount: int
) -> None:
    gateway = Gateway(LIMIT)
    for what, first, second in steps:
        if what == "ask":
            gateway.ask(first, second)
        elif what == "pass":
            gateway.pass_time(first)
    if gateway.spent() + amount <= LIMIT.bound:
        return
    at = gateway.spending.room_at(LIMIT, amount, gateway.now)
    assert at > gateway.now
    gateway.pass_time(at - gateway.now - 1)
    assert gateway.spent() + amount > LIMIT.bound
    gateway.pass_time(1)
    assert gateway.spent() + amount <= LIMIT.bound


@pytest.mark.parametrize("bound", [500, 2_000])
def test_what_refilled_before_the_bound_changed_stays_as_it_was(bound: int) -> None:
    gateway = Gateway(LIMIT)
    gateway.ask(1_000, 0)
    gateway.pass_time(3_000)
    before = gateway.spent()
    gateway.limit = replace(LIMIT, bound=bound)
    assert gateway.spent() == min(before, 2 * bound)


def test_nothing_is_due_for_longer_than_a_window() -> None:
    gateway = Gateway(LIMIT)
    gateway.spending.add(LIMIT, 1_000_000, gateway.now)
    gateway.pass_time(WINDOW_MS + WINDOW_MS // 10)
    assert gateway.ask(1, 0)
