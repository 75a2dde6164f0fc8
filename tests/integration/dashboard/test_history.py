"""Ended calls, counted by several processes and added up again for the charts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.call import Charge, Usage
from tidegate.dashboard.feed import ALL, MOST_SPARKS, RANGES, SPARK_POINTS, Trend
from tidegate.dashboard.rollup import MOST_SPANS, Rollup
from tidegate.errors import StoreUnavailable
from tidegate.limiter import QueueView
from tidegate.record import REFUSED, RETRIED, CallRecord, Failure
from tidegate.store.database import Connections
from tidegate.store.statistics import KEPT_S, MOST_NAMES, OTHERS, History

BEGIN = 1_800_000_000.0
POOL = "gemini"


class FakeLimiter:
    """A limiter at which these queues wait."""

    waiters = 1

    def __init__(self, session: str, queues: list[QueueView]) -> None:
        self.session = session
        self._queues = queues

    async def snapshot(self) -> Any:
        return SimpleNamespace(queues=self._queues)


class Clock:
    """The time of all processes of a test."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[Connections]:
    opened = Connections(database_url)
    opened.start()
    yield opened
    await opened.aclose()


def ended(at: float, status: str = "succeeded", **named: Any) -> CallRecord:
    usual: dict[str, Any] = {"tenant_id": "acme", "pool": POOL, "model": "m", "upstream": "gemini"}
    code = named.pop("code", None)
    usage = Usage(named.pop("input_tokens", None), named.pop("output_tokens", None))
    charge = Charge(usage=usage, cost_micros=named.pop("cost_micros", None))
    throttled = named.pop("throttled", 0)
    moment = datetime.fromtimestamp(at, UTC)
    values: dict[str, Any] = {"received_at": moment, "finished_at": moment, "charge": charge}
    record = CallRecord("relay", **values | usual | named)
    for _ in range(throttled):
        record.note_throttled("gemini", POOL)
    record.end(status, None if code is None else Failure(code, ""))
    return record


async def test_what_two_processes_counted_is_one_trend(
    connections: Connections, clock: Clock
) -> None:
    rollups = [Rollup(History(connections, name), clock) for name in ("a", "b")]
    for number, rollup in enumerate(rollups):
        rollup.note(
            [
                ended(BEGIN, queue_ms=10.0, upstream_ms=100.0, input_tokens=5, output_tokens=7),
                ended(BEGIN, queue_ms=1_000.0, upstream_ms=900.0, cost_micros=30),
                ended(BEGIN, "failed", code="upstream_error", upstream_ms=100.0, throttled=2),
                ended(BEGIN, RETRIED, code="upstream_throttled", throttled=1),
                ended(BEGIN, REFUSED, code="unauthenticated", http_status=429),
            ]
        )
        await rollup.flush()
        rollup.note([ended(BEGIN + 1, tenant_id=f"only-{number}")])
        await rollup.flush()  # the same span, told again as a whole
        await rollup.flush()
    history = History(connections, "reader")
    for name, wanted in RANGES.items():
        trend = Trend(history, wanted)
        await trend.look(BEGIN + wanted.step_s)
        frame = trend.frame(POOL, {"acme": 3})
        totals = frame["totals"]
        assert (totals["calls"], totals["succeeded"], totals["failed"]) == (8, 6, 2), name
        assert (totals["retried"], totals["refused"], totals["told_429"]) == (2, 2, 2)
        assert (totals["throttled"], totals["cost_micros"], totals["input_tokens"]) == (6, 60, 10)
        assert frame["calls"][-1] == round(8 / wanted.step_s, 3)
        assert frame["at"][-1] == BEGIN
        tenants = {one["name"]: one for one in frame["tenants"]}
        assert set(tenants) == {"acme", "only-0", "only-1"}
        assert (tenants["acme"]["calls"], tenants["acme"]["weight"]) == (6, 3)
        assert (tenants["acme"]["tokens"], tenants["acme"]["upstream_ms"]) == (24, 2_200)
        assert dict(frame["codes"]) == {
            "upstream_error": 2,
            "upstream_throttled": 2,
            "unauthenticated": 2,
        }
        p50, p95, p99 = frame["total_waits"]
        assert p50 == pytest.approx(10, rel=0.2)
        assert p95 == p99 or p95 == pytest.approx(1_000, rel=0.2)
        assert frame["waits"][0][0] is None
        now = trend.now(POOL) if wanted.step_s <= 60 else None
        assert now is None or now["failed"] == 2


async def test_late_ends_count_when_they_happened_and_very_late_ones_in_what_is_open(
    connections: Connections, clock: Clock
) -> None:
    rollup, reader = Rollup(History(connections, "a"), clock), History(connections, "r")
    trend = Trend(reader, RANGES["5m"])
    clock.now = BEGIN + 250
    rollup.note([ended(BEGIN + 3), ended(BEGIN - 10_000)])
    await rollup.flush()
    await trend.look(clock.now)
    frame = trend.frame(POOL, {})
    told = {at: value for at, value in zip(frame["at"], frame["calls"], strict=True) if value}
    assert told == {BEGIN: 0.1, BEGIN - 40: 0.1}


async def test_the_upstreams_of_all_pools_are_shown_with_every_pool(
    connections: Connections, clock: Clock
) -> None:
    rollup, reader = Rollup(History(connections, "a"), clock), History(connections, "r")
    trend = Trend(reader, RANGES["5m"])
    rollup.note([ended(BEGIN)] * 2)
    rollup.note([ended(BEGIN, pool="openai", upstream="openai", model="gpt")] * 3)
    rollup.note([ended(BEGIN, "failed", pool="openai", upstream="second", code="x")])
    clock.now += 20
    await rollup.flush()
    await trend.look(clock.now)
    for pool in (POOL, "openai", "of nobody"):
        upstreams = trend.frame(pool, {})["upstreams"]
        calls = {row["name"]: (row["calls"], row["failed"]) for row in upstreams}
        assert calls == {"gemini": (2, 0), "openai": (3, 0), "second": (1, 1)}
    assert [row["name"] for row in trend.frame(POOL, {})["models"]] == ["m"]


async def test_a_trend_goes_on_reading_only_what_can_still_change(
    connections: Connections, clock: Clock
) -> None:
    rollup, reader = Rollup(History(connections, "a"), clock), History(connections, "r")
    trend = Trend(reader, RANGES["24h"])
    for _ in range(20):
        rollup.note([ended(clock.now, "failed", code="x")] * 2)
        await rollup.flush()
        clock.now += 300
        await trend.look(clock.now)
    fresh = Trend(reader, RANGES["24h"])
    await fresh.look(clock.now)
    assert trend.frame(POOL, {}) == fresh.frame(POOL, {})
    assert fresh.frame(POOL, {})["totals"]["failed"] == 40

    async def rows() -> int:
        return len(await reader.read(300, BEGIN - 1))

    assert await rows() == 20
    assert trend._settled_to > clock.now - 1_000


async def test_while_postgresql_is_away_a_bounded_part_waits(clock: Clock) -> None:
    nowhere = Connections("postgresql://nobody@127.0.0.1:1/none")
    rollup = Rollup(History(nowhere, "a"), clock)
    for _ in range(10):
        for _ in range(100):
            rollup.note([ended(clock.now)])
            clock.now += 100
        with pytest.raises(StoreUnavailable):
            await rollup.flush()
    spans = MOST_SPANS
    assert repr(rollup) == f"<Rollup spans={spans} to_write={spans}>"
    await nowhere.aclose()


async def test_names_are_bounded_and_the_old_is_forgotten(
    connections: Connections, clock: Clock
) -> None:
    rollup, history = Rollup(History(connections, "a"), clock), History(connections, "r")
    rollup.note([ended(BEGIN, tenant_id=f"t{n}", model="\0" * 999) for n in range(200)])
    await rollup.flush()
    ((_, tally),) = await history.read(10, BEGIN)
    assert len(tally.by_group["tenant"]) == MOST_NAMES + 1
    assert tally.by_group["tenant"][OTHERS][0] == 200 - MOST_NAMES
    rollup.note([ended(BEGIN, tenant_id=f"u{n}") for n in range(100)])
    await rollup.flush()
    ((_, tally),) = await history.read(300, BEGIN - 300)
    assert len(tally.by_group["tenant"]) == MOST_NAMES + 1
    assert sum(amounts[0] for amounts in tally.by_group["tenant"].values()) == 300
    await history.forget(BEGIN + KEPT_S[10] + 1)
    assert [len(await history.read(step_s, 0)) for step_s in KEPT_S] == [0, 1, 1]
    await history.forget(BEGIN + KEPT_S[300] + 1)
    assert await history.read(300, 0) == []


async def test_what_waited_is_told_by_the_limit_that_held_it_up_and_all_pools_are_added_up(
    connections: Connections, clock: Clock
) -> None:
    rollups = [Rollup(History(connections, name), clock) for name in ("a", "b")]
    for rollup in rollups:
        queues = [QueueView("s", "p", 0, "acme", (), name, 6, 1) for name in ("kind:a", None)]
        queues += [QueueView("other", "p", 0, "acme", (), "kind:a", 100, 1)]
        limiters: Any = {pool: FakeLimiter("s", queues) for pool in (POOL, "openai")}
        rollup.watch(limiters)
        await rollup.sample()
        await rollup.sample()  # once a span
        rollup.note([ended(BEGIN), ended(BEGIN, pool="openai")])
        await rollup.flush()
    trend = Trend(History(connections, "reader"), RANGES["1h"])
    await trend.look(BEGIN + 60)
    frame = trend.frame(POOL, {})
    # Two processes had 6 waiting in one of the six samples of a minute.
    assert [(one["name"], one["line"][-1]) for one in frame["queue"]] == [("kind:a", 2.0)]
    # A limit of the same id in another pool is another limit.
    queued = [(one["pool"], one["name"], one["line"][-1]) for one in trend.frame(ALL, {})["queue"]]
    assert queued == [(POOL, "kind:a", 2.0), ("openai", "kind:a", 2.0)]
    assert (frame["totals"]["calls"], trend.frame(ALL, {})["totals"]["calls"]) == (2, 4)


async def test_the_processes_of_a_rollout_are_marked_together_for_every_pool(
    connections: Connections, clock: Clock
) -> None:
    for after_s, version in ((0, "1"), (400, "1"), (20, "1"), (20, "2"), (30, "1")):
        clock.now += after_s
        rollup = Rollup(History(connections, f"at-{clock.now}"), clock)
        rollup.note_start(version)
        await rollup.flush()
    trend = Trend(History(connections, "reader"), RANGES["1h"])
    await trend.look(BEGIN + 600)
    for pool in (POOL, ALL):
        started = trend.frame(pool, {})["started"]
        assert [(one["version"], one["processes"]) for one in started] == [
            ("2", 1),
            ("1", 3),
            ("1", 1),
        ]
        assert [one["at"] - BEGIN for one in started] == [420, 360, 0]
    assert trend.frame(POOL, {})["totals"] == {}


async def test_each_of_many_limits_has_its_recent_queue_in_few_points(
    connections: Connections, clock: Clock
) -> None:
    rollup = Rollup(History(connections, "a"), clock)
    queues = [QueueView("s", "p", 0, "acme", (), f"tenant:{n:02}", n, 1) for n in range(1, 41)]
    limiters: Any = {POOL: FakeLimiter("s", queues)}
    rollup.watch(limiters)
    await rollup.sample()
    await rollup.flush()
    for name, wanted in RANGES.items():
        trend = Trend(History(connections, "reader"), wanted)
        await trend.look(BEGIN + wanted.step_s)
        sparks = trend.frame(POOL, {})["sparks"]
        assert len(sparks) == MOST_SPARKS
        assert sparks[0]["name"] == "tenant:40"
        assert {len(one["line"]) for one in sparks} <= set(
            range(SPARK_POINTS - 2, SPARK_POINTS + 1)
        )
        spans = -(-wanted.spans // SPARK_POINTS)
        assert sum(sparks[0]["line"]) == pytest.approx(400 / (spans * wanted.step_s), abs=0.1), name
