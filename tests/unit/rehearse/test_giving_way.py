"""Calls that give way in a rehearsal: which, when, how often, and what the report says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import Concurrency, PoolPolicy, Rate
from tidegate.policy.deployment import Preempt
from tidegate.rehearse import variants
from tidegate.rehearse.load import Arrival, TokenPace, Usual, load_of, read_trace, write_trace
from tidegate.rehearse.report import Findings, difference_of, sentence_of, tables_of
from tidegate.rehearse.simulation import Setting, compare, rehearse

KIND = "kind:text_only"
LINE = Arrival(0.0, "acme", duration_ms=60_000, priority=-100, gives_way=True, input_tokens=500)
LIVE = Arrival(10_000.0, "live", duration_ms=2_000)
RULE = Preempt()
USUAL = Usual({"text_only": "m"}, TokenPace())


def played(
    *arrivals: Arrival, preempt: Preempt | None = RULE, limit: int = 1, **setting: Any
) -> Findings:
    policy = PoolPolicy({KIND: limit})
    in_order = sorted(arrivals, key=lambda one: one.time_ms)
    return rehearse("", in_order, policy, Setting(preempt=preempt, **setting))


def longest_ms(found: Findings, tenant: str) -> float:
    [group] = [one for one in found.tenants if one.name == tenant]
    assert group.waits.longest_ms is not None
    return group.waits.longest_ms


def test_without_a_rule_a_live_call_waits_for_the_end_of_the_line() -> None:
    found = played(LINE, LIVE, preempt=None)
    assert longest_ms(found, "live") == pytest.approx(50_000, abs=10)
    assert (found.gave_way, found.lost_ms) == (0, 0)


@pytest.mark.parametrize(("after_ms", "every_ms"), [(1_000, 250), (200, 50), (4_000, 1_000)])
def test_a_line_gives_way_and_begins_again_after_the_live_call(
    after_ms: int, every_ms: int
) -> None:
    found = played(LINE, LIVE, preempt=Preempt(after_ms=after_ms))
    waited_ms = longest_ms(found, "live")
    # The call is seen within one read, and overdue as many ms after that.
    assert after_ms <= waited_ms <= after_ms + 2 * every_ms + 10
    assert found.gave_way == 1
    assert found.lost_ms == pytest.approx(10_000 + waited_ms, abs=10)
    # The live call takes its two seconds, then the line its whole minute.
    again_ms = 10_000 + waited_ms + 2_000
    assert longest_ms(found, "acme") == pytest.approx(again_ms, abs=10)
    assert found.end_ms == pytest.approx(again_ms + 60_000, abs=20)


def test_a_line_gives_way_only_so_often() -> None:
    lives = [replace(LIVE, time_ms=10_000.0 * n) for n in range(1, 6)]
    found = played(LINE, *lives, preempt=Preempt(times=2))
    assert found.gave_way == 2
    # It begins a third time after 22 and keeps its permit for a minute: three live calls wait.
    assert longest_ms(found, "live") > 50_000
    assert played(LINE, *lives, preempt=Preempt(times=9)).gave_way == 5


def test_calls_of_clients_and_of_the_same_band_keep_their_permits() -> None:
    assert played(replace(LINE, gives_way=False), LIVE).gave_way == 0
    assert played(LINE, replace(LIVE, priority=-100)).gave_way == 0
    assert played(replace(LINE, priority=0), LIVE).gave_way == 0


def test_the_newest_call_of_a_process_gives_way() -> None:
    newer = replace(LINE, time_ms=5_000.0, tenant="newer")
    found = played(LINE, newer, LIVE, limit=2, processes=1)
    gave_way = {one.name: one.gave_way for one in found.tenants}
    assert gave_way == {"acme": 0, "newer": 1, "live": 0}
    assert found.lost_ms == pytest.approx(5_000 + longest_ms(found, "live"), abs=10)


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_together_have_no_more_calls_give_way_than_wait(processes: int) -> None:
    lines = [replace(LINE, time_ms=float(n)) for n in range(6)]
    found = played(*lines, LIVE, limit=6, processes=processes)
    assert found.gave_way == 1


def test_a_call_that_gave_way_costs_once_but_its_request_is_spent() -> None:
    policy = PoolPolicy({KIND: Concurrency(1), "rpm:total": Rate(10, 60_000)})
    found = rehearse("", [replace(LINE, cost_usd=0.5), LIVE], policy, Setting(preempt=Preempt()))
    assert found.cost_micros == 500_000
    rate = next(one for one in found.limits if one.limit == "rpm:total")
    assert (found.gave_way, rate.peak) == (1, 3)


def test_a_call_that_gave_way_keeps_its_deadline() -> None:
    """It would begin again after the live call, which is later than it may."""
    found = played(replace(LINE, deadline_ms=5_000), replace(LIVE, duration_ms=9_000))
    assert found.gave_way == 1
    assert found.refused == {"deadline": 1}
    assert found.admitted == 1


def test_the_report_counts_what_gave_way() -> None:
    arrivals = [LINE, LIVE]
    policy = PoolPolicy({KIND: 1})
    preempts = {"as it is": None, "preempt=true": Preempt()}
    found = compare(arrivals, dict.fromkeys(preempts, policy), Setting(), preempts=preempts)
    rows = {row[0]: row[1:] for row in tables_of(found)[0].rows}
    assert rows["gave way"] == ("0", "1")
    assert rows["work lost by it"] == ("0", "11.0 s")
    assert "calls would have given way once instead of never" in difference_of(*found)
    assert "calls gave way once (11.0 s of work lost)" in sentence_of(found[1])
    assert "gave way" not in sentence_of(found[0])
    tenants = next(one for one in tables_of([found[1]]) if one.title == "Tenants")
    place = tenants.columns.index("gave way")
    assert [(row[0], row[place]) for row in tenants.rows] == [("acme", "1"), ("live", "0")]


def test_changes_set_the_rule() -> None:
    policy = PoolPolicy({KIND: 1})
    sets: dict[str, dict[str, Any]] = {
        "on": {"preempt": True},
        "off": {"preempt": False},
        "table": {"preempt": {"after_ms": 200, "times": 1}},
        "part": {"preempt.after_ms": 300, KIND: 2},
        "limit": {KIND: 3},
    }
    made = variants(policy, (), Preempt(500, 5), sets)
    assert made.preempts == {
        "as it is": Preempt(500, 5),
        "on": Preempt(500, 5),
        "off": None,
        "table": Preempt(200, 1),
        "part": Preempt(300, 5),
        "limit": Preempt(500, 5),
    }
    assert made.policies["part"].limits[KIND] == 2
    assert variants(policy, (), None, {"on": {"preempt": True}}).preempts["on"] == Preempt()
    for wrong in ({"preempt": 3}, {"preempt.after_ms": 0}, {"preempt.often": 1}):
        with pytest.raises(ConfigError, match="preempt"):
            variants(policy, (), None, {"wrong": wrong})


def test_a_load_and_a_trace_say_what_gives_way() -> None:
    stream = {"per_second": 1, "duration_ms": 10, "gives_way": True, "priority": -50}
    arrivals = load_of({"lasts": "10s", "arrivals": [stream]}).draw(USUAL, 1)
    assert all(one.gives_way for one in arrivals)
    again = read_trace("trace.csv", write_trace(arrivals), USUAL)
    assert all(one.gives_way for one in again)
    kept = read_trace("t", '{"time_ms": 0, "duration_ms": 5, "gives_way": false}', USUAL)
    assert [one.gives_way for one in kept] == [False]
    with pytest.raises(ConfigError, match="gives_way"):
        read_trace("t", '{"time_ms": 0, "duration_ms": 5, "gives_way": "maybe"}', USUAL)
