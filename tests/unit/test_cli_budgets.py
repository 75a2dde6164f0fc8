"""Commands `tidegate budgets`: what they refuse before they reach a deployment."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.unit.invoked import invoke
from tidegate.cli import budgets
from tidegate.errors import ConfigError
from tidegate.prices.budgets import Budget
from tidegate.store.budgets import BudgetBook


@pytest.mark.parametrize(
    "period", ["500ms", "1500ms", "400d", "99999999999d", "fortnight", "9" * 400 + "d"]
)
def test_a_period_that_no_budget_can_have_is_refused_by_its_option(period: str) -> None:
    with pytest.raises(ConfigError) as refused:
        invoke("budgets", "set", "b", "--usd", "1", "--period", period)
    assert (refused.value.variable, refused.value.value) == ("--period", period)
    assert refused.value.allowed == "day, week, month, or whole seconds up to 366d"


def test_a_share_that_is_no_number_is_refused_by_its_option() -> None:
    for alerts in (("much",), ("80", "none")):
        options = [text for one in alerts for text in ("--alert", one)]
        with pytest.raises(ConfigError) as refused:
            invoke("budgets", "set", "b", *options)
        assert refused.value.variable == "--alert"


def test_an_amount_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="--usd=1: must not be given together with --tokens"):
        invoke("budgets", "set", "b", "--usd", "1", "--tokens", "2")


def test_a_new_budget_needs_an_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    class Records:
        def change(self, name: str, edit: Any, *, by: str) -> None:
            edit(None)

    monkeypatch.setattr("tidegate.cli.budgets.with_budgets", lambda work: work(Records()))
    with pytest.raises(ConfigError, match="b is a new budget: it needs --usd or --tokens"):
        invoke("budgets", "set", "b", "--period", "day")


def test_the_list_shows_when_a_spent_budget_is_reset() -> None:
    book = BudgetBook("day", "", "usd", 10, 10, 0, 0, datetime(2026, 12, 3, tzinfo=UTC), None)
    day = Budget("day", "usd", 10, "day")
    for shown, resets in (
        (replace(book, spent=9), "2026-12-03 00:00Z"),
        (book, "2026-12-03 00:00Z spent"),
        (replace(book, reset_at=None), "spent"),
        (replace(book, paused_since=book.reset_at), "paused"),
    ):
        assert budgets._row(day, shown)[-1] == resets
