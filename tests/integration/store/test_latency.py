"""Latency by the hour: exact of a small record, and of a sample of a large one."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from statistics import quantiles

import asyncpg
import pytest

from tidegate.store import database as partitions
from tidegate.store.statistics import LatencyOfHour, latency_by_hour
from tidegate.store.store import Store

HOURS = 6
BUSY, SLOW = 2, 4  # the hour with five times as many requests, and the one with ten times the wait
EVERY = 1_200  # requests of any other hour
WAIT_MS, CALL_MS = 1_000, 2_000  # the most; they lie evenly between that and 0
START = datetime(2026, 1, 12, tzinfo=UTC)

# Requests $1 of an hour that begins at $2: every tenth of acme, every fiftieth failed.
ADD = """
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind,
        classified_by, classified_reason, priority, model, attempts, lapses, instance_id,
        submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, failure, upstream)
    SELECT gen_random_uuid(), at, gen_random_uuid(),
        CASE WHEN n % 10 = 0 THEN 'acme' ELSE 'other' END, 'gemini', 'relay',
        CASE WHEN n % 50 = 0 THEN 'failed' ELSE 'succeeded' END, 'text_only', 'body', '', 0,
        'm-' || n % 3, 1, 0, 'api', at, at + waited * interval '1 ms',
        at + (waited + called) * interval '1 ms', waited, called,
        CASE WHEN n % 50 = 0 THEN '{"code": "upstream_error"}'::jsonb END, 'gemini'
    FROM (
        SELECT n, $2::timestamptz + n * interval '1 hour' / $1::int AS at,
            (row_number() OVER (ORDER BY md5(n::text)) - 1) / $1::float8 * $3::float8 AS waited,
            (row_number() OVER (ORDER BY md5(n || 'call')) - 1) / $1::float8 * $4::float8 AS called
        FROM generate_series(0, $1::int - 1) AS n
    ) AS made ORDER BY n
"""
# One request more, which was submitted at $1 and has ended at $2.
ADD_ONE = """
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, classified_by,
        classified_reason, priority, attempts, lapses, instance_id, submitted_at, finished_at)
    VALUES (gen_random_uuid(), $2, gen_random_uuid(), 'acme', 'gemini', $3, 'expired', 'body', '',
        0, 0, 0, 'worker', $1, $2)
"""


def requests_of(hour: int) -> int:
    return 5 * EVERY if hour == BUSY else EVERY


def most_wait_ms(hour: int) -> int:
    return 10 * WAIT_MS if hour == SLOW else WAIT_MS


@pytest.fixture
async def filled(store: Store, peek: asyncpg.Connection) -> Store:
    async with peek.transaction():
        await partitions._make(peek, "audit", START.date())
    for hour in range(HOURS):
        begin = START + timedelta(hours=hour)
        await peek.execute(ADD, requests_of(hour), begin, float(most_wait_ms(hour)), float(CALL_MS))
    return store


async def read(
    store: Store, tenant: str | None = None, upstream: str | None = None, **more: int
) -> dict[int, LatencyOfHour]:
    until = START + timedelta(hours=HOURS)
    hours = await latency_by_hour(store.connections, START, until, tenant, upstream, **more)
    return {(one.at - START) // timedelta(hours=1): one for one in hours}


async def test_what_is_small_is_counted_whole(filled: Store) -> None:
    hours = await read(filled)
    assert [(one.one_in, one.sampled, one.requests) for one in hours.values()] == [
        (1, requests_of(hour), requests_of(hour)) for hour in range(HOURS)
    ]
    for hour, one in hours.items():
        count = requests_of(hour)
        steps = [n / count for n in range(count)]
        cuts = quantiles(steps, n=20, method="inclusive")
        for found, most in (one.waited_ms, most_wait_ms(hour)), (one.called_ms, CALL_MS):
            assert found == pytest.approx([cuts[9] * most, cuts[18] * most])
        assert one.waited_sum_ms == pytest.approx(sum(steps) * most_wait_ms(hour))
        assert one.called_sum_ms == pytest.approx(sum(steps) * CALL_MS)
        assert one.failed == count // 50
        assert one.between_sum_ms == pytest.approx(0, abs=count)
        counts = {(part.of, part.name): part.requests for part in one.parts}
        assert counts[("tenant", "acme")] == count // 10
        assert counts[("error", "upstream_error")] == one.failed
        assert sum(counts[("model", f"m-{n}")] for n in range(3)) == count
        assert counts[("type", "text_only")] == counts[("upstream", "gemini")] == count
    own = await read(filled, "acme")
    assert [one.requests for one in own.values()] == [requests_of(n) // 10 for n in range(HOURS)]
    assert (await read(filled, None, "gemini")).keys() == hours.keys()
    assert await read(filled, None, "other") == {}


async def test_a_sample_of_what_is_large_tells_each_hour(filled: Store) -> None:
    hours = await read(filled, most_pages=60)
    assert len(hours) == HOURS
    assert {one.one_in for one in hours.values()} == {hours[0].one_in}
    assert 4 <= hours[0].one_in <= 10  # a quarter to a tenth is read
    for hour, one in hours.items():
        count = requests_of(hour)
        assert one.requests == one.sampled * one.one_in == pytest.approx(count, rel=0.12)
        for found, most in (one.waited_ms, most_wait_ms(hour)), (one.called_ms, CALL_MS):
            assert found == pytest.approx([0.5 * most, 0.95 * most], abs=0.08 * most)
        assert one.waited_sum_ms == pytest.approx(count * most_wait_ms(hour) / 2, rel=0.2)
        parts = Counter({part.name: part.requests for part in one.parts if part.of == "tenant"})
        assert parts["acme"] + parts["other"] == one.requests
        assert one.failed == sum(part.requests for part in one.parts if part.of == "error")
    # One tenant's are few: more is read for it.
    own = await read(filled, "acme", most_pages=60)
    assert [one.requests for one in own.values()] == [requests_of(n) // 10 for n in range(HOURS)]


async def test_what_ended_late_counts_for_its_hour_and_lines_of_batches_do_not(
    store: Store, peek: asyncpg.Connection
) -> None:
    end = START + timedelta(hours=HOURS)
    for source, after in (
        ("job", timedelta(hours=23)),
        ("batch", timedelta(hours=1)),
        ("job", timedelta(hours=25)),
    ):
        await peek.execute(ADD_ONE, START + timedelta(minutes=90), end + after, source)
    (one,) = (await read(store)).values()
    assert (one.at, one.requests, one.failed) == (START + timedelta(hours=1), 1, 1)
    # What was never admitted waited to its end.
    assert one.waited_ms == one.took_ms == [27.5 * 3_600_000] * 2
    names = [(part.of, part.name) for part in one.parts]
    assert names == [("tenant", "acme"), ("upstream", "gemini")]
