"""Sums on their way to Prometheus: nothing is lost, nothing is counted twice."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tidegate.errors import CallPreempted
from tidegate.metrics.instruments import MOST_TENANTS, Calls, Instruments, Known, Metric, Tally
from tidegate.metrics.process import Gauges, _add_loads
from tidegate.record import RETRIED, CallRecord, Failure
from tidegate.upstream.server_load import ServerLoad


@given(st.lists(st.lists(st.floats(0, 2_000), max_size=20), max_size=5))
def test_a_spread_tells_the_same_as_the_library_one_by_one(batches: list[list[float]]) -> None:
    spec, registry = Metric.QUEUE, CollectorRegistry()
    usual = Histogram(
        spec.name, spec.help_text, spec.labels, buckets=spec.buckets, registry=registry
    )
    made = Instruments()
    for batch in batches:
        for value in batch:
            made.tally.observe(spec, ("relay", "text_only", "gemini"), value)
            usual.labels("relay", "text_only", "gemini").observe(value)
        made.flush()
    told = [line for line in _lines(made.registry) if line.startswith(spec.name)]
    wanted = [line for line in _lines(registry) if line.startswith(spec.name)]
    assert [_rounded(line) for line in told] == [_rounded(line) for line in wanted]


def _lines(registry: CollectorRegistry) -> list[str]:
    return generate_latest(registry).decode().splitlines()


def _rounded(line: str) -> tuple[str, float]:
    name, _, value = line.rpartition(" ")
    return name, round(float(value), 6)


def test_a_gauge_that_was_forgotten_is_shown_again_as_it_was() -> None:
    made, labels = Instruments(), ("gemini", "api-1")
    shown = f'{Metric.HELD.name}{{pool="gemini",process="api-1"}} '
    for value in (0, 3, 3, 0):
        made.set(Metric.HELD, labels, value)
        assert f"{shown}{value:.1f}" in _lines(made.registry)
    made.set(Metric.HELD, labels, 3)
    made.forget("pool", "gemini")
    made.set(Metric.HELD, labels, 3)
    assert f"{shown}3.0" in _lines(made.registry)


def test_a_scrape_has_each_metric_once() -> None:
    given = Gauges()
    _add_loads(given, {"gpu": ServerLoad(1, 2, 4, 100, 0.5)})
    told = generate_latest(Instruments().also(given)).decode().splitlines()
    types = [line.split()[2] for line in told if line.startswith("# TYPE ")]
    assert sorted(types) == sorted(set(types)), "a second TYPE line makes parsers refuse all"
    assert 'tidegate_server_running{upstream="gpu"} 1.0' in told


def test_a_count_is_there_from_the_start_and_taken_once() -> None:
    tally = Tally()
    tally.add(Metric.FENCED, ("gemini",), 0)
    assert list(tally.take_counts()) == [(Metric.FENCED, ("gemini",), 0)]
    assert list(tally.take_counts()) == []
    tally.add(Metric.FENCED, ("gemini",), 3)
    assert list(tally.take_counts()) == [(Metric.FENCED, ("gemini",), 3)]
    assert list(tally.take_counts()) == []


def test_names_that_clients_make_up_take_no_place() -> None:
    tally = Tally()
    calls = Calls(tally)
    now = datetime.now(UTC)

    def of(number: int, status: str, attempts: int) -> CallRecord:
        name = f"n{number}"
        record = CallRecord("relay", name, now, model=name, attempts=attempts, upstream_ms=1.0)
        record.end(status)
        return record

    calls.take([of(number, "refused", 0) for number in range(1_000)])
    calls.take([of(number, "succeeded", 1) for number in range(2_000, 2_500)])
    seen = {labels[0] for metric, labels, _ in tally.take_counts() if metric is Metric.TENANT_CALLS}
    assert len(seen) == MOST_TENANTS + 1
    assert "other" in seen
    assert "n1" not in seen
    assert "n2000" in seen


def test_the_first_names_keep_their_places() -> None:
    known = Known(2)
    assert [known.of(name, learns=True) for name in ("a", "b", "c", "a")] == [
        "a",
        "b",
        "other",
        "a",
    ]
    assert len(known) == 2


def test_a_call_that_gave_way_is_counted_and_is_no_failure() -> None:
    tally = Tally()
    record = CallRecord("batch", "acme", datetime.now(UTC), pool="gpu", attempts=1, upstream_ms=1.0)
    record.end(RETRIED, Failure.of(CallPreempted("it gave way")))
    Calls(tally).take([record])
    counts = {metric: (labels, amount) for metric, labels, amount in tally.take_counts()}
    assert counts[Metric.PREEMPTED] == (("batch", "gpu"), 1)
    assert counts[Metric.RETRIES] == (("batch", "gpu"), 1)
    assert Metric.FAILURES not in counts


def test_a_call_that_was_never_admitted_counts_in_the_pool_in_which_it_waited() -> None:
    tally = Tally()
    record = CallRecord("relay", "acme", datetime.now(UTC), waits_for=("gpu", ("kind:text_only",)))
    record.end("expired", Failure("deadline_exceeded", "its deadline came"))
    Calls(tally).take([record])
    counted = {spec: labels for spec, labels, amount in tally.take_counts() if amount}
    assert counted[Metric.CALLS] == ("relay", "", "gpu", "", "expired")
    assert counted[Metric.FAILURES] == ("relay", "gpu", "deadline_exceeded")


def test_a_429_counts_in_the_pool_of_the_upstream_that_gave_it() -> None:
    tally = Tally()
    record = CallRecord("relay", "acme", datetime.now(UTC), pool="b", upstream="second", attempts=2)
    record.note_throttled("first", "a")
    record.end("succeeded", None)
    Calls(tally).take([record])
    counted = {labels: n for spec, labels, n in tally.take_counts() if spec is Metric.THROTTLED}
    assert {labels: n for labels, n in counted.items() if n} == {("relay", "a"): 1}


def test_each_try_counts_in_its_own_pool() -> None:
    """All of them counted in the pool of the last."""
    tally = Tally()
    record = CallRecord("relay", "acme", datetime.now(UTC))
    for pool in ("a", "a", "b", "a", "c"):
        if record.attempts and record.pool != pool:
            record.note_moving()
        record.pool = pool
        record.attempts += 1
    record.end("succeeded", None)
    Calls(tally).take([record])
    counted = {labels: n for spec, labels, n in tally.take_counts() if spec is Metric.ATTEMPTS}
    assert counted == {("relay", "a"): 3, ("relay", "b"): 1, ("relay", "c"): 1}
