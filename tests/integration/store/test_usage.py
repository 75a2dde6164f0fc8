"""Totals are what the audit comes to, whatever became of the connections that wrote both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from random import Random
from typing import Any

import asyncpg
import orjson
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.jobs import new_job, now, result
from tests.waiting import wait_until, work_for
from tidegate.call import (
    NO_CHARGE,
    UNKNOWN_CHARGE,
    Answer,
    Charge,
    Usage,
    UsageDetails,
    UsageState,
    new_id,
)
from tidegate.errors import StoreUnavailable
from tidegate.prices.reconciliation import DoubtfulCall, ModelDay, UsageSum, compared
from tidegate.record import CallRecord
from tidegate.store import database as partitions
from tidegate.store import statistics
from tidegate.store.audit import _entry
from tidegate.store.provider import reconciliations
from tidegate.store.records import details_of
from tidegate.store.retention import Whose
from tidegate.store.statistics import COUNTS
from tidegate.store.store import Store

SUMMED = (
    *("cache_write_tokens", "input_audio_tokens", "input_image_tokens", "input_video_tokens"),
    *("output_audio_tokens", "output_image_tokens", "output_video_tokens"),
    *("searches", "provider_cost_micros"),
)
OF_DETAILS = "coalesce(sum((usage_details->>'{}')::bigint), 0)::bigint"
DETAILS = UsageDetails(3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)
CHARGES = (
    Charge(UsageState.TOLD, Usage(5, 9, 2, 1, 17), None, 100),
    Charge(UsageState.TOLD, Usage(5, 9, 2, 1, 17, DETAILS), None, 100),
    Charge(UsageState.PARTIAL, Usage(5, 3), None, 40),
    Charge(UsageState.ESTIMATED, Usage(7, 2), 1, None),
    UNKNOWN_CHARGE,
    NO_CHARGE,
)
SUMS = f"""
    SELECT tenant_id, (finished_at AT TIME ZONE 'UTC')::date AS day, coalesce(model, '') AS model,
        coalesce(upstream, pool) AS pool, count(*) AS requests,
        coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
        coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
        coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
        coalesce(sum(thoughts_tokens), 0)::bigint AS thoughts_tokens,
        coalesce(sum(images), 0)::bigint AS images,
        coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
        count(*) FILTER (WHERE cost_micros IS NULL AND usage_state <> 'unknown') AS unpriced,
        count(*) FILTER (WHERE usage_state = 'partial') AS partial,
        count(*) FILTER (WHERE usage_state = 'estimated') AS estimated,
        count(*) FILTER (WHERE usage_state = 'unknown') AS unknown,
        {", ".join(map(OF_DETAILS.format, SUMMED))}
    FROM audit GROUP BY 1, 2, 3, 4
"""


_IS_WAITING = """
    SELECT count(*) > 0 FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def record(number: int, **overrides: Any) -> CallRecord:
    values: dict[str, Any] = {
        "source": "relay",
        "request_id": new_id(),
        "tenant_id": f"t{number % 3}",
        "pool": "gemini",
        "endpoint": "/v1/chat/completions",
        "status": "succeeded",
        "http_status": 200,
        "received_at": now(),
        "finished_at": now() - timedelta(days=number % 2),
        "request": b"{}",
        "pieces": [b"{}"],
        "answer_bytes": 2,
        "model": None if number % 11 == 0 else f"m{number % 2}",
        "charge": CHARGES[number % len(CHARGES)],
    }
    version = overrides.pop("model_version", None)
    return CallRecord(**{**values, **overrides}, answer=Answer(model_version=version))


async def test_what_a_version_without_details_has_spilled_is_written(
    store: Store, peek: asyncpg.Connection
) -> None:
    """And what this one has spilled keeps them, as the row that COPY could not take does."""
    detailed = Charge(UsageState.TOLD, Usage(5, 9, 2, 1, 17, DETAILS), None, 100)
    one = await store.audit.prepare(record(1, charge=detailed, model_version="m-9"))
    entry = orjson.loads(orjson.dumps(_entry(one), default=str))
    old = orjson.loads(orjson.dumps(entry, default=str))
    old["row"] |= {"id": str(new_id())}
    del old["row"]["usage_details"]
    for given in (entry, old):
        await store.audit._enqueue(given, one.record)
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 2 FROM audit"), 20)
    rows = await peek.fetch("SELECT usage_details, model_version FROM audit ORDER BY 1 NULLS LAST")
    assert [(details_of(row[0]), row[1]) for row in rows] == [(DETAILS, "m-9"), (None, "m-9")]
    await totals_are_the_sums(peek)


async def totals_are_the_sums(connection: asyncpg.Connection) -> int:
    """How many requests they hold."""
    theirs = {tuple(row.values()) for row in await connection.fetch(SUMS)}
    ours = {tuple(row.values()) for row in await connection.fetch("SELECT * FROM usage_days")}
    assert ours == theirs
    count: int = await connection.fetchval(
        "SELECT coalesce(sum(requests), 0)::bigint FROM usage_days"
    )
    return count


async def test_a_batch_that_comes_twice_counts_once(store: Store, peek: asyncpg.Connection) -> None:
    same = [record(number) for number in range(20)]
    for one in (*same, *same, record(20)):
        store.audit.put(one)
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 21 FROM audit"), 20)
    assert await totals_are_the_sums(peek) == 21


async def test_a_correction_is_of_the_upstream_or_of_what_an_earlier_version_counted(
    peek: asyncpg.Connection,
) -> None:
    """Which counted all jobs for the pool in whose queue they were."""
    day = now().date()
    add = "INSERT INTO usage_days (tenant_id, day, model, pool) VALUES ('t', $1, 'm', $2)"
    costs = "SELECT cost_micros FROM usage_days ORDER BY pool"
    corrected: list[list[int]] = []
    for pool in ("gemini", "oai"):
        await peek.execute(add, day, pool)
        # Jobs of two queues.
        rows = [("t", day, "m", "oai", "gemini", 2, 0), ("t", day, "m", "oai", "oai", 3, 0)]
        rows = rows if pool == "oai" else [("t", day, "m", "oai", "gemini", 5, 0)]
        await peek.execute(partitions.sql("correct_usage"), *zip(*rows, strict=True))
        corrected.append([row["cost_micros"] for row in await peek.fetch(costs)])
    assert corrected == [[5], [5, 5]]


async def test_totals_are_the_sums_after_calls_without_a_cost_were_corrected(
    store: Store, peek: asyncpg.Connection
) -> None:
    calls = [record(1, charge=CHARGES[n], finished_at=now(), model="m") for n in (2, 3, 3, 4)]
    for one in calls:
        store.audit.put(one)
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 4 FROM audit"), 20)
    doubtful = tuple(
        DoubtfulCall(one.request_id, str(one.charge.state), 0, 0, one.charge.cost_micros)
        for one in calls
        if one.request_id is not None
    )
    found = compared({"m": ModelDay(doubtful=doubtful)}, {"m": UsageSum(4, 40, 0, 0, 4, 0, 90)}, {})
    assert found[0].verdict == "explained"
    assert await store.reconciliations.keep("gemini", "openai", now().date(), found) == 4
    assert await totals_are_the_sums(peek) == 4
    total = "SELECT sum(cost_micros)::bigint FROM usage_days"
    assert await peek.fetchval(total) == 90


async def test_a_correction_of_several_models_waits_for_records_in_their_order(
    store: Store, peek: asyncpg.Connection, database_url: str
) -> None:
    """Of two tenants: a record that ends meanwhile of both models deadlocked with it."""
    places, models = [("a", "m1"), ("b", "m1"), ("a", "m2")], dict[str, list[DoubtfulCall]]()
    for tenant, model in places:
        charge = Charge(UsageState.PARTIAL, Usage(5, 3), None, 40)
        one = record(1, charge=charge, finished_at=now(), model=model, tenant_id=tenant)
        store.audit.put(one)
        assert one.request_id is not None
        models.setdefault(model, []).append(DoubtfulCall(one.request_id, "partial", 5, 3, 40))
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 3 FROM audit"), 20)
    found = compared(
        {name: ModelDay(doubtful=tuple(calls)) for name, calls in models.items()},
        {name: UsageSum(len(calls), 40, 0, 0, 4, 0, 900) for name, calls in models.items()},
        {},
    )
    add = "UPDATE usage_days SET requests = requests + 1 WHERE tenant_id = $1 AND model = $2"
    late = await asyncpg.connect(database_url)
    await late.execute("SET deadlock_timeout = '1ms'")
    async with late.transaction():
        await late.execute(add, "a", "m2")
        kept = asyncio.create_task(store.reconciliations.keep("gemini", "o", now().date(), found))
        await wait_until(lambda: peek.fetchval(_IS_WAITING), 20)
        await late.execute(add, "b", "m1")
    await late.close()
    assert await kept == 3
    total = "SELECT sum(cost_micros)::bigint FROM usage_days"
    assert await peek.fetchval(total) == 1_800


async def test_a_day_with_too_many_calls_of_uncertain_usage_is_not_explained_by_some_of_them(
    store: Store, peek: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliations, "MOST_DOUBTFUL", 2)
    verdicts: list[tuple[str, int]] = []
    for count, more in ((2, 2), (3, 1)):
        one = record(1, charge=Charge(UsageState.PARTIAL, Usage(5, 3), None, 40), model="m")
        for _ in range(more):
            store.audit.put(replace(one, request_id=new_id(), finished_at=now()))
        written = f"SELECT count(*) = {count} FROM audit"
        await wait_until(partial(peek.fetchval, written), 20)
        ours = await store.reconciliations.ours("gemini", now().date())
        (found,) = compared(ours, {"m": UsageSum(count, 40, 0, 0, 4, 0, 900)}, {})
        verdicts.append((found.verdict, len(found.corrections)))
    assert verdicts == [("explained", 2), ("unexplained", 0)]
    assert "too many calls of uncertain usage" in found.reason


async def test_a_model_of_any_name_is_stored_as_compared(store: Store) -> None:
    """A NUL, which PostgreSQL refuses, ended the nightly comparisons."""
    found = compared({}, {"m\x00n": UsageSum(1, 5, 0, 0, 4, 0, 90)}, {})
    assert await store.reconciliations.keep("oai", "openai", now().date(), found) == 0
    (kept,) = await store.reconciliations.found(now().date(), now().date())
    assert (kept.theirs_micros, "\x00" in kept.model) == (90, False)


async def test_the_charges_of_thousands_of_cut_calls_are_corrected_at_once(
    store: Store, peek: asyncpg.Connection
) -> None:
    """One statement a call took longer than a transaction may."""
    count, cut = 4_000, Charge(UsageState.PARTIAL, Usage(5, 3), None, 40)
    for number in range(count):
        one = record(number, charge=cut, finished_at=now(), model="m")
        await store.audit.room(one.size_bytes, 10_000)
        store.audit.put(one)
    await wait_until(lambda: peek.fetchval(f"SELECT count(*) = {count} FROM audit"), 60)
    ours = await store.reconciliations.ours("gemini", now().date())
    theirs = UsageSum(count, 5 * count, 0, 0, 4 * count, 0, 90 * count)
    found = compared(ours, {"m": theirs}, {})
    assert await store.reconciliations.keep("gemini", "openai", now().date(), found) == count
    assert await totals_are_the_sums(peek) == count
    assert await peek.fetchval("SELECT sum(cost_micros)::bigint FROM audit") == 90 * count


async def test_totals_are_exact_though_connections_are_cut_in_the_middle(
    database_url: str, make_store: MakeStore, peek: asyncpg.Connection
) -> None:
    stores = [await make_store(database_url) for _ in range(2)]
    written, chance = asyncio.Event(), Random(5)

    async def cut() -> None:
        while not written.is_set():
            await work_for(chance.random() * 0.03)
            await peek.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'tidegate' AND datname = current_database()"
                " AND random() < 0.5"
            )

    async def write(store: Store) -> None:
        for number in range(60):
            for one in range(10):
                store.audit.put(record(number + one))
            done = result(charge=CHARGES[number % len(CHARGES)])
            job = new_job(f"{number}", tenant_id=f"t{number % 3}")
            await store.audit.record_stream(job, done)
            await work_for(0.01)

    cutting = asyncio.create_task(cut())
    await asyncio.gather(*(write(store) for store in stores))
    written.set()
    await cutting
    wanted = 2 * 60 * 11
    await wait_until(lambda: peek.fetchval(f"SELECT count(*) = {wanted} FROM audit"), 20)
    assert await totals_are_the_sums(peek) == wanted


PER_DAY = """
    SELECT tenant_id AS tenant, (finished_at AT TIME ZONE 'UTC')::date AS day,
        coalesce(key_id, '') AS key, coalesce(upstream, pool) AS upstream,
        coalesce(model, '') AS model, count(*) AS requests,
        coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
        coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
        count(*) FILTER (WHERE usage_state = 'estimated') AS estimated,
        coalesce(sum((usage_details->>'searches')::bigint), 0)::bigint AS searches
    FROM audit GROUP BY 1, 2, 3, 4, 5
"""
TOTALS = "SELECT *, tenant_id AS tenant, pool AS upstream FROM usage_days"
OF_LOG = ("key", "upstream", "tenant,upstream,day", "key,day", "upstream,day", "key,model")
OF_TOTALS = ("day", "tenant", "model,day", "tenant,model")
COUNTED = ("requests", "input_tokens", "cost_micros", "estimated", "searches")


@dataclass(frozen=True)
class Past:
    """Calls of the last `days` days, to write and to compare with what is read of them."""

    peek: asyncpg.Connection
    today: date
    latest: datetime
    days: int

    def call(self, number: int, **overrides: Any) -> CallRecord:
        at = self.latest - timedelta(days=number % self.days, minutes=number)
        values = {
            "received_at": at,
            "finished_at": min(self.latest, at + timedelta(hours=number % 3 * 12)),
            "key_id": f"key{number % 5}" if number % 7 else None,
            "upstream": f"up{number % 2}" if number % 5 else None,
            "subject": f"user{number % 4}",
        }
        return record(number, **{**values, **overrides})

    async def written(self, count: int) -> None:
        await wait_until(lambda: self.peek.fetchval(f"SELECT count(*) = {count} FROM audit"), 20)

    async def are_those_of_the_log(self, store: Store) -> None:
        log, totals = await self.peek.fetch(PER_DAY), await self.peek.fetch(TOTALS)
        span = self.today - timedelta(days=self.days + 5), self.today
        for rows, groups in ((log, OF_LOG), (totals, OF_TOTALS)):
            for by in groups:
                for whose in ((None, None), ("t1", None), (None, "up1"), ("t1", "up0")):
                    found = await store.usage.totals(by.split(","), *span, *whose)
                    got = summed([asdict(one) for one in found], by, None, None)
                    assert got == summed(rows, by, *whose), (by, whose)

    async def images(self, store: Store, by: str, *whose: str | None) -> int:
        found = await store.usage.totals(
            [by], self.today - timedelta(days=self.days + 5), self.today, *whose
        )
        return sum(one.images for one in found)


@pytest.fixture(autouse=True)
def _sums_begin_with_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first round is over when a test calls what it does."""
    monkeypatch.setattr(statistics, "_FIRST_SUM_S", 0.0)


async def past_calls_of(peek: asyncpg.Connection, days: int, *, summed_up: bool = True) -> Past:
    # A day is over ten minutes after its end; no call here reaches back to the day before.
    today = (now() - timedelta(minutes=10)).date()
    async with peek.transaction():
        for back in range(days):
            name = partitions.name_of("audit", day := today - timedelta(days=back))
            if await peek.fetchval("SELECT to_regclass($1)", name) is None:
                await partitions._make(peek, "audit", day)
    early, end = (datetime.combine(today, at, UTC) for at in (time(2), time.max))
    latest = min(max(now(), early), end)
    if summed_up and await peek.fetchval("SELECT to_regclass('partial_days')") is not None:
        await wait_until(lambda: nothing_is_due(peek), 20, "the first round of the stores")
    return Past(peek, today, latest, days)


async def nothing_is_due(peek: asyncpg.Connection) -> bool:
    return not await peek.fetch(partitions.sql("part_to_sum"))


def summed(
    rows: Iterable[Mapping[str, Any]], by: str, tenant: str | None, upstream: str | None
) -> dict[tuple[Any, ...], list[int]]:
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if tenant in (None, row["tenant"]) and upstream in (None, row["upstream"]):
            one = sums.setdefault(tuple(row[name] for name in by.split(",")), [0] * len(COUNTED))
            one[:] = [a + row[name] for a, name in zip(one, COUNTED, strict=True)]
    return sums


async def test_sums_by_key_and_upstream_are_those_of_the_log_whatever_changes_it(
    database_url: str, store: Store, peek: asyncpg.Connection
) -> None:
    """Days that are over are read from their sums, which the log goes before as soon as a call of
    such a day came, was corrected, or was erased."""
    past = await past_calls_of(peek, days=4)
    old, today = past.call, past.today
    written, are_those_of_the_log = past.written, partial(past.are_those_of_the_log, store)

    for number in range(80):
        store.audit.put(old(number))
    await written(80)
    await are_those_of_the_log()
    assert await store.usage.sum_days() == 3
    await are_those_of_the_log()
    assert await store.usage.sum_days() == 0
    # Read from the sums: a figure that only they have is in the answer.
    await peek.execute("UPDATE usage_sums SET images = images + 1000")
    for by in ("upstream", "key", "tenant", "day"):
        (first, *_) = await store.usage.totals([by], today - timedelta(days=9), today)
        assert first.images > 1000, by
    (keyed, *_) = await store.usage.totals(["key"], today - timedelta(days=9), today, None, "up1")
    assert keyed.images > 1000
    await peek.execute("UPDATE usage_sums SET images = images - 1000")
    # As an earlier version summed them up, which told no keys apart by upstream.
    await peek.execute("UPDATE usage_sums SET key_id = '' WHERE level = 'tenant_upstream'")
    await are_those_of_the_log()

    # A transaction that is open while its day is summed up.
    other = await asyncpg.connect(database_url)
    late = await store.audit.prepare(old(81))
    async with other.transaction():
        await store.audit.add(other, [late])
        await peek.execute("DELETE FROM summed_days")
        assert await store.usage.sum_days() == 3
    await other.close()
    await are_those_of_the_log()
    assert await store.usage.sum_days() == 1
    await are_those_of_the_log()

    changes = {
        "a correction": peek.execute(
            "UPDATE audit SET cost_micros = coalesce(cost_micros, 0) + 7 WHERE request_id = $1",
            late.record.request_id,
        ),
        "an erasure": store.retention.erase(Whose("t1", "user1")),
        "a retention of a tenant": peek.execute("DELETE FROM audit WHERE tenant_id = 't2'"),
    }
    for change, work in changes.items():
        await work
        await are_those_of_the_log()
        assert await store.usage.sum_days() >= 1, change
        await are_those_of_the_log()
    await store.usage.sum_part()
    assert await peek.fetchval("SELECT count(*) FROM changed_days") == 0


async def test_a_day_so_far_is_read_from_its_sums_and_the_calls_after_them(
    store: Store, peek: asyncpg.Connection
) -> None:
    past = await past_calls_of(peek, days=4)
    for number in range(60):
        store.audit.put(past.call(number))
    await past.written(60)
    day = past.today - timedelta(days=1)
    # The calls of that day came in the hour before this time of today.
    until = datetime.combine(day, past.latest.time(), UTC) - timedelta(minutes=30)
    assert await store.usage._sum_up(day, until)
    await past.are_those_of_the_log(store)
    plain = await past.images(store, "key")
    await peek.execute("UPDATE usage_sums SET images = images + 1000 WHERE day = $1", day)
    assert await past.images(store, "key") > plain, "read from the sums"
    assert await past.images(store, "tenant") == await past.images(store, "day")
    await peek.execute("UPDATE usage_sums SET images = images - 1000 WHERE day = $1", day)

    for after in (20, -20):  # the second comes late
        at = until + timedelta(minutes=after)
        store.audit.put(past.call(61, received_at=at, finished_at=at))
    await past.written(62)
    await past.are_those_of_the_log(store)
    assert await store.usage._sum_up(day, until)
    await past.are_those_of_the_log(store)
    await peek.execute("UPDATE audit SET cost_micros = 5 WHERE created_at < $1", until)
    await peek.execute("UPDATE usage_days SET cost_micros = 0")
    await past.are_those_of_the_log(store)
    assert await store.usage.sum_days() == 3
    await past.are_those_of_the_log(store)
    assert await peek.fetch("SELECT FROM partial_days WHERE day = $1", day) == []


async def test_only_calls_that_the_sums_of_a_day_so_far_may_have_mark_it(
    store: Store, peek: asyncpg.Connection
) -> None:
    """Which are those from before an hour that was over 50 minutes before, or from an earlier
    day."""
    for back in (0, 55, 70, 115, 180, 2_000):
        await peek.execute("DELETE FROM changed_days")
        async with peek.transaction():
            clock = (await peek.fetchval("SELECT now()")).astimezone(UTC)
            bound = (clock - timedelta(minutes=50)).replace(minute=0, second=0, microsecond=0)
            midnight = clock.replace(hour=0, minute=0, second=0, microsecond=0)
            at = clock - timedelta(minutes=back)
            one = await store.audit.prepare(record(1, received_at=at, finished_at=at))
            await store.audit.add(peek, [one])
        days = [row["day"] for row in await peek.fetch("SELECT day FROM changed_days")]
        assert days == [at.date()] * (at < max(bound, midnight)), at


async def test_a_process_sums_up_past_days_only_after_its_start(
    monkeypatch: pytest.MonkeyPatch,
    make_store: MakeStore,
    database_url: str,
    peek: asyncpg.Connection,
) -> None:
    monkeypatch.setattr(statistics, "_FIRST_SUM_S", 3600.0)
    starting = await make_store(database_url)
    past = await past_calls_of(peek, days=4, summed_up=False)
    for number in range(8):
        starting.audit.put(past.call(number))
    await past.written(8)
    assert await peek.fetch("SELECT FROM summed_days") == []
    monkeypatch.setattr(statistics, "_FIRST_SUM_S", 0.0)
    await make_store(database_url)

    async def are_summed_up() -> bool:
        return len(await peek.fetch("SELECT FROM summed_days")) == 3

    await wait_until(are_summed_up, 20, "the sums of three days")


async def test_the_part_to_sum_up_is_a_past_hour_of_today(
    store: Store, peek: asyncpg.Connection
) -> None:
    def expected() -> list[tuple[date, datetime]]:
        until = (now() - timedelta(hours=1)).replace(minute=0, second=0, microsecond=0)
        midnight = now().replace(hour=0, minute=0, second=0, microsecond=0)
        return [(until.date(), until)] if until > midnight else []

    before = expected()
    await store.usage.sum_part()
    await wait_until(lambda: nothing_is_due(peek), 20)
    noted = await peek.fetch("SELECT day, until FROM partial_days")
    assert [tuple(row) for row in noted] in (before, expected())


async def test_whole_weeks_are_read_from_their_sums_until_a_day_of_them_changes(
    store: Store, peek: asyncpg.Connection
) -> None:
    past = await past_calls_of(peek, days=16)
    for number in range(96):
        store.audit.put(past.call(number))
    await past.written(96)
    assert await store.usage.sum_days() == 15
    weeks = await store.usage.sum_weeks()
    assert weeks in (1, 2)
    assert await store.usage.sum_weeks() == 0
    await past.are_those_of_the_log(store)
    bys = ("key", "upstream", "tenant", "model")
    plain = [await past.images(store, by) for by in bys]
    add = "UPDATE usage_weeks SET images = coalesce(images, 0) + $1"
    await peek.execute(add, 1000)
    more = [await past.images(store, by) for by in bys]
    assert all(one > was for one, was in zip(more, plain, strict=True))
    week = await peek.fetchval("SELECT max(week) FROM summed_weeks")
    (partly,) = await store.usage.totals([], week + timedelta(days=1), past.today)
    assert partly.images < 1000, "of a week that is cut off, its days"
    await peek.execute(add, -1000)

    at = datetime.combine(week + timedelta(days=2), time(3), UTC)
    store.audit.put(past.call(97, received_at=at, finished_at=at))
    await past.written(97)
    await past.are_those_of_the_log(store)
    assert await store.usage.sum_weeks() == 0, "a day of it has changed"
    assert await store.usage.sum_days() == 1
    await past.are_those_of_the_log(store)
    assert await store.usage.sum_weeks() == 1
    await past.are_those_of_the_log(store)
    # As a version that sums up no weeks sums up a day that has changed.
    await peek.execute("UPDATE audit SET images = 7 WHERE created_at = $1", at)
    await peek.execute("DELETE FROM changed_days")
    await peek.execute(
        "UPDATE usage_sums SET images = images + 7 WHERE day = $1 AND ended_day = $1"
        " AND level = 'upstream'"
        " AND upstream = (SELECT coalesce(upstream, pool) FROM audit WHERE created_at = $2)",
        *(at.date(), at),
    )
    await peek.execute("UPDATE summed_days SET summed_at = now() WHERE day = $1", at.date())
    assert await past.images(store, "upstream") == await peek.fetchval(
        "SELECT sum(images) FROM audit"
    )


async def test_sums_are_exact_though_connections_are_cut_while_they_are_made(
    database_url: str, make_store: MakeStore, peek: asyncpg.Connection
) -> None:
    stores = [await make_store(database_url) for _ in range(2)]
    past, chance = await past_calls_of(peek, days=10), Random(8)
    is_over = asyncio.Event()

    async def cut() -> None:
        while not is_over.is_set():
            await work_for(chance.random() * 0.03)
            await peek.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'tidegate' AND datname = current_database()"
                " AND random() < 0.3"
            )

    async def sum_up(store: Store) -> None:
        while not is_over.is_set():
            with suppress(StoreUnavailable):
                await store.usage.sum_days()
                await store.usage.sum_part()
                await store.usage.sum_weeks()
            await asyncio.sleep(0)

    async def write(store: Store) -> None:
        for number in range(200):
            store.audit.put(past.call(number))
            if number % 5 == 0:
                await work_for(0.01)

    others = [asyncio.create_task(cut()), *(asyncio.create_task(sum_up(one)) for one in stores)]
    await asyncio.gather(*(write(store) for store in stores))
    is_over.set()
    await asyncio.gather(*others)
    await past.written(400)
    await past.are_those_of_the_log(stores[0])

    async def all_summed_up() -> bool:
        with suppress(StoreUnavailable):
            await stores[1].usage.sum_days()
            await stores[1].usage.sum_weeks()
        return not await peek.fetch(partitions.sql("days_to_sum"))

    await wait_until(all_summed_up, 20)
    await past.are_those_of_the_log(stores[1])


async def test_what_was_recorded_on_the_day_after_its_end_counts_on_that_of_its_end(
    store: Store, peek: asyncpg.Connection
) -> None:
    """As a job does that ends just before midnight, or whose worker had no database."""
    past = await past_calls_of(peek, days=5)
    end = datetime.combine(past.today - timedelta(days=3), time(23, 59, 59), UTC)
    for late_s in (2, 90_000):
        at = end + timedelta(seconds=late_s)
        store.audit.put(past.call(1, received_at=at, finished_at=end, key_id="k"))
    await past.written(2)
    for _ in range(2):
        for by in ("tenant", "key", "upstream", "key,day"):
            (one,) = await store.usage.totals(by.split(","), end.date(), end.date())
            assert one.requests == 2, by
        assert await store.usage.sum_days() in (0, 4)


async def test_a_day_whose_log_is_gone_has_no_sums_by_key(
    store: Store, peek: asyncpg.Connection
) -> None:
    """Although what deletes them ended between the partition and its sums."""
    past = await past_calls_of(peek, days=16)
    for number in range(64):
        store.audit.put(past.call(number))
    await past.written(64)
    await store.usage.sum_days()
    await store.usage.sum_weeks()
    oldest = past.today - timedelta(days=15)
    while (oldest + timedelta(days=1)).weekday() != 1:  # until a Monday is gone
        await peek.execute(f"DROP TABLE {partitions.name_of('audit', oldest)}")
        oldest += timedelta(days=1)
    await peek.execute(f"DROP TABLE {partitions.name_of('audit', oldest)}")
    log = await peek.fetch(PER_DAY)
    for by in OF_LOG:
        found = await store.usage.totals(by.split(","), past.today - timedelta(days=20), past.today)
        assert summed([asdict(one) for one in found], by, None, None) == summed(log, by, None, None)


async def test_names_and_counts_are_rendered_as_json(
    store: Store, peek: asyncpg.Connection
) -> None:
    names = {"model": 'a"b\\c\n\u2028é🌊', "key_id": "k'{}%s", "upstream": "<&>\t"}
    store.audit.put(record(1, **names))
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 1 FROM audit"), 20)
    days = now().date() - timedelta(days=1), now().date()
    (one,) = await store.usage.totals(["tenant", "model", "day", "key", "upstream"], *days)
    assert (one.model, one.key, one.upstream) == tuple(names.values())
    row = await peek.fetchrow(f"SELECT {', '.join(COUNTS)} FROM usage_days")
    assert {name: getattr(one, name) for name in COUNTS} == dict(row)
    assert 0 < one.output_video_tokens == DETAILS.output_video_tokens
    assert await store.usage.totals(["day"], date.min, date.max)
    assert await store.usage.totals(["key"], date.min, date.min) == []
    assert await store.usage.totals(["key", "day"], date.max, date.max) == []


async def test_sums_of_the_revision_before_are_read_after_the_upgrade(
    empty_database_url: str, make_store: MakeStore
) -> None:
    peek = await asyncpg.connect(empty_database_url)
    await partitions.upgrade(peek, "0036")
    past = await past_calls_of(peek, days=3)
    day = past.today - timedelta(days=1)
    at = datetime.combine(day, time(5), UTC)
    await peek.execute(
        "INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status,"
        " classified_by, classified_reason, priority, attempts, lapses, instance_id, submitted_at,"
        " finished_at, key_id, images)"
        " SELECT gen_random_uuid(), $1, gen_random_uuid(), 't', 'gemini', 'relay',"
        " 'succeeded', '', '', 0, 1, 0, 'i', $1, $1, 'k', 2 FROM generate_series(1, 3)",
        at,
    )
    counts = (
        "requests",
        "images",
        *(name for name in COUNTS if name not in ("requests", "images")),
    )
    zeros = ", 0" * (len(counts) - 2)
    for level, tenant, key, upstream in (("key", "t", "k", ""), ("upstream", "", "", "gemini")):
        await peek.execute(
            f"INSERT INTO usage_sums (day, level, ended_day, tenant_id, key_id, upstream,"
            f" {', '.join(counts)}) VALUES ($1, $2, $1, $3, $4, $5, 3, 6{zeros})",
            *(day, level, tenant, key, upstream),
        )
    await peek.execute("INSERT INTO summed_days (day) VALUES ($1)", day)
    await peek.execute("DELETE FROM changed_days")
    await partitions.upgrade(peek)
    store = await make_store(empty_database_url)
    for by, images in (("key", 6), ("upstream", 6), ("key,day", 6), ("key,upstream", 6)):
        (one,) = await store.usage.totals(by.split(","), day, past.today)
        assert (one.requests, one.images) == (3, images), by
    await peek.execute("UPDATE audit SET images = 5")
    (one,) = await store.usage.totals(["key"], day, past.today)
    assert one.images == 15, "the trigger has marked the day"
    await peek.close()


async def test_jobs_count_when_they_end_and_once(store: Store, peek: asyncpg.Connection) -> None:
    await store.jobs.submit(new_job())
    (job,) = await store.queue.claim(pool="gemini", kind=new_job().classification.kind, limit=1)
    await store.queue.running(job, model="m", fence=(1, 1), queue_ms=0)
    for _ in range(2):  # a repeat, as after a reply that was lost
        await store.queue.finish(job, result(charge=CHARGES[0]))
    assert await totals_are_the_sums(peek) == 1
    (total,) = await store.usage.totals(("model",), now().date(), now().date())
    assert (total.model, total.cost_micros) == ("gemini-test", 100)


async def test_nonsense_of_a_provider_loses_nobodys_record(store: Store) -> None:
    """Two counts that a column can hold come to a sum that none can."""
    wild = Charge(UsageState.TOLD, Usage(2**63 - 1, 2**62, total_tokens=2**63 - 1), 1, 2**63 - 1)
    charges = [wild, Charge(UsageState.TOLD, Usage(5, 9), None, 100), wild]
    for charge in charges:
        store.audit.put(record(6, charge=charge, model="m"))
    for _ in range(2):
        store.audit.put(record(4, charge=wild, model="m"))
    rows = await wait_until(lambda: _totals(store), 20, "the record of all five")
    assert {name: rows["t0"][name] for name in ("requests", "input_tokens", "cost_micros")} == {
        "requests": 3,
        "input_tokens": 5,
        "cost_micros": 100,
    }
    assert (rows["t1"]["requests"], rows["t1"]["unpriced"]) == (2, 2)


async def _totals(store: Store) -> dict[str, Any] | None:
    found = await store.usage.totals(["tenant"], now().date() - timedelta(days=1), now().date())
    totals = {one.tenant or "": asdict(one) for one in found}
    return totals if sum(one["requests"] for one in totals.values()) == 5 else None
