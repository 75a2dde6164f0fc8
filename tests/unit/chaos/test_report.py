"""A broken promise is found and named, and a kept one is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chaos.limiter.faults import FAULTS, Fault
from chaos.limiter.report import Outcome, Round, judge, table
from chaos.limiter.scene import Size
from chaos.limiter.worker import LIMIT, Orders
from tidegate.checker import NS, Event, Interruption, first_of_new_epoch_s

SIZE = Size(limit=1, lease_ms=1000)
ORDERS = Orders(
    *("", "", 0, "w0", 1),
    limits={"pool:total": 3},
    policy={"weights": {"a": 1, "b": 2, "c": 4}},
)
WITH_RATE = replace(ORDERS, limits={"rpm:x": ["rate", 2, 1500, "requests"]})


def call(worker: str, number: int, begin_s: float, end_s: float) -> list[Event]:
    begin = Event(int(begin_s * NS), "begin", worker, number, limits=(LIMIT,))
    return [begin, begin._replace(at_ns=int(end_s * NS), what="end")]


def judged(
    fault: Fault,
    calls: list[list[Event]],
    *,
    frozen: tuple[Interruption, ...] = (),
    orders: Orders = ORDERS,
    **of_round: float,
) -> Outcome:
    outcome = Outcome("x", "a fault", fault.promise, SIZE.limit)
    outcome.rounds = [Round(of_round.get("recovery_s"), of_round.get("grants_s"))]
    events = sorted((event for one in calls for event in one), key=lambda event: event.at_ns)
    judge(fault, outcome, events, frozen, SIZE, orders)
    return outcome


GOOD = [call("w0", 1, 0, 1), call("w1", 1, 1.1, 2), call("w0", 2, 2, 3)]
OVER = [*GOOD, call("w1", 2, 2.5, 3)]


def test_what_is_promised_and_kept() -> None:
    outcome = judged(FAULTS["calm"], GOOD, recovery_s=0.0)
    assert outcome.problems == []
    assert (outcome.calls, outcome.peak, outcome.over_s) == (3, 1, 0.0)
    assert outcome.used == pytest.approx(0.95)
    assert "kept (0 over)" in table([outcome])


def test_one_call_too_many_breaks_it() -> None:
    outcome = judged(FAULTS["calm"], OVER, recovery_s=0.0)
    assert outcome.problems == [f"{LIMIT}: 2 of 1 at once 2.50 s after the start, 0.500 s in all"]
    assert "BROKEN" in table([outcome])


def test_what_stands_still_is_excused_where_that_is_promised() -> None:
    stopped = (Interruption("w1", int(2.4 * NS), 3 * NS),)
    assert judged(FAULTS["stop-reuse"], OVER, frozen=stopped, recovery_s=0.5).problems == []
    assert judged(FAULTS["stop-hold"], OVER, frozen=stopped, recovery_s=0.5).problems != []
    earlier = (Interruption("w1", 0, 1 * NS),)
    assert judged(FAULTS["stop-reuse"], OVER, frozen=earlier, recovery_s=0.5).problems != []
    another = (Interruption("w7", int(2.4 * NS), 3 * NS),)
    assert judged(FAULTS["stop-reuse"], OVER, frozen=another, recovery_s=0.5).problems != []


def test_a_recovery_that_is_late_or_never_comes_breaks_it() -> None:
    assert judged(FAULTS["kill"], GOOD, recovery_s=1.3).problems == []
    assert "recovered after 1.31 s" in judged(FAULTS["kill"], GOOD, recovery_s=1.31).problems[0]
    assert "not used again" in judged(FAULTS["calm"], GOOD).problems[0]


def test_grants_that_are_late_or_never_come_break_it() -> None:
    kept = judged(FAULTS["restart-empty"], GOOD, recovery_s=0.0, grants_s=1.2)
    assert kept.problems == []
    late = judged(FAULTS["restart-empty"], GOOD, recovery_s=0.0, grants_s=1.4)
    assert "granted again after 1.4 s" in late.problems[0]
    assert judged(FAULTS["restart-empty"], GOOD, recovery_s=0.0).problems != []


def test_limits_beside_the_first_are_judged_too() -> None:
    wide = [[e._replace(limits=("pool:total",)) for e in call("w0", n, 0.1, 1)] for n in range(4)]
    outcome = judged(FAULTS["calm"], [*GOOD, *wide], recovery_s=0.0)
    assert outcome.problems == ["pool:total: 4 of 3 at once 0.10 s after the start, 0.900 s in all"]


def test_a_rate_is_judged_by_its_sliding_windows() -> None:
    def arrivals(*seconds: float) -> list[list[Event]]:
        spans = [call("w0", n, second, second) for n, second in enumerate(seconds)]
        return [[event._replace(limits=("rpm:x",)) for event in span] for span in spans]

    fault = FAULTS["rate"]
    few = [*GOOD, *arrivals(0.0, 1.4, 1.5, 3.0)]
    kept = judged(fault, few, orders=WITH_RATE, recovery_s=0.0)
    assert (kept.problems, kept.notes) == ([], ["rpm:x 2/2"])
    assert kept.used == pytest.approx(4 / 6)
    many = [*GOOD, *arrivals(0.0, 1.0, 1.4)]
    over = judged(fault, many, orders=WITH_RATE, recovery_s=0.0)
    assert over.problems == ["rpm:x: 3 of 2 requests in 1500 ms up to 1.40 s after the start"]


def test_a_tenant_that_gets_too_little_breaks_it() -> None:
    asked = Event(0, "ask", "w0", 90, "a", (LIMIT,))
    waiters = [asked._replace(call=90 + n, tenant=tenant) for n, tenant in enumerate("abc")]
    runs = [[e._replace(tenant=t) for e in call("w0", n, n, n + 1)] for n, t in enumerate("abc")]
    outcome = judged(FAULTS["fair"], [waiters, *runs], recovery_s=0.0)
    assert outcome.problems[0].startswith("the shares are 133.3% off")
    assert outcome.notes == ["shares 133.3% off in 3 s"]


def test_who_overtakes_too_many_breaks_it() -> None:
    asked = Event(0, "ask", "w0", 10, limits=(LIMIT,))
    early = [asked._replace(call=10 + n) for n in range(4)]
    late = [asked._replace(at_ns=1, call=2), *call("w0", 2, 3.5, 4)]
    outcome = judged(FAULTS["order"], [early, *GOOD, late], recovery_s=0.0)
    assert outcome.problems == ["4 that had asked before were overtaken"]


def test_the_first_permit_of_a_new_epoch() -> None:
    old = [event._replace(epoch=5) for event in (*call("w0", 1, 0, 1), *call("w0", 2, 3, 4))]
    new = [event._replace(epoch=6) for event in call("w0", 3, 5, 6)]
    assert first_of_new_epoch_s([*old, *new], 2 * NS) == pytest.approx(3.0)
    assert first_of_new_epoch_s(old, 2 * NS) is None


def test_what_was_left_out_says_why() -> None:
    outcome = Outcome("x", "a fault", "0 over", 1, left_out="no root")
    assert "left out: no root" in table([outcome])
