"""Described loads and traces: what is drawn is what was described, and what is wrong is named."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random
from statistics import mean, median, pstdev
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import Tokens
from tidegate.rehearse.load import (
    Arrival,
    TokenPace,
    Usual,
    amount_of,
    load_of,
    multiplied,
    read_trace,
    record_span,
    write_trace,
)

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
USUAL = Usual({"text_only": "a-model"}, TokenPace(first_ms=100, tokens_per_s=100))


def drawn(**stream: Any) -> list[Arrival]:
    described = {"lasts": "1h", "arrivals": [{"duration_ms": 500, **stream}]}
    return load_of(described).draw(USUAL, 1)


def test_poisson_arrivals_come_at_their_rate_and_by_chance() -> None:
    arrivals = drawn(per_minute=60)
    assert len(arrivals) == pytest.approx(3600, rel=0.05)
    gaps = [b.time_ms - a.time_ms for a, b in pairwise(arrivals)]
    # The deviation of an exponential distribution is its mean.
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.1)


def test_constant_arrivals_and_bursts() -> None:
    assert [one.time_ms for one in drawn(per_hour=4, pattern="constant")] == pytest.approx(
        [0, 900_000, 1_800_000]
    )
    bursts = drawn(**{"pattern": "bursts", "burst": 3, "every": "20m", "from": "10m"})
    assert [one.time_ms for one in bursts] == [0] * 3 + [1_200_000] * 3 + [2_400_000] * 3


def test_more_calls_come_in_the_same_time() -> None:
    calls = drawn(per_minute=60) + drawn(per_minute=6, tenant="b")
    calls.sort(key=lambda one: one.time_ms)
    for times in (0.5, 2, 2.5):
        many = multiplied(calls, times, 1)
        assert many == sorted(many, key=lambda one: one.time_ms) == multiplied(calls, times, 1)
        assert many[-1].time_ms == pytest.approx(calls[-1].time_ms, rel=0.01)
        for tenant in ("default", "b"):
            before, after = (sum(one.tenant == tenant for one in some) for some in (calls, many))
            assert after == pytest.approx(before * times, rel=0.1)
    steady = multiplied(drawn(per_hour=60, pattern="constant"), 2, 1)
    gaps = [b.time_ms - a.time_ms for a, b in pairwise(steady)]
    assert gaps == pytest.approx([30_000] * len(gaps))
    assert multiplied(calls, 1, 1) == calls
    assert len(multiplied(calls[:1], 0.001, 1)) == 1
    with pytest.raises(ConfigError, match="500000"):
        multiplied(calls, 500_000, 1)


def test_the_same_seed_draws_the_same_and_streams_do_not_touch_each_other() -> None:
    stream = {"tenant": "a", "per_minute": 5, "duration_ms": {"median": 100, "p95": 900}}
    other = {"tenant": "b", "per_minute": 9, "duration_ms": 1}
    alone = load_of({"arrivals": [stream]}).draw(USUAL, 7)
    both = load_of({"arrivals": [stream, other]}).draw(USUAL, 7)
    assert load_of({"arrivals": [stream]}).draw(USUAL, 7) == alone
    assert load_of({"arrivals": [stream]}).draw(USUAL, 8) != alone
    ours = [one.duration_ms for one in both if one.tenant == "a"]
    assert ours == [one.duration_ms for one in alone]


@pytest.mark.parametrize(
    ("value", "at_half", "at_95"),
    [
        (40, 40, 40),
        ({"median": 100, "p95": 1000}, 100, 1000),
        ({"lognormal": [100, 1.4]}, 100, 1000),
        ({"uniform": [0, 1000]}, 500, 950),
        ({"percentiles": {"50": 100, "95": 1000, "99": 1200}}, 100, 1000),
    ],
)
def test_amounts_are_spread_as_they_say(value: Any, at_half: float, at_95: float) -> None:
    amount, chance = amount_of("x", value), Random(1)
    values = sorted(amount.draw(chance) for _ in range(20_000))
    assert median(values) == pytest.approx(at_half, rel=0.05)
    assert values[19_000] == pytest.approx(at_95, rel=0.08)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"duration_ms": {"median": 5}}, "arrivals[0].duration_ms"),
        ({"duration_ms": -1}, "arrivals[0].duration_ms"),
        ({"duration_ms": {"percentiles": {"50": 9, "90": 1}}}, "arrivals[0].duration_ms"),
        ({"pattern": "tides"}, "arrivals[0].pattern"),
        ({"per_second": 4}, "arrivals[0].per_minute"),
        ({"per_minute": 0}, "arrivals[0].per_minute"),
        ({"from": "soon"}, "arrivals[0].from"),
        ({"colour": "blue"}, "arrivals[0].colour"),
        ({"kind": "poem"}, "arrivals[0]: kind"),
        ({"tenant": "a b"}, "arrivals[0]: tenant"),
        ({"priority": 101}, "arrivals[0]: priority"),
    ],
)
def test_what_is_wrong_in_a_load_is_named(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        drawn(**{"per_minute": 60, **change})
    assert wrong.value.variable == where


def test_a_load_that_is_too_large_or_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="too much"):
        drawn(per_second=1000)
    with pytest.raises(ConfigError, match="at least one call in that time"):
        drawn(per_hour=1, pattern="constant", until="1m")


def test_a_trace_is_read_as_it_was_written() -> None:
    arrivals = drawn(per_minute=1, tenant="acme", output_tokens=80, deadline_ms=900, priority=-5)
    assert read_trace("t.csv", write_trace(arrivals), USUAL) == [
        Arrival(**{**_fields(one), "time_ms": round(one.time_ms, 3)}) for one in arrivals
    ]


def test_a_trace_may_say_little() -> None:
    csv = "time_ms,output_tokens\n700,50\n200,\n"
    with pytest.raises(ConfigError, match=r"t\.csv: line 3: duration_ms"):
        read_trace("t.csv", csv, USUAL)
    lines = '{"time_ms": 700, "output_tokens": 50}\n\n{"time_ms": 200, "duration_ms": 5}\n'
    assert read_trace("t.jsonl", lines, USUAL) == [
        Arrival(0, model="a-model", duration_ms=5),
        Arrival(500, model="a-model", duration_ms=600, output_tokens=50),
    ]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("time_ms,duration_ms\n1,2,3\n", "t: line 2: (too many values)"),
        ("time_ms,duration_ms\nsoon,2\n", "t: line 2: time_ms"),
        ("time_ms,duration_ms\nnan,2\n", "t: line 2: time_ms"),
        ("tenant,duration_ms\na,2\n", "t: line 2: time_ms"),
        ('{"time_ms": 1, "duration_ms": 2}\n[]\n', "t: line 2"),
        ("", "t"),
    ],
)
def test_what_is_wrong_in_a_trace_is_named(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        read_trace("t", text, USUAL)
    assert wrong.value.variable == where


def _fields(arrival: Arrival) -> dict[str, Any]:
    return {name: getattr(arrival, name) for name in Arrival.__dataclass_fields__}


def test_a_part_of_the_record_is_a_span_before_now_or_a_day() -> None:
    assert record_span("x", "90m", NOW) == (NOW - timedelta(minutes=90), NOW)
    day = datetime(2026, 11, 24, tzinfo=UTC)
    assert record_span("x", "2026-11-24", NOW) == (day, day + timedelta(days=1))
    nine, ten, five = (day + timedelta(hours=one) for one in (9, 10, 17))
    assert record_span("x", "2026-11-24T09", NOW) == (nine, ten)
    assert record_span("x", "2026-11-24T9-17", NOW) == (nine, five)


@pytest.mark.parametrize(
    "text",
    ["2026-02-30", "24.11.2026", "Tuesday", "2026-11", "2026-11-24T24", "2026-11-24T9-9"],
)
def test_what_is_no_part_of_the_record_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        record_span("--from-record", text, NOW)
    assert wrong.value.variable == "--from-record"


def test_a_trace_tells_cached_input_the_bound_of_an_answer_and_the_cost() -> None:
    head = "time_ms,duration_ms,input_tokens,cached_tokens,cache_write_tokens,output_tokens"
    (one,) = read_trace(
        "t", f"{head},max_output_tokens,cost_usd\n0,5,1000,900,60,50,4096,0.79\n", USUAL
    )
    assert one.use.tokens == Tokens(1000, 50, 900, 60)
    assert (one.max_output_tokens, one.use.cost_micros) == (4096, 790_000)
    assert read_trace("t", write_trace([one]), USUAL) == [one]
    cheap = replace(one, cost_usd=0.000_412)
    assert read_trace("t", write_trace([cheap]), USUAL) == [cheap]
