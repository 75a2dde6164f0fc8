"""The arithmetic of the limiter's benchmark: a wrong figure would be believed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.limiter import calllog
from bench.limiter.arrivals import most_in_window, rate_used, refusals
from bench.limiter.bars import Results, verdicts
from bench.limiter.calllog import CallLog, Kind, Record
from bench.limiter.tables import grids
from bench.limiter.trace import Trace, jain, quantile, shares_off
from bench.peers.catalogue import LOCAL, OURS, PEERS

S = 1_000_000_000
MS = 1_000_000


def calls(*spans: tuple[float, float | None]) -> list[Record]:
    """One worker's log; times in seconds, None for a call that is still open."""
    records = []
    for task, (began_s, ended_s) in enumerate(spans):
        records.append(Record(round(began_s * S), Kind.BEGAN, task))
        if ended_s is not None:
            records.append(Record(round(ended_s * S), Kind.ENDED, task))
    return sorted(records)


def test_calls_of_all_workers_count_together() -> None:
    trace = Trace.of([calls((0, 2), (1, 3)), calls((1.5, 4))], {})
    assert trace.peak() == 3
    assert trace.peak(since_ns=3 * S) == 1
    assert trace.peak(until_ns=1 * S) == 2
    assert trace.used_s(0, 4 * S) == pytest.approx(6.5)
    assert trace.used_s(1 * S, 2 * S) == pytest.approx(2.5)
    assert trace.over_s(2, 0, 4 * S) == pytest.approx(0.5)


def test_calls_that_touch_do_not_overlap() -> None:
    assert Trace.of([calls((0, 1)), calls((1, 2))], {}).peak() == 1


def test_a_killed_workers_calls_end_with_it() -> None:
    logs = [calls((0, None), (0, None)), calls((2, 3))]
    assert Trace.of(logs, {0: 1 * S}).peak(since_ns=round(1.5 * S)) == 1
    assert Trace.of(logs, {}).peak() == 3


def test_a_wake_up_is_from_a_full_houses_end_to_the_next_beginning() -> None:
    # Two permits: at 1.0 and 1.1 they become free, at 1.3 and 1.4 they are in use again.
    trace = Trace.of([calls((0, 1.0), (0, 1.1), (1.3, 2), (1.4, 2))], {})
    waits = trace.wake_ups_ms(2, 0, round(1.9 * S))
    assert waits == pytest.approx([300, 300])


def test_all_in_use_again_is_found_after_the_kill_only() -> None:
    trace = Trace.of([calls((0, None)), calls((0, 5), (3, 5))], {0: 1 * S})
    assert trace.first_full_ns(2, 1 * S + 1) == 3 * S
    assert trace.first_full_ns(3, 1 * S + 1) is None


def test_a_permit_passed_on_inside_a_process_is_no_new_grant() -> None:
    passed_on = calls((0, 2), (2.1, 3))
    assert Trace.of([passed_on, []], {}).first_growth_ns(1 * S, 2 * S) is None
    granted = calls((2.5, 3))
    found = Trace.of([passed_on, granted], {}).first_growth_ns(1 * S, 2 * S)
    assert found == round(2.5 * S)


def test_fairness_and_shares() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain([0, 0]) == 0
    assert shares_off(Counter(a=10, b=20), {"a": 1, "b": 2}) == pytest.approx(0)
    assert shares_off(Counter(a=12, b=18), {"a": 1, "b": 2}) == pytest.approx(0.2)
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([], 0.5) is None


def test_a_window_over_its_bound_is_seen_wherever_it_lies() -> None:
    arrivals = [(0, 1), (900 * MS, 1), (1000 * MS, 1), (1500 * MS, 1)]
    assert most_in_window(arrivals, 1 * S) == 3
    refused = refusals(arrivals, 2, 1 * S)
    assert refused["sliding window"] == 1
    assert refused["fixed window"] == 1
    assert refusals(arrivals, 3, 1 * S) == dict.fromkeys(refused, 0)


def test_what_a_rate_used_is_counted_over_whole_windows() -> None:
    at_once_each_s = [(second * S, 1) for second in range(4) for _ in range(2)]
    assert rate_used(at_once_each_s, 2, 1 * S, 3) == pytest.approx(1.0)
    at_once_each_2_s = [(2 * second * S, 1) for second in range(4) for _ in range(2)]
    assert rate_used(at_once_each_2_s, 2, 1 * S, 3) == pytest.approx(0.5)
    assert rate_used(at_once_each_s[:3], 2, 1 * S, 3) == pytest.approx(0.5)
    assert rate_used([], 2, 1 * S, 3) == 0


def test_a_log_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    calllog.create(path)
    log = CallLog(str(path))
    log.add(Kind.BEGAN, 7)
    log.add(Kind.ENDED, 7)
    records = calllog.read(path)
    assert [(record.kind, record.task) for record in records] == [(Kind.BEGAN, 7), (Kind.ENDED, 7)]
    assert records[0].at_ns <= records[1].at_ns


def load(used: float, peak: int = 50, cpu_us: float = 100.0) -> dict[str, float | None]:
    return {
        "used": used,
        "peak": peak,
        "bound": 50,
        "workers_us": cpu_us,
        "valkey_us": 20.0,
        "connections": 3,
        "wake_p50_ms": None,
    }


def by_figure(results: Results) -> dict[str, tuple[str, str]]:
    return {one.figure: (one.verdict, one.ours) for one in verdicts(results)}


def test_a_peer_that_goes_over_sets_no_bar() -> None:
    over, honest = PEERS[0].name, PEERS[1].name
    results = {
        OURS.name: {"load-50-20": load(0.94)},
        over: {"load-50-20": load(0.99, peak=51)},
        honest: {"load-50-20": load(0.93)},
    }
    bar = "permit-seconds used, limit 50, 20 ms calls"
    assert by_figure(Results(results))[bar] == ("ok", "94.0%; best peer 93.0%")
    results[over] = {"load-50-20": load(0.99)}
    assert by_figure(Results(results))[bar][0] == "missed"


def test_process_cpu_is_less_that_of_the_harness() -> None:
    results = Results(
        {
            OURS.name: {"load-50-20": load(0.9, cpu_us=100)},
            LOCAL.name: {"load-50-20": load(1.0, cpu_us=45)},
        }
    )
    bar = "process CPU per admission, limit 50"
    assert by_figure(results)[bar] == ("ok", "55.0 us, 3 connections")


def test_nothing_measured_is_not_ok() -> None:
    assert {one.verdict for one in verdicts(Results({}))} == {"not measured"}
    failed = Results({OURS.name: {"load-50-20": {"failed": "NeverReady: no"}}})
    assert {one.verdict for one in verdicts(failed)} == {"not measured"}


def test_what_failed_says_so_in_the_tables() -> None:
    results = Results({PEERS[0].name: {"load-50-20": {"failed": "NeverReady: it | broke"}}})
    glance, *_ = shown = [grid.markdown() for grid in grids(results)]
    assert "failed" in glance
    assert any("NeverReady: it / broke" in markdown for markdown in shown)
