"""Books of budgets that nobody needs any more, and what can't be entered in any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg
import orjson
import pytest

from tests.waiting import wait_until
from tidegate.call import CallCost, Caller, Charge, Usage, UsageState, new_id
from tidegate.errors import BudgetExceeded
from tidegate.prices.budgets import Budget
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, sql

ACME = Caller("acme", "k1")


def cost(micros: int) -> CallCost:
    return CallCost(micros, 0, micros, 0, "")


def told(micros: int) -> Charge:
    return Charge(UsageState.TOLD, Usage(), None, micros)


@pytest.fixture
async def budgets(database_url: str) -> AsyncIterator[Budgets]:
    connections = Connections(database_url)
    yield Budgets(connections, instance_id="one")
    await connections.aclose()


async def with_budgets(budgets: Budgets, *given: Budget) -> None:
    for one in given:
        await budgets.records.set(one, by="test")
    await budgets.refresh()


async def test_books_of_periods_that_are_long_over_are_deleted(
    budgets: Budgets, database_url: str
) -> None:
    """A rolling budget leaves 60 of them in each window, for each of its scopes."""
    rolling = Budget("rolling", "usd", 100, "rolling", window_s=3_600)
    await with_budgets(budgets, rolling, Budget("day", "usd", 100, "day"))
    budgets.settle(await budgets.reserve(budgets.binding(ACME, "m"), new_id(), cost(1)), told(1))
    await budgets.flush()
    rows = "SELECT budget, period > '-infinity' AS ends FROM budget_books ORDER BY 1, 2"
    connection = await asyncpg.connect(database_url)
    try:
        kept = await connection.fetch(rows)
        ages = ("rolling", "122 minutes"), ("rolling", "59 minutes"), ("day", "99 days")
        for name, age in ages:
            await connection.execute(
                "INSERT INTO budget_books (budget, scope, period, spent)"
                " SELECT $1, '', now() - $2::text::interval, 1",
                *(name, age),
            )
        await connection.execute(
            "INSERT INTO budget_books (budget, scope, period) SELECT 'day', '', now() - n * "
            "interval '1 day' FROM generate_series(101, 110) AS n"
        )
        await budgets.forget_books()
        assert len(await connection.fetch(rows)) == len(kept) + 2
        assert await connection.fetchval(
            "SELECT min(period) > now() - interval '100 days' FROM budget_books"
            " WHERE period > '-infinity'"
        )
    finally:
        await connection.close()


async def test_people_who_have_spent_nothing_leave_no_books(
    budgets: Budgets, database_url: str
) -> None:
    """Clients choose their names: whatever refuses or frees their calls, nothing grows by them."""
    hours = Budget("hours", "usd", 100, "rolling", window_s=600, each=("tenant", "subject"))
    days = replace(hours, name="days", period="day", window_s=None)
    await with_budgets(budgets, Budget("all", "usd", 20, "day"), hours, days)
    for name, micros in (("ann", 21), ("bob", 200)):
        with pytest.raises(BudgetExceeded):
            await budgets.reserve(budgets.binding(ACME, "m", name), new_id(), cost(micros))
        budgets._refusals.clear()
    eve, free, one = [
        await budgets.reserve(budgets.binding(ACME, "m", name), new_id(), cost(micros))
        for name, micros in (("eve", 2), ("free", 0), ("one", 1))
    ]
    budgets.settle(one, told(0))
    await budgets.flush()
    for _ in range(2):
        await budgets.forget_books()
    left = {(name, '["acme", "eve"]') for name in ("days", "hours")}
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch("SELECT budget, scope FROM budget_books WHERE scope <> ''")
    await connection.close()
    # That it was alerted of is known until its day is over.
    assert left <= {tuple(row) for row in rows} <= {*left, ("days", '["acme", "bob"]')}
    for hold, micros in ((eve, 2), (free, 1)):
        budgets.settle(hold, told(micros))
    await budgets.flush()
    await budgets.forget_books()
    found = await budgets.records.books()
    books = {(one.budget, one.scope): (one.spent, one.held) for one in found}
    of_free = {(name, '["acme", "free"]'): (1, 0) for name in ("days", "hours")}
    assert books.items() >= (of_free | dict.fromkeys(left, (2, 0))).items()


DAY = Budget("day", "usd", 1_000, "day", tenant="acme")


async def held(database_url: str) -> int:
    """How many calls hold something that is not charged yet."""
    connection = await asyncpg.connect(database_url)
    try:
        query = "SELECT count(*) FROM budget_holds WHERE estimated_at IS NULL"
        return int(await connection.fetchval(query))
    finally:
        await connection.close()


@pytest.mark.parametrize("much", [2**63, 2**70])
async def test_a_charge_that_cannot_be_written_holds_up_no_other(
    budgets: Budgets, database_url: str, much: int
) -> None:
    """It is charged what it holds, as an estimate."""
    await with_budgets(budgets, DAY)
    bound = budgets.binding(ACME, "m")
    holds = [await budgets.reserve(bound, new_id(), cost(100)) for _ in range(3)]
    for hold, micros in zip(holds, (10, much, 20), strict=True):
        budgets.settle(hold, told(micros))
    await budgets.flush()
    (book,) = await budgets.records.books("day")
    assert (book.spent, book.estimated, book.held) == (130, 100, 0)
    assert await held(database_url) == 0


async def test_a_hold_of_a_dead_process_that_cannot_be_charged_holds_up_no_other(
    budgets: Budgets, database_url: str
) -> None:
    """Its book has room for no more in its column."""
    await with_budgets(budgets, DAY, Budget("full", "usd", 1_000, "day", tenant="other"))
    for caller in (Caller("other", "k2"), ACME):
        await budgets.reserve(budgets.binding(caller, "m"), new_id(), cost(100))
    connection = await asyncpg.connect(database_url)
    try:
        for change in (
            "budget_books SET spent = 2::numeric ^ 63 - 1 WHERE budget = 'full'",
            "budget_holds SET held_at = now() - interval '1 day'",
            "budget_instances SET seen_at = now() - interval '1 day'",
        ):
            await connection.execute(f"UPDATE {change}")
    finally:
        await connection.close()
    assert await budgets.charge_orphans() == 2
    (book,) = await budgets.records.books("day")
    assert (book.spent, book.estimated, book.held) == (100, 100, 0)


async def test_a_reservation_on_its_way_is_removed_with_its_budget(
    budgets: Budgets, database_url: str
) -> None:
    """Else it stays for ever, is charged as a dead process's every five seconds, and its end frees
    in the next budget of that name what was never reserved there."""
    day = Budget("day", "usd", 100, "day")
    await with_budgets(budgets, day)
    binding, other = budgets.binding(ACME, "m"), new_id()
    budgets.settle(await budgets.reserve(binding, new_id(), cost(1)), told(1))
    await budgets.flush()
    connection = await asyncpg.connect(database_url)
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    reserving = connection.transaction()
    await reserving.start()
    try:
        call: dict[str, Any] = {"id": other, "request": other, "binds": [[0, 60]]}
        asked = {"books": [["day", ""]], "calls": [call]}
        await connection.fetch(sql("reserve_budgets"), orjson.dumps(asked).decode(), "one")
        removal = asyncio.create_task(budgets.records.remove("day", by="test"))
        await wait_until(lambda: connection.fetchval(waiting), what="the removal waits")
        await reserving.commit()
        await removal
        assert await connection.fetchval("SELECT count(*) FROM budget_holds") == 0
    finally:
        await connection.close()
    await with_budgets(budgets, day)
    budgets.settle(other, told(10), new_id())
    await budgets.flush()
    await budgets.reserve(budgets.binding(ACME, "m"), new_id(), cost(100))
    (book,) = await budgets.records.books("day")
    assert (book.spent, book.held) == (0, 100)
