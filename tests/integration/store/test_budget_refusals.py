"""Which of several budgets refuses a call, until when, and what its book shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from tests.integration.store.spending import Spending
from tests.integration.store.test_budget_books import (
    ACME,
    DAY,
    OTHER,
    cost,
    cut,
    held_by,
    seen,
    told,
    with_budgets,
)
from tests.waiting import wait_until
from tidegate.call import UNKNOWN_CHARGE, new_id
from tidegate.errors import BudgetExceeded, BudgetPaused, QuotaExceeded
from tidegate.jobs.webhooks import alert_payload
from tidegate.prices.budgets import Budget
from tidegate.store import budgets as module
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections
from tidegate.store.outbox import AlertOutbox
from tidegate.store.provider.settlements import correct_holds

# A call in the audit that ended at $1 and cost $2 micro-dollars.
_CALL = """
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind,
        classified_by, classified_reason, priority, attempts, lapses, instance_id, submitted_at,
        finished_at, queue_ms, upstream_ms, cost_micros, model)
    VALUES (gen_random_uuid(), $1, gen_random_uuid(), 'acme', 'gemini', 'relay', 'succeeded',
        'text_only', 'body', '', 0, 1, 0, 'i', $1, $1, 0, 0, $2, 'm')
"""


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[Connections]:
    made = Connections(database_url, patience_ms=60_000)  # through a stall of the machine
    yield made
    await made.aclose()


@pytest.fixture
def budgets(connections: Connections) -> Budgets:
    return Budgets(connections, instance_id="one")


async def spend(budgets: Budgets, micros: int) -> None:
    budgets.settle(await held_by(budgets, ACME, micros), told(micros))
    await budgets.flush()


async def refused(budgets: Budgets, micros: int) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as found:
        await held_by(budgets, ACME, micros)
    return found.value


async def test_of_several_budgets_the_one_that_is_reset_last_refuses(budgets: Budgets) -> None:
    await with_budgets(
        budgets,
        Budget("a-month", "usd", 100, "month"),
        Budget("b-rolling", "usd", 100, "rolling", window_s=86_400 * 366),
        Budget("c-rolling", "usd", 100, "rolling", window_s=60),
        Budget("d-week", "usd", 100, "week"),
    )
    await spend(budgets, 80)
    for _ in range(2):  # as PostgreSQL says, then as this process remembers
        assert (await refused(budgets, 30)).limit == "b-rolling"
    budgets._refusals.clear()
    await with_budgets(budgets, Budget("b-rolling", "usd", 1_000, "rolling", window_s=86_400 * 366))
    assert (await refused(budgets, 30)).limit == "a-month"
    await with_budgets(budgets, Budget("a-month", "usd", 1_000, "month"))
    assert (await refused(budgets, 30)).limit == "d-week"


async def test_a_refusal_of_other_calls_leaves_no_later_budget_of_this_call_out(
    connections: Connections,
) -> None:
    # Its clock stands still: what is known of other budgets counts for a second.
    budgets = Budgets(connections, instance_id="one", clock=lambda: 0.0)
    await with_budgets(
        budgets,
        Budget("a-day", "usd", 100, "day"),
        Budget("b-month", "usd", 100, "month", tenant="acme"),
        Budget("c-month", "tokens", 1_000, "month", tenant="acme"),
    )
    await spend(budgets, 90)
    with pytest.raises(BudgetExceeded) as found:
        await held_by(budgets, OTHER, 20)
    assert found.value.limit == "a-day"
    written, asked = budgets._written, 0

    async def counted(payload: bytes) -> list[asyncpg.Record]:
        nonlocal asked
        asked += 1
        return await written(payload)

    budgets._written = counted  # type: ignore[method-assign]
    for _ in range(3):
        assert (await refused(budgets, 20)).limit == "b-month"
    assert asked == 1, "what PostgreSQL has answered is remembered"


async def test_a_refusal_holds_for_a_call_only_while_its_other_budgets_are_known(
    connections: Connections,
) -> None:
    now = 0.0
    one = Budgets(connections, instance_id="one", clock=lambda: now)
    await with_budgets(
        one,
        Budget("a-day", "usd", 100, "day"),
        Budget("b-month", "usd", 150, "month"),
    )
    await spend(one, 90)
    assert (await refused(one, 20)).limit == "a-day"
    assert (await refused(one, 20)).limit == "a-day"
    assert (await refused(one, 70)).limit == "b-month", "a larger call does not fit there either"
    assert (await refused(one, 20)).limit == "a-day"
    await connections.run(
        lambda connection: connection.execute(
            "UPDATE budget_books SET spent = 140 WHERE budget = 'b-month'"
        )
    )
    now = 1.5
    assert (await refused(one, 20)).limit == "b-month", "it was spent meanwhile"


async def test_a_budget_that_a_call_never_fits_refuses_it_before_one_with_a_reset(
    budgets: Budgets,
) -> None:
    await with_budgets(budgets, Budget("a", "usd", 50, "day"), Budget("b", "usd", 100, "month"))
    await spend(budgets, 40)
    never = await refused(budgets, 70)
    assert (never.limit, never.retry_after_ms) == ("a", None)


async def test_a_budget_that_waits_for_a_person_refuses_before_one_with_a_reset(
    budgets: Budgets,
) -> None:
    await with_budgets(
        budgets, Budget("a", "usd", 100, "day", at_end="pause"), Budget("b", "usd", 100, "month")
    )
    await spend(budgets, 100)
    with pytest.raises(BudgetPaused):
        await held_by(budgets, ACME, 1)


async def test_calls_that_need_more_of_a_window_wait_for_more_to_leave_it(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, Budget("r", "usd", 100, "rolling", window_s=6_000))
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "INSERT INTO budget_books (budget, scope, period, spent) VALUES"
        " ('r', '', budget_span(6000, now() - interval '50 min'), 50),"
        " ('r', '', budget_span(6000, now()), 50)"
    )
    await connection.close()
    small, large = await refused(budgets, 20), await refused(budgets, 80)
    assert 2_900_000 < (small.retry_after_ms or 0) <= 3_100_000
    assert 5_900_000 < (large.retry_after_ms or 0) <= 6_100_000


async def test_room_that_an_extra_amount_made_ends_with_it(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, Budget("r", "usd", 100, "rolling", window_s=6_000))
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "INSERT INTO budget_books (budget, scope, period, spent, extra) VALUES"
        " ('r', '', '-infinity', 0, 50),"
        " ('r', '', budget_span(6000, now() - interval '50 min'), 50, 50),"
        " ('r', '', budget_span(6000, now()), 100, 0)"
    )
    await connection.close()
    assert 5_900_000 < ((await refused(budgets, 20)).retry_after_ms or 0) <= 6_100_000


@pytest.mark.parametrize(
    ("period", "zone", "at", "end"),
    [
        ("day", "America/Havana", "2026-10-31T20:00", "2026-11-01T04:00"),  # 0:00 comes twice
        ("month", "America/Havana", "2026-10-31T20:00", "2026-11-01T04:00"),
        ("day", "America/Havana", "2026-11-01T04:30", "2026-11-02T05:00"),
        ("day", "Atlantic/Azores", "2026-10-24T23:00", "2026-10-25T00:00"),
        ("day", "Africa/Cairo", "2026-10-29T20:30", "2026-10-29T22:00"),  # 23:00 comes twice
        ("day", "Africa/Cairo", "2026-04-23T20:30", "2026-04-23T22:00"),  # there is no 0:00
        ("day", "Europe/Berlin", "2026-10-25T12:00", "2026-10-25T23:00"),
        ("month", "UTC", "2028-02-29T23:59", "2028-03-01T00:00"),
        ("week", "Asia/Kathmandu", "2026-11-30T00:00", "2026-12-06T18:15"),
    ],
)
async def test_a_period_ends_with_the_first_moment_of_the_next(
    database_url: str, period: str, zone: str, at: str, end: str
) -> None:
    connection = await asyncpg.connect(database_url)
    moments = [datetime.fromisoformat(one).replace(tzinfo=UTC) for one in (at, end)]
    reset = "SELECT budget_reset($1, $2, $3)"
    assert await connection.fetchval(reset, period, zone, moments[0]) == moments[1]
    await connection.close()


@pytest.mark.parametrize(
    ("period", "zone", "at", "start"),
    [
        ("day", "America/Havana", "2026-11-01T04:30", "2026-11-01T04:00"),
        ("day", "America/Havana", "2026-11-01T05:30", "2026-11-01T04:00"),
        ("month", "America/Havana", "2026-11-20T00:00", "2026-11-01T04:00"),
        ("day", "Atlantic/Azores", "2026-10-25T00:10", "2026-10-25T00:00"),
        ("day", "Atlantic/Azores", "2026-10-25T20:00", "2026-10-25T00:00"),
        ("day", "America/Havana", "2026-03-08T12:00", "2026-03-08T05:00"),
        ("day", "America/Santiago", "2026-04-05T12:00", "2026-04-05T04:00"),
        ("day", "Europe/Berlin", "2026-10-25T12:00", "2026-10-24T22:00"),
    ],
)
async def test_a_new_budget_starts_with_all_that_its_period_has_on_record(
    database_url: str, monkeypatch: pytest.MonkeyPatch, period: Any, zone: str, at: str, start: str
) -> None:
    """Also with the first of two equal hours, in which the calendar shows midnight twice."""
    spending = Spending(database_url, 0)
    await spending.start(monkeypatch)
    now, first = (datetime.fromisoformat(one).replace(tzinfo=UTC) for one in (at, start))
    await spending.clock.set(now)
    connection = await asyncpg.connect(database_url)
    ended = [(first - timedelta(seconds=1), 1), (first, 10), (now, 100)]
    await connection.executemany(_CALL, ended)
    await connection.close()
    await spending.processes[0].records.set(Budget("b", "usd", 9, period, zone=zone), by="test")
    (book,) = await spending.processes[0].records.books("b")
    assert book.spent == 110
    await spending.aclose()


async def test_the_estimates_of_a_window_are_listed_and_it_is_among_the_most_used(
    budgets: Budgets,
) -> None:
    await with_budgets(
        budgets,
        Budget("day", "usd", 1_000, "day"),
        Budget("rolling", "usd", 200, "rolling", window_s=3_600),
    )
    hold = await held_by(budgets, ACME, 100)
    budgets.settle(hold, cut(None))
    await budgets.flush()
    books = [(one.budget, one.spent, one.estimated) for one in await budgets.records.books()]
    assert books == [("rolling", 100, 100), ("day", 100, 100)]


@pytest.mark.parametrize("micros", [2**63, 10**24])
async def test_a_call_that_needs_more_than_a_number_holds_is_refused(
    budgets: Budgets, micros: int
) -> None:
    await with_budgets(budgets, Budget("day", "usd", 1_000, "day"))
    found = await asyncio.gather(
        *(held_by(budgets, ACME, one) for one in (1, micros, micros, 2)), return_exceptions=True
    )
    assert [type(one) for one in found] == [UUID, BudgetExceeded, BudgetExceeded, UUID]


async def test_tokens_of_all_attempts_stay_charged_where_only_the_cost_is_corrected(
    budgets: Budgets, connections: Connections, database_url: str
) -> None:
    await with_budgets(
        budgets, Budget("t", "tokens", 1_000, "day"), Budget("u", "usd", 1_000, "day")
    )
    request_id = new_id()
    for _ in range(2):
        bindings = budgets.binding(ACME, "m")
        hold = await budgets.reserve(bindings, request_id, cost(100, 70))
        budgets.settle(hold, UNKNOWN_CHARGE)
        await budgets.flush()
    await connections.run(lambda connection: correct_holds(connection, {request_id: 30}))
    assert await seen(database_url) == {("u", ""): (30, 0, 0), ("t", ""): (140, 0, 0)}


async def test_a_budget_that_takes_estimates_is_corrected_by_what_a_request_has_cost(
    budgets: Budgets, connections: Connections, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dead process, of a call that was cut off, and of one that was only silent."""
    await with_budgets(budgets, replace(DAY, doubt="estimate"))
    dead = Budgets(connections, instance_id="dead")
    await dead.refresh()
    bindings, requests = budgets.binding(ACME, "m"), [new_id() for _ in range(3)]
    late, *_ = [await dead.reserve(bindings, one, cost(300)) for one in requests[:2]]
    monkeypatch.setattr(module, "DEAD_AFTER_S", -1.0)
    assert await budgets.charge_orphans() == 2
    budgets.settle(await budgets.reserve(bindings, requests[2], cost(200)), cut(50))
    await budgets.flush()
    assert await seen(database_url) == {("day", ""): (650, 650, 0)}
    for _ in range(2):
        dead.settle(late, told(20))
        await dead.flush()
        assert await seen(database_url) == {("day", ""): (370, 350, 0)}
    for request, micros, left in ((requests[1], 7, (77, 50, 0)), (requests[2], 60, (87, 0, 0))):
        assert await budgets.records.correct(request, micros=micros, tokens=1) == 1
        assert await budgets.records.correct(request, micros=micros, tokens=1) == 0
        assert await seen(database_url) == {("day", ""): left}


async def test_a_pause_of_a_person_is_listed_in_a_period_without_a_call(
    budgets: Budgets, database_url: str
) -> None:
    budget = Budget("p", "usd", 100, "day", tenant="acme", each=("subject",), at_end="pause")
    await with_budgets(budgets, budget)
    bindings = budgets.binding(ACME, "m", "ann")
    budgets.settle(await budgets.reserve(bindings, new_id(), cost(100)), told(100))
    await budgets.flush()
    with pytest.raises(BudgetPaused):
        await budgets.reserve(bindings, new_id(), cost(1))
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE budget_books SET period = period - interval '1 day'")
    await connection.close()
    for scope in (None, '["ann"]'):
        (book,) = await budgets.records.books("p", scope)
        assert (book.scope, book.spent, book.amount) == ('["ann"]', 0, 100)
        assert book.paused_since is not None
    with pytest.raises(BudgetPaused):
        await budgets.check(ACME, "m", "ann")


async def test_a_cost_that_no_call_can_have_is_unknown_to_budgets_as_on_record(
    budgets: Budgets,
) -> None:
    await with_budgets(budgets, Budget("a", "usd", 1_000, "day"))
    hold = await held_by(budgets, ACME, 70)
    budgets.settle(hold, told(2 * 10**16))
    await budgets.flush()
    (book,) = await budgets.records.books("a")
    assert (book.spent, book.estimated, book.held) == (70, 70, 0)


@pytest.mark.parametrize("fallback", [None, "cheap"])
async def test_a_budget_that_no_longer_pauses_is_not_paused_any_more(
    budgets: Budgets, fallback: str | None
) -> None:
    """`--no-pause` and `--fallback cheap` had no effect on a budget that was paused already."""
    pausing = Budget("p", "usd", 100, "day", each=("tenant",), at_end="pause")
    await with_budgets(budgets, pausing)
    await spend(budgets, 100)
    with pytest.raises(BudgetPaused):
        await held_by(budgets, ACME, 1)
    await with_budgets(budgets, replace(pausing, amount=150))
    with pytest.raises(BudgetPaused):  # a person resumes it
        await held_by(budgets, ACME, 1)
    after = replace(pausing, at_end="refuse" if fallback is None else "fall_back")
    await with_budgets(budgets, replace(after, fallback=fallback))
    assert (await refused(budgets, 1)).fallback == fallback
    (book,) = await budgets.records.books("p")
    assert book.paused_since is None


async def test_a_submission_under_a_spent_rolling_budget_is_told_when_there_is_room(
    budgets: Budgets, database_url: str
) -> None:
    """As a call is; it was refused without a time."""
    await with_budgets(budgets, Budget("hour", "usd", 100, "rolling", window_s=3_600))
    await spend(budgets, 60)
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE budget_books SET period = period - interval '20 minutes' WHERE period > '-infinity'"
    )
    await connection.close()
    await spend(budgets, 40)
    with pytest.raises(BudgetExceeded, match=r"has nothing left: .* it has room again at") as found:
        await budgets.check(ACME)
    after_ms = found.value.retry_after_ms
    of_call_ms = (await refused(budgets, 1)).retry_after_ms
    assert after_ms is not None
    assert of_call_ms is not None
    assert 38 * 60_000 < of_call_ms <= after_ms < of_call_ms + 10_000


async def test_of_several_budgets_the_one_that_is_reset_last_refuses_a_submission(
    budgets: Budgets,
) -> None:
    """As of those that refuse a call; it was the first one by its name."""
    await with_budgets(
        budgets,
        Budget("a-rolling", "usd", 100, "rolling", window_s=60),
        Budget("b-rolling", "usd", 100, "rolling", window_s=86_400 * 366),
        Budget("c-rolling", "usd", 100, "rolling", window_s=3_600),
    )
    await spend(budgets, 100)
    with pytest.raises(BudgetExceeded) as found:
        await budgets.check(ACME)
    assert found.value.limit == (await refused(budgets, 1)).limit == "b-rolling"
    pausing = Budget("a-rolling", "usd", 100, "rolling", window_s=60, at_end="pause")
    await with_budgets(budgets, pausing)
    with pytest.raises(BudgetPaused):
        await held_by(budgets, ACME, 1)
    with pytest.raises(BudgetPaused):
        await budgets.check(ACME)


async def test_an_alert_of_a_removed_budget_keeps_its_unit(
    budgets: Budgets, connections: Connections
) -> None:
    """Of 100 tokens it said $0.0001, and so does one of the same name in another unit."""
    outbox = AlertOutbox(connections)
    await with_budgets(budgets, Budget("b", "tokens", 100, "day", alerts=(1,)))
    bindings = budgets.binding(ACME, "m")
    hold = await budgets.reserve(bindings, new_id(), cost(0, 50))
    budgets.settle(hold, told(0, 50))
    await budgets.flush()
    with pytest.raises(BudgetExceeded):
        await budgets.reserve(bindings, new_id(), cost(0, 51))
    await budgets.records.remove("b", by="test")
    await budgets.records.set(Budget("b", "usd", 100, "day"), by="test")
    found = await outbox.newest(10)
    assert [(one.kind, one.unit) for one in found] == [
        ("budget_out", "tokens"),
        ("budget_share", "tokens"),
    ]
    due = sorted(await outbox.claim(10, 1_000), key=lambda one: one.created_at)
    texts = [orjson.loads(alert_payload(one, "slack"))["text"] for one in due]
    assert texts[0] == "Budget b: 50 tokens of 100 tokens spent, which is 1 % or more."
    assert len(texts) == 2


async def test_an_alert_of_a_budget_with_a_cheaper_model_names_it(
    budgets: Budgets, connections: Connections
) -> None:
    cheaper = Budget("b", "usd", 100, "day", at_end="fall_back", fallback="cheap")
    await with_budgets(budgets, cheaper)
    await refused(budgets, 101)
    outbox = AlertOutbox(connections)
    assert [one.fallback for one in await outbox.newest(10)] == ["cheap"]
    (due,) = await outbox.claim(10, 1_000)
    assert b"spent; a call was moved to cheap, since" in alert_payload(due, "slack")


async def test_a_process_prepares_its_first_refusal_and_leaves_nothing_of_that(
    budgets: Budgets, connections: Connections, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took PostgreSQL tens of milliseconds to plan it, while its call waited."""
    await with_budgets(budgets, DAY)
    prepared = asyncio.Event()
    execute = connections.execute

    async def spied(name: str, *values: Any) -> int:
        count = await execute(name, *values)
        if name == "warm_budgets":
            prepared.set()
        return count

    monkeypatch.setattr(connections, "execute", spied)
    running = asyncio.create_task(Budgets(connections, instance_id="new").run())
    async with asyncio.timeout(20):
        await prepared.wait()
    running.cancel()
    peek = await asyncpg.connect(database_url)
    tables = ("budgets", "budget_books", "budget_holds", "budget_pauses", "alerts")
    counts = [await peek.fetchval(f"SELECT count(*) FROM {table}") for table in tables]
    await peek.close()
    assert counts == [1, 0, 0, 0, 0]


async def test_a_call_in_a_queue_leaves_it_once_another_process_has_spent_its_budget(
    connections: Connections,
) -> None:
    """Without a call of its own process that is refused; and one that fits holds nothing."""
    one, other = (Budgets(connections, instance_id=name) for name in ("one", "other"))
    await with_budgets(one, Budget("a-day", "usd", 100, "day"))
    await other.refresh()
    told_to: dict[int, list[QuotaExceeded]] = {micros: [] for micros in (5, 20, 20_000)}
    ends = []
    for micros, heard in told_to.items():
        if micros != 20_000:
            ends.append(other.watch(other.binding(ACME, "m"), cost(micros), heard.append))
    await spend(one, 90)
    await wait_until(lambda: bool(told_to[20]), what="the refusal of the call that waits")
    assert isinstance(told_to[20][0], BudgetExceeded)
    assert (told_to[20][0].limit, told_to[5]) == ("a-day", [])
    ends.append(other.watch(other.binding(ACME, "m"), cost(20_000), told_to[20_000].append))
    for end in ends:
        end()
    await wait_until(lambda: other._trying is None, what="no more trials")
    (book,) = await one.records.books("a-day")
    assert (book.spent, book.held, other.held) == (90, 0, 0)


async def test_a_call_in_a_queue_is_refused_as_its_budget_says_now(
    connections: Connections,
) -> None:
    """It was refused by the budget of when it began to wait: without its new cheaper model, and for
    a minute so was every other call, of which some were told that no period has room for them."""
    one, other = (Budgets(connections, instance_id=name) for name in ("one", "other"))
    before = Budget("d", "usd", 100, "day")
    await with_budgets(one, before, Budget("gone", "usd", 10_000, "day"))
    await other.refresh()
    waiting: list[QuotaExceeded] = []
    old = other.binding(ACME, "m")
    end = other.watch(old, cost(50), waiting.append)
    await one.records.remove("gone", by="test")
    await with_budgets(one, replace(before, amount=1_000, at_end="fall_back", fallback="cheap"))
    await other.refresh()
    await spend(one, 960)
    await wait_until(lambda: bool(waiting), what="the refusal of the call that waits")
    end()
    errors = [waiting[0], await refused(other, 500)]
    # So is one after another whose reservation was on its way during the change.
    other._refusals.clear()
    with pytest.raises(BudgetExceeded):
        await other.reserve(old, new_id(), cost(500))
    assert other._refusals.books
    errors.append(await refused(other, 500))
    for error in errors:
        assert isinstance(error, BudgetExceeded)
        assert (error.fallback, error.never_fits) == ("cheap", False)
