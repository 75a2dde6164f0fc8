"""Rehearsals: what queueing theory says, what the limiter promises, and figures for people."""

from __future__ import annotations

from dataclasses import replace
from math import factorial
from typing import Any

import pytest

from tidegate.call import DEFAULT_TENANT
from tidegate.limiter import Band, PoolPolicy, Quota, Rate
from tidegate.rehearse.load import Arrival, TokenPace, Usual, load_of
from tidegate.rehearse.report import (
    Findings,
    difference_of,
    milliseconds,
    sentence_of,
    tables_of,
)
from tidegate.rehearse.simulation import Setting, compare, rehearse

pytestmark = pytest.mark.slow

TEXT = "kind:text_only"
USUAL = Usual({"text_only": "m"}, TokenPace())
AT_ONCE = Setting(round_trip_ms=0.1, hold_ms=0.0)


def played(
    limits: dict[str, Any], *streams: dict[str, Any], lasts: str = "10m", **policy: Any
) -> Findings:
    arrivals = load_of({"lasts": lasts, "arrivals": list(streams)}).draw(USUAL, 1)
    return rehearse("", arrivals, PoolPolicy(limits, **policy), AT_ONCE)


def test_waits_are_those_of_the_queue_that_theory_knows() -> None:
    """M/D/c by Cosmetatos' approximation: Erlang's C for the mean of M/M/c, and what it is less
    where all calls last the same."""
    servers, load_erlangs = 5, 4.0
    share = load_erlangs / servers
    busy = load_erlangs**servers / factorial(servers) / (1 - share)
    free = sum(load_erlangs**n / factorial(n) for n in range(servers))
    mmc_ms = busy / (free + busy) * 1000 / (servers - load_erlangs)
    corrected = (
        (1 - share) * (servers - 1) * ((4 + 5 * servers) ** 0.5 - 2) / (16 * share * servers)
    )
    mdc_ms = mmc_ms / 2 * (1 + corrected)
    found = played({TEXT: servers}, {"per_second": 4, "duration_ms": 1000}, lasts="30m")
    assert found.waits.mean_ms == pytest.approx(mdc_ms, rel=0.1)
    assert found.limits[0].used == pytest.approx(share, rel=0.03)
    assert found.limits[0].peak == servers


def test_tenants_share_by_their_weights_and_none_goes_over() -> None:
    stream = {"per_second": 20, "duration_ms": {"median": 300, "p95": 900}}
    found = played(
        {TEXT: 6},
        *({**stream, "tenant": tenant} for tenant in ("a", "b")),
        lasts="1m",
        weights={"a": 3},
    )
    assert found.shares_of == TEXT
    shares = {group.name: group.share for group in found.tenants}
    assert shares["a"] == pytest.approx(0.75, abs=0.04)
    assert {group.name: group.ideal for group in found.tenants} == {"a": 0.75, "b": 0.25}
    assert found.limits[0].peak == 6
    assert found.limits[0].used > 0.99
    assert found.binding == [TEXT]


def test_a_rate_binds_and_is_used_up() -> None:
    found = played(
        {TEXT: 100, "rpm:total": Rate(60, 60_000)}, {"per_minute": 120, "duration_ms": 10}
    )
    assert found.binding == ["rpm:total"]
    rate = next(one for one in found.limits if one.limit == "rpm:total")
    # The window is longer by the slack that arrivals have.
    assert rate.used == pytest.approx(60_000 / 60_501, abs=0.04)
    assert rate.peak == 60
    assert found.end_ms > 1.9 * found.span_ms


def test_a_bucket_gives_what_refills_and_what_it_had_at_first() -> None:
    found = played(
        {TEXT: 100, "rpm:total": Rate(60, 60_000, shape="bucket")},
        {"per_minute": 120, "duration_ms": 10},
    )
    assert found.binding == ["rpm:total"]
    bucket = next(one for one in found.limits if one.limit == "rpm:total")
    assert bucket.used == pytest.approx(1.0, abs=0.02)
    assert bucket.peak == 60


def test_tokens_are_reserved_as_the_gateway_would_and_settled() -> None:
    """The first estimate of an answer is 800 tokens: learning of shorter ones lets more in."""
    stream = {"per_second": 5, "duration_ms": 100, "input_tokens": 100, "output_tokens": 100}
    found = played({TEXT: 50, "tpm:total": Rate(40_000, 60_000, "tokens")}, stream, lasts="5m")
    tokens = next(one for one in found.limits if one.limit == "tpm:total")
    assert tokens.peak <= 40_000
    assert tokens.used > 0.9
    assert found.binding == ["tpm:total"]


def test_a_day_quota_sends_the_rest_to_the_next_day() -> None:
    found = played({TEXT: 50, "rpd:m": Quota(100)}, {"per_minute": 60, "duration_ms": 100})
    assert found.admitted == found.calls > 500
    assert found.end_ms > 5 * 86_400_000
    assert next(one for one in found.limits if one.limit == "rpd:m").used == 1.0


def test_refusals_are_told_by_their_reason_and_their_limit() -> None:
    stream = {"per_second": 10, "duration_ms": 1000}
    found = played(
        {TEXT: 5, "kind:multi_modal": 0},
        {**stream, "deadline_ms": 500, "tenant": "hurried"},
        {**stream, "tenant": "many"},
        {"per_second": 1, "duration_ms": 1, "kind": "multi_modal", "tenant": "nowhere"},
        {"per_second": 1, "duration_ms": 1, "kind": "image_generation", "tenant": "nowhere"},
        lasts="30s",
        queue_per_tenant=20,
    )
    reasons = {group.name: set(group.refused) for group in found.tenants}
    # Of calls whose client waits an estimate refuses some before their deadline, as in the gateway.
    hurried_by = {"deadline", "used up"}
    assert reasons == {"hurried": hurried_by, "many": {"queue full"}, "nowhere": {"impossible"}}
    assert found.admitted + sum(found.refused.values()) == found.calls
    hurried = next(group for group in found.tenants if group.name == "hurried")
    assert hurried.waits.longest_ms is not None
    assert hurried.waits.longest_ms <= 501
    assert found.tenants[2].waits.p50_ms is None
    assert "impossible" in sentence_of(found)


def test_a_low_band_has_its_least_share_and_a_high_one_goes_first() -> None:
    stream = {"per_second": 10, "duration_ms": 200}
    found = played(
        {TEXT: 2},
        {**stream, "tenant": "high", "priority": 50},
        {**stream, "tenant": "low", "priority": -50},
        lasts="30s",
        bands=(Band("high"), Band("normal"), Band("low", min_share=0.2)),
    )
    high, low = found.tenants
    assert high.waits.mean_ms is not None
    assert low.waits.mean_ms is not None
    assert high.waits.mean_ms < low.waits.mean_ms


def test_the_same_seed_gives_the_same_and_several_processes_nearly_the_same() -> None:
    stream = {"per_second": 12, "duration_ms": {"median": 300, "p95": 900}}
    arrivals = load_of({"lasts": "1m", "arrivals": [stream]}).draw(USUAL, 1)
    policy, alone = PoolPolicy({TEXT: 5}), Setting(processes=1)
    first = rehearse("", arrivals, policy, alone)
    assert rehearse("", arrivals, policy, alone) == first
    spread = rehearse("", arrivals, policy, replace(alone, processes=5))
    assert spread.waits.mean_ms == pytest.approx(first.waits.mean_ms, rel=0.05)


def test_nothing_binds_where_there_is_room_and_calls_without_limits_go_at_once() -> None:
    found = played({TEXT: 50}, {"per_second": 2, "duration_ms": 100}, lasts="30s")
    assert (found.queued, found.binding) == (0, [])
    assert sentence_of(found).endswith("none queued; no limit is a bottleneck.")
    free = Setting(kinds_optional=True)
    one = rehearse("", [Arrival(0, duration_ms=5)], PoolPolicy({"model:other": 1}), free)
    assert one.admitted == 1


def test_policies_are_told_side_by_side() -> None:
    stream = {"per_second": 8, "duration_ms": 1000, "deadline_ms": 4000}
    arrivals = load_of({"lasts": "30s", "arrivals": [stream]}).draw(USUAL, 1)
    policies = {"now": PoolPolicy({TEXT: 5}), "more": PoolPolicy({TEXT: 40})}
    [table] = tables_of(compare(arrivals, policies, AT_ONCE))
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ("", "now", "more")
    assert int(rows["refused"][0]) > 30
    assert rows["refused"][1] == "0"
    assert rows["binds"] == (TEXT, "nothing")


def test_a_change_is_told_in_words() -> None:
    stream = {"per_second": 8, "duration_ms": 1000, "deadline_ms": 4000}
    arrivals = load_of({"lasts": "30s", "arrivals": [stream]}).draw(USUAL, 1)
    policies = {"now": PoolPolicy({TEXT: 5}), "more": PoolPolicy({TEXT: 40})}
    now, more = compare(arrivals, policies, AT_ONCE)
    refused = sum(now.refused.values())
    assert difference_of(now, more) == (
        f"With more, 0 of {now.calls} calls would have waited instead of {now.queued}; "
        f"the 99th percentile of the wait would be 0 instead of {milliseconds(now.waits.p99_ms)}; "
        f"0 would have been refused instead of {refused}; "
        f"the bottleneck would be none instead of {TEXT}."
    )
    assert f"but {DEFAULT_TENANT} would wait longer: " in difference_of(more, now)
    assert "would have waited, as it is now;" in difference_of(now, now)


def test_several_plays_tell_how_far_apart_they_are() -> None:
    stream = {"per_second": 9, "duration_ms": {"median": 400, "p95": 1000}}
    streams = [{"tenant": "a", **stream}, {"tenant": "b", **stream, "deadline_ms": 500}]
    arrivals = load_of({"lasts": "15s", "arrivals": streams}).draw(USUAL, 1)
    policy = PoolPolicy({TEXT: 6})
    once = rehearse("", arrivals, policy, AT_ONCE)
    found = rehearse("", arrivals, policy, AT_ONCE, plays=4)
    assert once.spreads == []
    assert replace(found, plays=1, spreads=[]) == once
    assert rehearse("", arrivals, policy, AT_ONCE, plays=4) == found
    assert rehearse("", arrivals, policy, AT_ONCE, plays=4, seed=2).spreads != found.spreads
    everybody, a, b = found.spreads
    assert (everybody.name, a.name, b.name) == ("", "a", "b")
    for spread, waits in ((everybody, once.waits), (a, once.tenants[0].waits)):
        assert spread.mean_ms is not None
        assert spread.mean_ms.lowest < spread.mean_ms.mean < spread.mean_ms.highest
        assert spread.mean_ms.lowest <= (waits.mean_ms or 0) <= spread.mean_ms.highest
    assert b.refused.lowest > 0 == a.refused.highest
    *_, table = tables_of([found])
    assert [row[0] for row in table.rows] == ["(all)", "a", "b"]
    [beside] = tables_of(compare(arrivals, {"x": policy, "y": policy}, AT_ONCE, plays=2))
    assert [row[0] for row in beside.rows].count("  over 2 plays") == 2


def test_where_nobody_is_let_in_there_is_no_spread_of_waits() -> None:
    calls = [Arrival(0, duration_ms=5, deadline_ms=10)]
    found = rehearse("", calls, PoolPolicy({TEXT: 0}), AT_ONCE, plays=2)
    assert found.spreads[0].mean_ms is None
    assert found.spreads[0].refused.mean == 1
    *_, table = tables_of([found])
    assert table.rows[0][:4] == ("(all)", "-", "-", "-")


def test_limits_of_a_key_or_user_count_the_calls_of_that_one_alone() -> None:
    one = Arrival(0.0, "acme", model="m", duration_ms=5, key="k1", conversation="c1")
    calls = [replace(one, time_ms=n * 20.0) for n in range(3)]
    calls += [replace(one, time_ms=n * 20.0 + 10, key="k2", subject="ann") for n in range(4)]
    calls += [replace(one, time_ms=n * 20.0 + 15, tenant="other", key="k3") for n in range(5)]
    calls.sort(key=lambda call: call.time_ms)
    counted = ["rpm:key/k1", "rpm:user/acme/ann", "rpm:conversation/other/c1", "rpm:user/other/ann"]
    limits = {name: Rate.per_minute(60) for name in counted}
    found = rehearse("", calls, PoolPolicy({TEXT: 9, **limits}), Setting())
    peaks = {use.limit: use.peak for use in found.limits}
    assert [peaks[name] for name in counted] == [3, 4, 5, 0]
