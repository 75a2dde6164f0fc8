"""What the outages of upstreams do to jobs, on a clock of our own."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from tidegate.errors import (
    LONGEST_OF_FAULT_MS,
    UpstreamError,
    UpstreamOut,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.jobs.outages import (
    DEAD_KEY_S,
    FAULTS,
    FIRST_S,
    HEAD_START_S,
    LONGEST_S,
    LONGEST_SPREAD_S,
    ClaimDepth,
    Held,
    Key,
    Outages,
    PutOff,
    Turn,
    claim_depth,
)

TEXT: tuple[Key, ...] = (("main", "text"),)
PICTURES: tuple[Key, ...] = (("main", "pictures"),)
DOWN = UpstreamUnavailable("no", status=503)
BARE = UpstreamThrottled("slow down")


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outages(clock: Clock) -> Outages:
    return Outages({"main"}, clock, random.Random(1))


def fail(outages: Outages, error: UpstreamError = DOWN, times: int = FAULTS) -> None:
    for _ in range(times):
        outages.ended(Turn(TEXT), "main", error)


def test_a_gate_that_is_opened_before_it_is_looked_at_lets_a_probe_go(outages: Outages) -> None:
    gate: Any = SimpleNamespace(upstream="main", closed=lambda: None)
    held = Held(outages, {"main": gate})
    dead = UpstreamUnauthorized("no such key", of_key=True)
    dead.in_outage = True
    held.ended(Turn(TEXT), "main", dead)
    assert outages.held_ms(TEXT) == DEAD_KEY_S * 1000
    assert held.may_claim(5) == 1
    assert outages.held_ms(TEXT) == 0


def test_a_few_faults_hold_up_nothing(outages: Outages) -> None:
    fail(outages, times=FAULTS - 1)
    assert outages.held_ms(TEXT) == 0
    outages.ended(outages.enter(TEXT), "main", None)
    assert not outages.is_any, "an answer ends the row"


def test_one_probe_each_time_and_the_waits_grow(clock: Clock, outages: Outages) -> None:
    fail(outages)
    waits_s = []
    for _ in range(8):
        with pytest.raises(UpstreamUnavailable) as held:
            outages.enter(PICTURES)
        assert held.value.of_upstream
        waits_s.append(outages.held_ms(TEXT) / 1000)
        clock.now += waits_s[-1]
        probe = outages.enter(TEXT)
        with pytest.raises(UpstreamUnavailable):
            outages.enter(TEXT)
        outages.ended(probe, "main", DOWN)
    assert waits_s == [wait_s + HEAD_START_S for wait_s in (1, 2, 4, 8, 8, 8, 8, 8)]
    clock.now += LONGEST_S + HEAD_START_S
    outages.ended(outages.enter(TEXT), "main", None)
    assert not outages.is_any


def test_what_was_called_before_says_nothing_of_the_outage(clock: Clock, outages: Outages) -> None:
    early = [Turn(TEXT) for _ in range(3)]
    fail(outages)
    outages.ended(early[0], "main", None)
    assert outages.held_ms(PICTURES) == FIRST_S * 1000
    outages.ended(early[1], "main", DOWN)
    assert outages.held_ms(PICTURES) == FIRST_S * 1000, "nor does it make it longer"
    clock.now += FIRST_S
    outages.ended(early[2], "main", None)
    assert outages.is_any


def test_a_probe_that_says_nothing_leaves_its_turn_to_another(
    clock: Clock, outages: Outages
) -> None:
    fail(outages)
    clock.now += FIRST_S + HEAD_START_S
    outages.left(outages.enter(TEXT))
    assert 0 < outages.held_ms(TEXT) <= FIRST_S * 1000
    clock.now += FIRST_S
    probe = outages.enter(TEXT)
    outages.ended(probe, "main", UpstreamRejected("no such thing", status=400))
    assert not outages.is_any, "it has answered"


def test_a_429_is_of_one_model(clock: Clock, outages: Outages) -> None:
    fail(outages, BARE, 1)
    assert outages.held_ms(TEXT) > 0
    assert outages.held_ms(PICTURES) == 0
    assert outages.may_claim(9) == 9
    fail(outages, UpstreamThrottled("tomorrow", retry_after_ms=30_000_000), 1)
    clock.now += DEAD_KEY_S
    assert outages.held_ms(TEXT) == 0, "somebody may have ended it"


def test_a_429_that_lowered_a_limit_holds_nothing(outages: Outages) -> None:
    lowered = UpstreamThrottled("slow down")
    lowered.lowered_limit = True
    fail(outages, lowered, 1)
    assert outages.held_ms(TEXT) == 0
    assert not outages.is_any


def test_a_call_that_is_refused_for_its_model_puts_no_other_model_out(outages: Outages) -> None:
    fail(outages, BARE, 1)
    with pytest.raises(UpstreamUnavailable) as refused:
        outages.enter(TEXT)
    outages.ended(Turn(TEXT), None, refused.value)
    assert outages.held_ms(PICTURES) == 0
    assert outages.may_claim(9) == 9


def test_a_refused_key_is_tried_once_a_minute(clock: Clock, outages: Outages) -> None:
    fail(outages, UpstreamUnauthorized("bad key", status=401), 1)
    assert outages.held_ms(PICTURES) == DEAD_KEY_S * 1000


def test_a_fault_that_names_hours_is_probed_within_the_minute(
    clock: Clock, outages: Outages
) -> None:
    away = UpstreamUnavailable("no", status=503, retry_after_ms=14_400_000)
    fail(outages, away)
    for _ in range(8):
        held_s = outages.held_ms(TEXT) / 1000
        assert held_s <= LONGEST_OF_FAULT_MS / 1000 + HEAD_START_S
        clock.now += held_s
        outages.ended(outages.enter(TEXT), "main", away)
    brief = UpstreamUnavailable("no", status=503, retry_after_ms=12_000)
    clock.now += outages.held_ms(TEXT) / 1000
    outages.ended(outages.enter(TEXT), "main", brief)
    assert outages.held_ms(PICTURES) == 12_000, "a time that may be true is kept"


def test_what_is_known_to_be_out_elsewhere_is_held_as_long(outages: Outages) -> None:
    out = UpstreamOut("out", retry_after_ms=3_000)
    outages.ended(Turn(TEXT), None, out)
    assert outages.held_ms(TEXT) == 3_000


def test_another_upstream_that_works_is_enough(outages: Outages) -> None:
    both = Outages({"main", "second"}, Clock())
    fail(both)
    assert both.held_ms((*TEXT, ("second", "text"))) == 0
    assert both.held_ms(TEXT) > 0
    assert both.may_claim(9) == 9


def test_claiming_stops_but_for_the_next_probe(clock: Clock, outages: Outages) -> None:
    assert outages.may_claim(9) == 9
    fail(outages)
    assert outages.may_claim(9) == 0
    clock.now += FIRST_S
    assert outages.may_claim(9) == 1
    assert outages.may_claim(9) == 0, "one is being claimed"
    outages.unclaimed()
    assert outages.may_claim(9) == 1
    probe = outages.enter(PICTURES)
    assert outages.may_claim(9) == 0, "one is being called"
    outages.ended(probe, "main", None)
    assert outages.may_claim(9) == 9


def test_the_next_probe_is_of_another_model_than_the_last(clock: Clock, outages: Outages) -> None:
    """A provider can be out of capacity for one of its models."""
    fail(outages)
    clock.now += FIRST_S
    assert outages.held_ms(TEXT) > 0, "it was asked last"
    outages.ended(outages.enter(PICTURES), "main", None)
    assert outages.held_ms(PICTURES) == 0
    assert outages.may_claim(9) == 9
    assert outages.held_ms(TEXT) > 0, "only the other one has answered"
    clock.now += HEAD_START_S
    outages.ended(outages.enter(TEXT), "main", None)
    assert not outages.is_any


def test_looks_past_what_is_out_become_wider() -> None:
    assert [claim_depth(12, in_vain) for in_vain in (0, 1, 2, 6, 7, 99)] == [
        12,
        24,
        48,
        768,
        1000,
        1000,
    ]
    assert claim_depth(2_000, 3) == 2_000


def test_a_queue_is_looked_through_at_once_and_then_as_fast_as_is_bearable(clock: Clock) -> None:
    look = ClaimDepth(clock, a_s=100, at_once=1_000)
    looked_at, rest_s = 0, 0.0
    while not rest_s:
        most = look.at(12)
        looked_at += most
        rest_s = look.found(held=most, free=0)
    assert looked_at > 1_000
    assert rest_s == (looked_at - 1_000) / 100
    clock.now += rest_s
    assert look.found(held=0, free=5) == 0
    assert look.at(12) < claim_depth(12, 7), "what can be called was found"


def test_models_that_callers_name_are_bounded(outages: Outages) -> None:
    for number in range(3_000):
        outages.ended(Turn((("main", f"m{number}"),)), "main", BARE)
    assert len(outages._outages) <= 1_000


HOUR_S, DAY_S = 3_600.0, 86_400.0
OUT_FROM_S = 5.0


@dataclass(frozen=True, order=True)
class Job:
    request_id: UUID
    claim: int


class Queue:
    """What PostgreSQL does for the jobs of one lane: those that are ready, and those put off."""

    def __init__(self, clock: Clock, jobs: int) -> None:
        self._clock = clock
        self.ready = [Job(UUID(int=number), 0) for number in range(jobs)]
        self._until: list[tuple[float, Job]] = []
        self._put_off: dict[UUID, Job] = {}
        self.claims = 0

    def claim(self, most: int) -> list[Job]:
        while self._until and self._until[0][0] <= self._clock.now:
            _, job = heapq.heappop(self._until)
            self._ripen(job)
        taken = [heapq.heappop(self.ready) for _ in range(min(most, len(self.ready)))]
        self.claims += len(taken)
        return taken

    def _ripen(self, job: Job) -> None:
        if self._put_off.get(job.request_id) == job:
            del self._put_off[job.request_id]
            heapq.heappush(self.ready, job)

    async def release(self, jobs: list[Job], waits_ms: dict[UUID, int], _: object = None) -> None:
        for job in jobs:
            later = Job(job.request_id, job.claim + 1)
            self._put_off[job.request_id] = later
            heapq.heappush(self._until, (self._clock.now + waits_ms[job.request_id] / 1000, later))

    async def bring_back(self, claims: dict[UUID, int]) -> None:
        for request_id, claim in claims.items():
            self._ripen(Job(request_id, claim))


FAULTS_AND_PROBES = pytest.mark.parametrize(
    ("error", "probes_a_minute"),
    [
        (DOWN, 60),
        (UpstreamUnavailable("no", status=503, retry_after_ms=14_400_000), 60),
        (UpstreamUnavailable("no connection", broke="connecting"), 60),
        (BARE, 60),
        (UpstreamUnauthorized("bad key", status=401), 2),
    ],
)


@FAULTS_AND_PROBES
@pytest.mark.parametrize("outage_s", [60.0, pytest.param(DAY_S, marks=pytest.mark.slow)])
async def test_ten_thousand_jobs_outlast_an_outage(
    error: UpstreamError, probes_a_minute: int, outage_s: float
) -> None:
    # Of a model that is throttled each is looked at now and then: `make chaos` plays the whole day.
    await outlast(error, probes_a_minute, min(outage_s, HOUR_S) if error is BARE else outage_s)


async def outlast(
    error: UpstreamError, probes_a_minute: int, outage_s: float, jobs: int = 10_000
) -> None:
    """A queue, a worker that takes a dozen at a time, and calls of a tenth of a second."""
    clock = Clock()
    outages = Outages({"main"}, clock, random.Random(1))
    window, takes_s = 12, 0.1
    began = clock.now
    back_at = began + OUT_FROM_S + outage_s
    queue, look = Queue(clock, jobs), ClaimDepth(clock)
    put_off = PutOff(
        cast(Any, SimpleNamespace(queue=queue)), Held(outages, {}), lambda _: TEXT, clock
    )
    running: list[tuple[float, Job, Turn | None]] = []
    probes: list[float] = []
    done = 0
    next_claim = next_back = began

    async def put_one_off(job: Job) -> None:
        await put_off.release(
            *cast(Any, ([job], {job.request_id: put_off.wait_ms(cast(Any, job))}))
        )

    while done < jobs:
        if clock.now >= next_back:
            next_back = clock.now + 1
            await put_off.bring_back()
        while running and running[0][0] <= clock.now:
            _, job, turn = heapq.heappop(running)
            is_out = began + OUT_FROM_S < clock.now < back_at
            if turn is not None or is_out:
                outages.ended(turn or Turn(TEXT), "main", error if is_out else None)
            if is_out:
                probes.append(clock.now)
                await put_one_off(job)
            else:
                done += 1
        free = put_off.held.may_claim(window - len(running)) if clock.now >= next_claim else 0
        taken = queue.claim(look.at(free)) if free else []
        if free and not taken:
            outages.unclaimed()
        waits_ms = put_off.waits_ms(cast(Any, taken))
        held = [job for job in taken if job.request_id in waits_ms]
        await put_off.release(cast(Any, held), waits_ms)
        taken = [job for job in taken if job.request_id not in waits_ms]
        if taken or held:
            next_claim = clock.now + look.found(held=len(held), free=len(taken))
        for job in taken[free:]:
            heapq.heappush(queue.ready, job)
        for job in taken[:free]:
            try:
                turn = outages.enter(TEXT) if outages.is_any else None
            except UpstreamUnavailable:
                await put_one_off(job)
                continue
            heapq.heappush(running, (clock.now + takes_s, job, turn))
        clock.now = min(running[0][0], clock.now + 1) if running else clock.now + 1
    work_s = jobs * takes_s / window
    assert clock.now - back_at < 60 + work_s
    at_onset = window + FAULTS
    assert len(probes) <= at_onset + probes_a_minute * outage_s / 60
    for early, late in zip(probes[at_onset:], probes[at_onset + 1 :], strict=False):
        assert late - early >= FIRST_S
    # No churn: all of them once, then those that look whether it is over, or have waited long.
    assert queue.claims < 4 * jobs + 100 * outage_s
    assert outages.wait_ms(TEXT) <= LONGEST_SPREAD_S * 1000
