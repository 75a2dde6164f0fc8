"""Choice of a job's tier by price, deadline and room; and in a simulated fleet no job is late that
the usual tier alone would have answered in time."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.admission.charges import (
    FlexCalls,
    LiveRoom,
    TierChoice,
    TierOffer,
    TierTimes,
    TimeSamples,
    choose,
    in_words,
)
from tidegate.call import Tier

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
TIMES = TierTimes()
FREE = LiveRoom(call_ms=2_000)
HOUR_S, DAY_S = 3_600.0, 86_400.0
FLEX, BATCH = TierOffer(Tier.FLEX, 0.5), TierOffer(Tier.BATCH, 0.5)


def chosen(
    *offers: TierOffer, in_s: float | None, room: LiveRoom = FREE, times: TierTimes = TIMES
) -> TierChoice:
    due = None if in_s is None else NOW + timedelta(seconds=in_s)
    return choose(offers, room, now=NOW, due=due, times=times)


def test_nothing_cheaper_is_live() -> None:
    choice = chosen(in_s=DAY_S)
    assert (choice.tier, choice.revisit_at) == (Tier.LIVE, None)
    assert choice.why == "no cheaper tier is allowed and offered for its model"


@pytest.mark.parametrize("in_s", [60.0, 10.0, 0.0, -5.0])
def test_a_job_due_in_a_minute_is_live(in_s: float) -> None:
    assert chosen(FLEX, BATCH, in_s=in_s).tier is Tier.LIVE


def test_a_job_due_in_an_hour_is_never_put_into_a_batch_of_unknown_speed() -> None:
    assert chosen(BATCH, in_s=HOUR_S).tier is Tier.LIVE
    assert chosen(FLEX, BATCH, in_s=HOUR_S).tier is Tier.FLEX


def test_a_batch_that_is_known_to_be_quick_takes_a_job_due_in_an_hour() -> None:
    quick = TierOffer(Tier.BATCH, 0.5, usual_ms=20 * 60_000)
    choice = chosen(quick, in_s=HOUR_S)
    assert choice.tier is Tier.BATCH
    # With the time that a cancelled batch takes to end, and that of the call afterwards.
    assert choice.revisit_at == NOW + timedelta(minutes=50) - timedelta(seconds=7.5)
    slower = TierOffer(Tier.BATCH, 0.5, usual_ms=35 * 60_000)
    assert chosen(slower, in_s=HOUR_S).tier is Tier.LIVE


def test_a_batch_of_unknown_speed_is_tried_where_half_of_its_window_fits() -> None:
    assert chosen(BATCH, in_s=DAY_S).tier is Tier.BATCH
    assert chosen(BATCH, in_s=DAY_S / 2).tier is Tier.LIVE


def test_a_batch_that_would_lose_its_answers_is_not_tried() -> None:
    lossy = TierOffer(Tier.BATCH, 0.5, keeps_results=False)
    assert chosen(lossy, in_s=DAY_S).tier is Tier.LIVE
    assert chosen(lossy, in_s=DAY_S + HOUR_S).tier is Tier.BATCH
    known = TierOffer(Tier.BATCH, 0.5, usual_ms=3_600_000, keeps_results=False)
    assert chosen(known, in_s=4 * HOUR_S).tier is Tier.BATCH


def test_without_a_deadline_the_cheapest_stands_for_as_long_as_it_takes() -> None:
    choice = chosen(TierOffer(Tier.FLEX, 0.6), BATCH, in_s=None)
    assert (choice.tier, choice.revisit_at) == (Tier.BATCH, None)
    assert choice.why == "batch costs 50% of the usual price"


def test_at_one_price_flex_is_first_where_our_limits_have_room_for_it() -> None:
    assert chosen(FLEX, BATCH, in_s=DAY_S).tier is Tier.FLEX
    crowded = LiveRoom(ahead=1_000, per_second=5, call_ms=2_000)
    assert chosen(FLEX, BATCH, in_s=DAY_S, room=crowded).tier is Tier.BATCH
    busy = TierOffer(Tier.FLEX, 0.5, busy_ms=30_000)
    assert chosen(busy, BATCH, in_s=DAY_S).tier is Tier.BATCH
    assert chosen(busy, in_s=DAY_S).tier is Tier.FLEX


def test_all_jobs_before_it_are_counted() -> None:
    many = LiveRoom(ahead=36_000, per_second=10, call_ms=2_000)
    assert chosen(FLEX, in_s=HOUR_S, room=many).tier is Tier.LIVE
    assert chosen(FLEX, in_s=10 * HOUR_S, room=many).tier is Tier.FLEX


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("in_s", [None, 60.0, DAY_S])
def test_a_limit_of_0_lets_not_even_the_first_job_into_another_tier(
    ahead: int, in_s: float | None
) -> None:
    closed = LiveRoom(ahead=ahead, per_second=0)
    choice = chosen(FLEX, BATCH, in_s=in_s, room=closed)
    assert (choice.tier, choice.revisit_at) == (Tier.LIVE, None)
    assert choice.why == "a limit of 0 admits none of its calls, in any tier"


def test_a_batch_is_chosen_where_the_usual_tier_would_be_late() -> None:
    """It stays there: there is no faster tier for it to leave for."""
    days = LiveRoom(ahead=3 * 86_400, per_second=1.0, call_ms=2_000)
    for offers in ([BATCH], [FLEX, BATCH]):
        choice = chosen(*offers, in_s=2 * DAY_S, room=days)
        assert (choice.tier, choice.revisit_at) == (Tier.BATCH, None)
        assert choice.why == "batch costs 50% of the usual price and 2 d are left; live is too late"
    assert chosen(FLEX, in_s=2 * DAY_S, room=days).tier is Tier.LIVE
    assert chosen(BATCH, in_s=HOUR_S, room=days).tier is Tier.LIVE


def test_a_tier_that_is_not_cheaper_is_never_chosen() -> None:
    assert (
        chosen(TierOffer(Tier.FLEX, 1.0), TierOffer(Tier.BATCH, 1.5), in_s=None).tier is Tier.LIVE
    )


def test_the_sentence_says_what_is_left_and_what_was_too_slow() -> None:
    assert chosen(BATCH, in_s=HOUR_S).why == (
        "1 h are left, of which live needs 7.5 s: batch may take 12 h"
    )
    assert chosen(BATCH, in_s=DAY_S).why == (
        "batch costs 50% of the usual price and 1 d are left; live from 7.5 s before it is due"
    )


@pytest.mark.parametrize(
    ("ms", "said"),
    [(0, "0 ms"), (-3, "0 ms"), (999, "999 ms"), (1_500, "1.5 s"), (inf, "any time")],
)
def test_spoken(ms: float, said: str) -> None:
    assert in_words(ms) == said


def test_usual_is_what_nearly_all_did_not_exceed() -> None:
    seen = TimeSamples()
    seen.last_ms.extend([10.0] * 4)
    assert seen.usual_ms() is None
    seen.last_ms.extend([10.0] * 91 + [500.0] * 5)
    assert seen.usual_ms() == 10.0
    assert seen.mean_ms() == 34.5
    assert TimeSamples().mean_ms() is None


def test_flex_is_left_alone_for_longer_after_each_refusal() -> None:
    now = [0.0]
    flex, key = FlexCalls(lambda: now[0]), ("openai", "gpt-5")
    assert flex.busy_ms(key) == 0
    flex.was_busy(key, None)
    flex.was_busy(key, None)  # under way when the first one was refused
    assert flex.busy_ms(key) == 1_000
    now[0] = 1.0
    assert flex.busy_ms(key) == 0
    flex.was_busy(key, None)
    assert flex.busy_ms(key) == 2_000
    now[0] = 3.0
    flex.was_busy(key, 90_000)
    assert flex.busy_ms(key) == 90_000
    flex.answered(key, 40.0)
    assert flex.busy_ms(key) == 0


def test_what_is_known_of_flex_is_bounded() -> None:
    flex = FlexCalls(lambda: 0.0, max_entries=2)
    jobs = [uuid4() for _ in range(3)]
    for number, job in enumerate(jobs):
        flex.refuse(job)
        flex.was_busy(("openai", str(number)), None)
        flex.answered(("gemini", str(number)), 1.0)
    assert [flex.is_refused(job) for job in jobs] == [False, True, True]
    assert flex.busy_ms(("openai", "0")) == 0
    assert flex.usual_ms(("gemini", "0")) is None


@dataclass(order=True)
class SimulatedJob:
    due_s: float
    number: int
    answered_s: float = field(default=inf, compare=False)
    paid: float = field(default=0.0, compare=False)


class SimulatedFleet:
    """Jobs, our limits, and a provider, in virtual seconds from 0.

    Our limits admit one call each `1 / per_second`, of those that wait the one that is due first.
    A batch may never end; it ends within the announced time once it is cancelled, and what had an
    answer by then is paid for. A call of flex takes at most what is announced, or is refused.
    """

    def __init__(self, seed: int, dues_s: list[float], per_second: float, tiers: set[Tier]) -> None:
        self.rng = random.Random(seed)
        self.jobs = [SimulatedJob(due_s, number) for number, due_s in enumerate(dues_s)]
        self.per_second, self.call_s = per_second, self.rng.uniform(0.1, 5)
        self.tiers = tiers
        self.shares = {tier: self.rng.choice([0.4, 0.5, 0.75, 1.2]) for tier in tiers}
        self.busy_share = self.rng.choice([0.0, 0.0, 0.3, 0.9])
        self.batch_s = self.rng.choice([60.0, HOUR_S, 6 * HOUR_S, 23 * HOUR_S, inf])
        self.knows_batch = self.rng.random() < 0.5 and self.batch_s < inf
        self.now = 0.0
        self.flex = FlexCalls(lambda: self.now)
        self.free_at = 0.0
        self.waiting: list[tuple[SimulatedJob, Tier, float]] = []
        self.events: list[tuple[float, int, str, SimulatedJob]] = []
        self.order = 0

    def at(self, when_s: float, what: str, job: SimulatedJob) -> None:
        self.order += 1
        heapq.heappush(self.events, (when_s, self.order, what, job))

    def run(self) -> None:
        for job in self.jobs:
            self.at(0.0, "claim", job)
        while self.events:
            self.now, _, what, job = heapq.heappop(self.events)
            getattr(self, f"on_{what}")(job)

    def choice(self, job: SimulatedJob) -> TierChoice:
        ahead = sum(one.answered_s == inf and one < job for one in self.jobs)
        offers = []
        if Tier.FLEX in self.tiers:
            usual, busy = self.flex.usual_ms(("", "")), self.flex.busy_ms(("", ""))
            offers.append(TierOffer(Tier.FLEX, self.shares[Tier.FLEX], usual, busy))
        if Tier.BATCH in self.tiers:
            usual = self.batch_s * 1_000 if self.knows_batch else None
            offers.append(TierOffer(Tier.BATCH, self.shares[Tier.BATCH], usual))
        return choose(
            offers,
            LiveRoom(ahead, self.per_second, self.call_s * 1_000),
            now=NOW + timedelta(seconds=self.now),
            due=NOW + timedelta(seconds=job.due_s),
            times=TIMES,
        )

    def on_claim(self, job: SimulatedJob) -> None:
        choice = self.choice(job)
        until_s = inf
        if choice.revisit_at is not None:
            until_s = (choice.revisit_at - NOW).total_seconds()
        busy_s = self.flex.busy_ms(("", "")) / 1_000
        if choice.tier is Tier.BATCH:
            ends_s = self.now + self.batch_s * self.rng.uniform(0.5, 1.6)
            cancelled_s = until_s + self.rng.uniform(0.8, 1) * TIMES.cancel_ms / 1_000
            comes = ends_s <= cancelled_s
            self.at(ends_s if comes else cancelled_s, "batch_answer" if comes else "claim", job)
        elif choice.tier is Tier.FLEX and busy_s:
            self.at(self.now + busy_s, "claim", job)
        else:
            heapq.heappush(self.waiting, (job, choice.tier, until_s))
            self.at(max(self.now, self.free_at), "admit", job)

    def on_admit(self, _: SimulatedJob) -> None:
        if not self.waiting:
            return
        if self.now < self.free_at:
            self.at(self.free_at, "admit", self.waiting[0][0])
            return
        job, tier, until_s = heapq.heappop(self.waiting)
        if tier is Tier.FLEX and self.now > until_s:
            self.at(self.now, "claim", job)  # it has waited for too long: chosen again
            self.at(self.now, "admit", job)
            return
        self.free_at = self.now + 1 / self.per_second
        if self.waiting:
            self.at(self.free_at, "admit", self.waiting[0][0])
        if tier is Tier.LIVE:
            job.answered_s, job.paid = self.now + self.call_s, job.paid + 1
        elif self.rng.random() < self.busy_share:
            self.flex.was_busy(("", ""), None)
            self.at(self.now, "claim", job)
        else:
            took_s = self.rng.uniform(1, TIMES.flex_ms / 1_000)
            if self.now + took_s > until_s:
                self.at(until_s, "claim", job)  # cut, and not charged for
            else:
                self.at(self.now + took_s, "flex_answer", job)
                self.flex.answered(("", ""), took_s * 1_000)

    def on_flex_answer(self, job: SimulatedJob) -> None:
        job.answered_s, job.paid = self.now, job.paid + self.shares[Tier.FLEX]

    def on_batch_answer(self, job: SimulatedJob) -> None:
        job.answered_s, job.paid = self.now, job.paid + self.shares[Tier.BATCH]


DUES_S = [60.0, 600.0, HOUR_S, 4 * HOUR_S, 23 * HOUR_S, DAY_S]


@given(
    seed=st.integers(0, 2**32),
    dues_s=st.lists(st.sampled_from(DUES_S), min_size=10, max_size=25)
    | st.lists(st.just(DAY_S), min_size=10, max_size=25),
    per_second=st.sampled_from([0.01, 0.05, 0.2, 10.0]),
    tiers=st.sets(st.sampled_from([Tier.FLEX, Tier.BATCH])),
)
def test_no_job_is_late_or_dearer_than_in_the_usual_tier(
    seed: int, dues_s: list[float], per_second: float, tiers: set[Tier]
) -> None:
    alone = SimulatedFleet(seed, dues_s, per_second, set())
    alone.run()
    fleet = SimulatedFleet(seed, dues_s, per_second, tiers)
    fleet.run()
    for one, usual in zip(fleet.jobs, alone.jobs, strict=True):
        assert one.paid <= usual.paid == 1
        if usual.answered_s <= usual.due_s:
            assert one.answered_s <= one.due_s, (one, usual)
