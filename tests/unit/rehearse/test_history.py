"""The checker of histories catches what it is for: every rule is broken once by hand."""

from __future__ import annotations

import pytest

from chaos.history import (
    flows_again_ns,
    from_emulator,
    limits_of,
    overtaking,
    waste,
    window_maximum,
)
from tidegate.checker import NS, Curve, Event, Interruption, in_flight, shares
from tidegate.emulator.state import LoggedCall

LIMIT = "kind:text_only"


def log(text: str, limits: tuple[str, ...] = (LIMIT,)) -> list[Event]:
    """`"0 ask w0.1 a; 5 begin w0.1 a"`: seconds, what, worker.call, tenant."""
    events = []
    for line in filter(None, (part.strip() for part in text.split(";"))):
        at_s, what, who, tenant = line.split()
        worker, call = who.split(".")
        at_ns = int(float(at_s) * NS)
        events.append(Event(at_ns, what, worker, int(call), tenant, limits))  # type: ignore[arg-type]
    return events


def calls(*spans: tuple[float, float], worker: str = "w0", tenant: str = "a") -> list[Event]:
    """A history of calls from one second to another, in order of time."""
    parts: list[tuple[float, str]] = []
    for number, (begin, end) in enumerate(spans):
        parts.append((begin, f"{begin} begin {worker}.{number} {tenant}"))
        parts.append((end, f"{end} end {worker}.{number} {tenant}"))
    return log(";".join(text for _, text in sorted(parts)))


def merged(*logs: list[Event]) -> list[Event]:
    return sorted((event for one in logs for event in one), key=lambda event: event.at_ns)


# -- in flight


def test_the_peak_is_the_most_that_were_open_at_once() -> None:
    curve = in_flight(calls((0, 10), (1, 3), (2, 4), (5, 6)), LIMIT)
    assert curve.peak() == 3
    assert curve.peak_at_once() == (3, 2 * NS)
    assert [curve.at(int(second * NS)) for second in (0.5, 1.5, 2.5, 3.5, 4.5, 11)] == [
        *(1, 2, 3, 2, 1, 0),
    ]


def test_one_call_too_many_is_caught_however_short() -> None:
    curve = in_flight(calls((0, 10), (1, 10), (2, 2.000000001)), LIMIT)
    assert curve.peak() == 3
    assert curve.above_s(2) == pytest.approx(1e-9)
    assert curve.above_s(3) == 0


def test_a_call_that_begins_when_another_ends_is_not_over() -> None:
    ended_then_begun = log("0 begin w0.1 a; 1 end w0.1 a; 1 begin w0.2 a; 2 end w0.2 a")
    assert in_flight(ended_then_begun, LIMIT).peak() == 1


def test_limits_are_counted_apart() -> None:
    both = log("0 begin w0.1 a; 3 end w0.1 a", (LIMIT, "pool:total"))
    other = log("1 begin w1.1 a; 2 end w1.1 a", ("pool:total",))
    events = merged(both, other)
    assert limits_of(events) == {LIMIT, "pool:total"}
    assert in_flight(events, LIMIT).peak() == 1
    assert in_flight(events, "pool:total").peak() == 2
    assert in_flight(events).peak() == 2


def test_what_a_stopped_worker_holds_is_excused_only_while_it_is_stopped() -> None:
    stopped = calls((0, 10), worker="w0")
    others = calls((3, 5), worker="w1")
    events = merged(stopped, others)
    assert in_flight(events, LIMIT).peak() == 2
    assert in_flight(events, LIMIT, without=[Interruption("w0", 2 * NS, 6 * NS)]).peak() == 1
    too_short = [Interruption("w0", 2 * NS, 4 * NS)]
    assert in_flight(events, LIMIT, without=too_short).above_s(1) == pytest.approx(1.0)
    the_other = [Interruption("w1", 0, 4 * NS)]
    assert in_flight(events, LIMIT, without=the_other).above_s(1) == pytest.approx(1.0)


def test_the_mean_is_the_area_over_the_time() -> None:
    curve = Curve([(0, 2), (2 * NS, 0), (3 * NS, 4)])
    assert curve.mean(0, 4 * NS) == pytest.approx(2.0)
    assert curve.mean(1 * NS, 3 * NS) == pytest.approx(1.0)
    assert curve.mean(-4 * NS, 4 * NS) == pytest.approx(1.0)


# -- recovery


def recovered_s(curve: Curve, since_s: float, known_s: float) -> float | None:
    found = curve.recovered_ns(
        2, int(since_s * NS), int(known_s * NS), window_ns=NS // 2, share=0.9
    )
    return None if found is None else found / NS


def test_recovery_is_the_first_moment_of_full_use_that_lasts() -> None:
    killed = Curve([(0, 2), (1 * NS, 1), (2 * NS, 2)])
    assert recovered_s(killed, 1, 4) == pytest.approx(1.0)
    assert recovered_s(killed, 1, 2.2) is None  # not known yet
    assert recovered_s(killed, 3, 4) == 0


def test_a_moment_of_full_use_is_no_recovery() -> None:
    flicker = Curve([(0, 2), (1 * NS, 1), (int(1.5 * NS), 2), (int(1.6 * NS), 1), (2 * NS, 2)])
    assert recovered_s(flicker, 1, 4) == pytest.approx(1.0)


def test_never_back_is_caught() -> None:
    assert recovered_s(Curve([(0, 2), (1 * NS, 1)]), 1, 60) is None


# -- windows


def test_the_most_in_any_sliding_window_not_in_fixed_ones() -> None:
    # Two at the end of one minute and two at the beginning of the next.
    events = calls((58, 59), (59, 60), (60, 61), (61, 62))
    assert window_maximum(events, LIMIT, 60 * NS).calls == 4
    assert window_maximum(events, LIMIT, 2 * NS).calls == 2
    assert window_maximum(events, LIMIT, 2 * NS + 1).calls == 3


def test_tokens_are_counted_apart_from_calls() -> None:
    events = [
        event._replace(tokens=tokens)
        for event, tokens in zip(
            log("0 begin w0.1 a; 1 begin w0.2 a; 12 begin w0.3 a"), (10, 10, 500), strict=True
        )
    ]
    assert window_maximum(events, LIMIT, 10 * NS) == (2, 500, 1 * NS, 12 * NS)
    assert window_maximum(events, LIMIT, 13 * NS) == (3, 520, 12 * NS, 12 * NS)


def test_calls_of_another_limit_and_ends_do_not_arrive() -> None:
    events = calls((0, 1), (0.5, 2))
    assert window_maximum(events, "kind:other", 60 * NS) == (0, 0, 0, 0)
    assert window_maximum(events, LIMIT, 60 * NS).calls == 2


def flows_again_s(begins: list[float], since_s: float, known_s: float) -> float | None:
    events = calls(*((begin, begin + 0.1) for begin in begins))
    found = flows_again_ns(
        events, LIMIT, int(since_s * NS), int(known_s * NS), window_ns=2 * NS, least=3
    )
    return None if found is None else found / NS


def test_a_rate_flows_again_when_a_window_is_full_again() -> None:
    assert flows_again_s([0, 1, 1.5, 4, 5, 5.5], 2, 9) == pytest.approx(2.0)
    assert flows_again_s([0, 1, 1.5, 4, 6, 7, 7.5], 2, 9) == pytest.approx(4.0)
    assert flows_again_s([0, 1, 1.5, 4, 5, 5.5], 2, 5.6) is None  # not known yet
    assert flows_again_s([0, 1, 1.5, 4], 2, 60) is None


# -- order


def test_first_come_first_served_is_perfect_order() -> None:
    events = log("0 ask w0.1 a; 1 ask w0.2 a; 2 begin w0.1 a; 3 begin w0.2 a; 4 end w0.1 a")
    assert overtaking(events, within_process=True) == (0, None)
    assert overtaking(events, within_process=False) == (0, None)


def test_an_inversion_within_a_process_is_caught() -> None:
    events = log("0 ask w0.1 a; 1 ask w0.2 a; 2 ask w0.3 a; 3 begin w0.3 a; 4 begin w0.1 a")
    worst = overtaking(events, within_process=True)
    assert worst.places == 2
    assert worst.event is not None
    assert worst.event.call == 3


def test_an_inversion_across_processes_is_measured_in_places() -> None:
    events = log("0 ask w0.1 a; 1 ask w1.1 a; 2 ask w1.2 a; 3 begin w1.1 a; 4 begin w0.1 a")
    assert overtaking(events, within_process=True).places == 0
    assert overtaking(events, within_process=False).places == 1


def test_tenants_and_lanes_may_overtake_each_other() -> None:
    events = log("0 ask w0.1 a; 1 ask w0.2 b; 2 begin w0.2 b")
    assert overtaking(events, within_process=False).places == 0
    other = log("1 ask w0.2 a; 2 begin w0.2 a", ("kind:image_generation",))
    events = merged(log("0 ask w0.1 a"), other)
    assert overtaking(events, within_process=False).places == 0
    low = log("0 ask w0.1 a")
    high = [event._replace(priority="high") for event in log("1 ask w0.2 a; 2 begin w0.2 a")]
    assert overtaking(merged(low, high), within_process=False).places == 0


def test_who_gave_up_is_not_overtaken() -> None:
    events = log("0 ask w0.1 a; 1 ask w0.2 a; 2 leave w0.1 a; 3 begin w0.2 a")
    assert overtaking(events, within_process=True).places == 0
    too_late = log("0 ask w0.1 a; 1 ask w0.2 a; 2 begin w0.2 a; 3 leave w0.1 a")
    assert overtaking(too_late, within_process=True).places == 1


# -- shares


def backlogged(pattern: str, seconds: int) -> list[Event]:
    """Both tenants always wait; in each second the call of one of them runs, as `pattern` says."""
    events = log("0 ask w0.9001 a; 0 ask w0.9002 b")
    for second in range(seconds):
        tenant = pattern[second % len(pattern)]
        text = f"{second} ask w0.{second} {tenant}; {second} begin w0.{second} {tenant}"
        events += log(f"{text}; {second + 1} end w0.{second} {tenant}")
    return events


def test_shares_by_weight() -> None:
    seen = shares(backlogged("abb", 30), {"a": 1, "b": 2})
    assert seen.off == pytest.approx(0.0, abs=1e-6)
    assert seen.shares == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    assert seen.together_s == pytest.approx(30.0)


def test_a_tenant_that_gets_too_much_is_caught() -> None:
    seen = shares(backlogged("ab", 30), {"a": 1, "b": 2})
    assert seen.off == pytest.approx(0.5)  # a has 1/2 for 1/3


def test_time_in_which_only_one_waits_does_not_count() -> None:
    alone = log("100 leave w0.9002 b; 100 begin w0.200 a; 190 end w0.200 a")
    assert shares(backlogged("ab", 20) + alone, {"a": 1, "b": 1}).off == pytest.approx(0.0)


# -- waste


def test_a_free_permit_while_somebody_waits_is_waste() -> None:
    events = log(
        "0 ask w0.1 a; 0 begin w0.1 a; 1 ask w0.2 a; 4 end w0.1 a; 4.5 begin w0.2 a; 6 end w0.2 a"
    )
    seen = waste(events, {LIMIT: 1})
    assert seen.permit_s == pytest.approx(0.5)
    assert seen.possible_s == pytest.approx(3.5)
    assert seen.longest_s == pytest.approx(0.5)
    assert seen.used == pytest.approx(3 / 3.5)


def test_a_free_permit_that_nobody_waits_for_is_none() -> None:
    events = calls((0, 1), (5, 6))
    assert waste(events, {LIMIT: 3}).permit_s == 0
    assert waste(events, {LIMIT: 3}).used == 1.0


def test_who_waits_for_a_full_limit_wastes_no_other() -> None:
    demand = (LIMIT, "pool:total")
    events = log("0 ask w0.1 a; 0 begin w0.1 a; 1 ask w0.2 a; 3 end w0.1 a", demand)
    assert waste(events, {LIMIT: 1, "pool:total": 10}).permit_s == 0
    assert waste(events, {LIMIT: 2, "pool:total": 10}).permit_s == pytest.approx(2.0)


# -- the emulator's log


def logged(number: int, started_s: float, ended_s: float | None, outcome: str | None) -> LoggedCall:
    return LoggedCall(
        id=number,
        kind="text_only",
        model="m",
        method="generateContent",
        prompt="",
        prompt_sha="",
        started_ns=int(started_s * NS),
        ended_ns=None if ended_s is None else int(ended_s * NS),
        outcome=outcome,  # type: ignore[arg-type]
    )


def test_the_emulators_log_is_a_history() -> None:
    events = from_emulator(
        [
            logged(1, 0, 4, "finished"),
            logged(2, 1, 2, "client_gone"),
            logged(3, 1, 1, "refused"),
            logged(4, 3, None, None),
        ]
    )
    assert [event.at_ns // NS for event in events] == [0, 1, 2, 3, 4]
    assert in_flight(events, LIMIT).peak() == 2
    assert in_flight(events, "model:m").at(5 * NS) == 1
    assert window_maximum(events, "pool:total", 60 * NS).calls == 3
