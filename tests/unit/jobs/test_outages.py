"""What the outages of upstreams do to jobs, on a clock of our own."""

from __future__ import annotations

import heapq
import random
from collections import deque

import pytest

from tidegate.errors import (
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
    LONGEST_S,
    LONGEST_SPREAD_S,
    Key,
    Outages,
    Turn,
    look_again_s,
    look_at,
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
    assert waits_s == [1, 2, 4, 8, 8, 8, 8, 8]
    clock.now += LONGEST_S
    outages.ended(outages.enter(TEXT), "main", None)
    assert not outages.is_any


def test_what_was_called_before_says_nothing_of_the_outage(clock: Clock, outages: Outages) -> None:
    early = [Turn(TEXT) for _ in range(3)]
    fail(outages)
    outages.ended(early[0], "main", None)
    assert outages.held_ms(TEXT) == FIRST_S * 1000
    outages.ended(early[1], "main", DOWN)
    assert outages.held_ms(TEXT) == FIRST_S * 1000, "nor does it make it longer"
    clock.now += FIRST_S
    outages.ended(early[2], "main", None)
    assert outages.is_any


def test_a_probe_that_says_nothing_leaves_its_turn_to_another(
    clock: Clock, outages: Outages
) -> None:
    fail(outages)
    clock.now += FIRST_S
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
    probe = outages.enter(TEXT)
    assert outages.may_claim(9) == 0, "one is being called"
    outages.ended(probe, "main", None)
    assert outages.may_claim(9) == 9


def test_looks_past_what_is_out_become_wider() -> None:
    assert [look_at(12, in_vain) for in_vain in (0, 1, 2, 6, 7, 99)] == [
        12,
        24,
        48,
        768,
        1000,
        1000,
    ]
    assert look_at(2_000, 3) == 2_000


def test_models_that_callers_name_are_bounded(outages: Outages) -> None:
    for number in range(3_000):
        outages.ended(Turn((("main", f"m{number}"),)), "main", BARE)
    assert len(outages._outages) <= 1_000


DAY_S = 86_400.0
OUT_FROM_S = 5.0


@pytest.mark.parametrize(
    ("error", "probes_a_minute"),
    [
        (DOWN, 60),
        (UpstreamUnavailable("no connection", broke="connecting"), 60),
        (BARE, 60),
        (UpstreamUnauthorized("bad key", status=401), 2),
    ],
)
@pytest.mark.parametrize("outage_s", [60.0, DAY_S])
def test_ten_thousand_jobs_outlast_an_outage(
    clock: Clock, outages: Outages, error: UpstreamError, probes_a_minute: int, outage_s: float
) -> None:
    """A queue, a worker that takes a dozen at a time, and calls of a tenth of a second."""
    window, takes_s, jobs = 12, 0.1, 10_000
    began = clock.now
    back_at = began + OUT_FROM_S + outage_s
    ready: deque[int] = deque(range(jobs))
    parked: list[tuple[float, int]] = []
    running: list[tuple[float, int, Turn | None]] = []
    probes: list[float] = []
    claims = done = in_vain = 0
    next_claim = began
    while done < jobs:
        while parked and parked[0][0] <= clock.now:
            ready.append(heapq.heappop(parked)[1])
        while running and running[0][0] <= clock.now:
            _, job, turn = heapq.heappop(running)
            is_out = began + OUT_FROM_S < clock.now < back_at
            if turn is not None or is_out:
                outages.ended(turn or Turn(TEXT), "main", error if is_out else None)
            if is_out:
                probes.append(clock.now)
                heapq.heappush(parked, (clock.now + outages.wait_ms(TEXT) / 1000, job))
            else:
                done += 1
        free = outages.may_claim(window - len(running)) if clock.now >= next_claim else 0
        taken = [ready.popleft() for _ in range(min(free, len(ready)))]
        if free and not taken:
            outages.unclaimed()
        claims += len(taken)
        held_up = 0
        for job in taken:
            if outages.held_ms(TEXT):
                held_up += 1
                heapq.heappush(parked, (clock.now + outages.wait_ms(TEXT) / 1000, job))
                continue
            turn = outages.enter(TEXT) if outages.is_any else None
            heapq.heappush(running, (clock.now + takes_s + job * 1e-9, job, turn))
        if taken:
            in_vain = in_vain + 1 if held_up == len(taken) else 0
            next_claim = clock.now + (look_again_s(in_vain) if in_vain else 0)
        if running:
            clock.now = min(running[0][0], clock.now + 0.5)
        else:
            clock.now += 0.5
    work_s = jobs * takes_s / window
    assert clock.now - back_at < 60 + work_s
    at_onset = window + FAULTS
    assert len(probes) <= at_onset + probes_a_minute * outage_s / 60
    for early, late in zip(probes[at_onset:], probes[at_onset + 1 :], strict=False):
        assert late - early >= FIRST_S
    # No churn: now and then a window is looked at, and of an upstream that is out one job.
    looks = window if error is BARE else 1
    assert claims - jobs < looks * (outage_s / 2 + 60) + at_onset
    assert outages.wait_ms(TEXT) <= LONGEST_SPREAD_S * 1000
