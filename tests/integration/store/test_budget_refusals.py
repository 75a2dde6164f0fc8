"""Which of several budgets refuses a call, until when, and what its book shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from tests.integration.store.test_budget_books import (
    ACME,
    cost,
    cut,
    held_by,
    seen,
    told,
    with_budgets,
)
from tidegate.call import UNKNOWN_CHARGE, new_id
from tidegate.errors import BudgetExceeded
from tidegate.prices.budgets import Budget
from tidegate.store.budgets import Budgets, correct_holds
from tidegate.store.database import Connections


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[Connections]:
    made = Connections(database_url)
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
    await connections.run(lambda connection: correct_holds(connection, request_id, micros=30))
    assert await seen(database_url) == {("u", ""): (30, 0, 0), ("t", ""): (140, 0, 0)}
