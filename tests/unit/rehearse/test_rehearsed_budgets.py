"""Budgets in a rehearsal: what they refuse, pause and send elsewhere, and when."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import Concurrency, PoolPolicy, Rate
from tidegate.policy.deployment import Upstream
from tidegate.prices.budgets import Budget
from tidegate.prices.rates import price_of
from tidegate.rehearse import cost_at
from tidegate.rehearse.budgets import RehearsedBudgets, budget_in, changed
from tidegate.rehearse.load import Arrival
from tidegate.rehearse.report import Findings, sentence_of, tables_of
from tidegate.rehearse.simulation import Setting, compare, rehearse

HOUR_MS = 3_600_000.0
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = Budget("acme", "usd", 1_000_000, "day", tenant="acme")


def hourly(count: int, **changes: Any) -> list[Arrival]:
    """A call an hour, of a quarter of a dollar."""
    one = Arrival(0.0, "acme", model="dear", duration_ms=1_000, cost_usd=0.25)
    return [replace(one, time_ms=n * HOUR_MS, **changes) for n in range(count)]


def played(arrivals: list[Arrival], *budgets: Budget, **setting: Any) -> Findings:
    policy = PoolPolicy({"kind:text_only": 2})
    setting = {"starts_at": NOON} | setting
    return rehearse("", arrivals, policy, Setting(**setting), budgets=budgets)


def test_a_spent_budget_refuses_until_its_period_ends() -> None:
    found = played(hourly(15), DAY)
    (use,) = found.budgets
    # Four from noon on, then none up to midnight, then as many as come.
    assert use.first_ms == pytest.approx(4 * HOUR_MS, abs=1)
    assert use.refused == 8
    assert (use.spent, use.fullest) == (7 * 250_000, 1_000_000)
    assert found.refused == {"budget spent": 8}
    assert (found.admitted, found.cost_micros) == (7, 7 * 250_000)
    assert "budget acme is spent after 4 h" in sentence_of(found)
    (row,) = next(table for table in tables_of([found]) if table.title == "Budgets").rows
    assert row[:7] == ("acme", "tenant acme, a day", "$1.75", "$1.00", "$1.00", "8", "")
    assert played(hourly(4), DAY).refused == {}
    assert played(hourly(9, tenant="other"), DAY).refused == {}


def test_a_zone_decides_when_a_day_ends() -> None:
    found = played(hourly(15), replace(DAY, zone="Asia/Tokyo"))
    # 12:00 UTC is 21:00 in Tokyo: the day ends after three calls.
    assert found.budgets[0].first_ms == pytest.approx(7 * HOUR_MS, abs=1)


def test_a_paused_budget_stays_paused_beyond_its_period() -> None:
    pausing = replace(DAY, at_end="pause", each=("subject",), tenant=None)
    arrivals = hourly(15, subject="ann") + hourly(3, subject="bob")
    evening = datetime(2026, 11, 24, 19, tzinfo=UTC)
    in_order = sorted(arrivals, key=lambda one: one.time_ms)
    found = played(in_order, pausing, starts_at=evening)
    (use,) = found.budgets
    assert (use.refused, use.paused) == (11, 1)
    assert use.paused_ms == pytest.approx(4 * HOUR_MS, abs=1)
    assert found.refused == {"budget paused": 11}


def test_one_call_that_needs_too_much_pauses_no_budget_for_others() -> None:
    pausing = replace(DAY, at_end="pause")
    dear = replace(hourly(1)[0], time_ms=HOUR_MS / 2, cost_usd=0.9)
    in_order = sorted([*hourly(3), dear], key=lambda one: one.time_ms)
    (use,) = (found := played(in_order, pausing)).budgets
    assert (use.refused, use.paused, found.admitted) == (1, 0, 3)
    assert found.refused == {"budget spent": 1}


def test_a_rolling_budget_frees_what_has_left_its_window() -> None:
    rolling = Budget("r", "usd", 500_000, "rolling", window_s=3 * 3_600)
    found = played(hourly(9), rolling)
    # Two, then none until the first has left: 0 1 . 3 4 . 6 7 . with a span of three minutes more.
    assert found.budgets[0].refused >= 3
    assert found.budgets[0].fullest == 500_000


def test_a_spent_budget_sends_calls_to_its_cheaper_model() -> None:
    def cost(arrival: Arrival, model: str) -> int | None:
        return {"dear": 250_000, "cheap": 10_000}.get(model)

    falling = replace(DAY, at_end="fall_back", fallback="cheap", model="dear")
    found = played(hourly(9), falling, cost=cost)
    assert found.refused == {}
    assert (found.budgets[0].fell_back, found.budgets[0].spent) == (5, 1_000_000)
    # All it has is less than a call of the cheaper model costs.
    whole = replace(falling, model=None, amount=1_005_000)
    assert played(hourly(9), whole, cost=cost).budgets[0].refused == 5


def test_a_call_that_went_to_the_cheaper_model_is_one_of_that() -> None:
    prices = {"dear": 250_000, "cheap": 10_000}
    falling = replace(DAY, at_end="fall_back", fallback="cheap", model="dear")
    policy = PoolPolicy(
        {
            "kind:text_only": Concurrency(2),
            "rpd:dear": Rate(100, unit="requests", window_ms=86_400_000),
            "rpd:cheap": Rate(100, unit="requests", window_ms=86_400_000),
        }
    )
    setting = Setting(starts_at=NOON, cost=lambda _arrival, model: prices.get(model))
    sets = {"now": (), "then": (falling,)}
    found = compare(hourly(9), dict.fromkeys(sets, policy), setting, budgets=sets)
    # Four of the dear model, and five of the cheap one: at its price, under its limits.
    assert found[1].cost_micros == 4 * 250_000 + 5 * 10_000
    used = {one.limit: one.used for one in found[1].limits}
    # Used counts up to the last arrival, which is admitted a round trip later.
    assert (used["rpd:dear"], used["rpd:cheap"]) == (0.04, 0.04)
    rows = {row[0]: row[1:] for row in tables_of(found)[0].rows}
    assert rows["cost"] == ("$2.25", "$1.05")
    assert rows["refused"] == ("0", "0")
    assert rows["refused by budget acme"] == ("-", "0")
    assert rows["to a cheaper model by budget acme"] == ("-", "5, from 4 h on")


def test_a_call_of_unknown_cost_is_refused_unless_estimates_are_taken() -> None:
    unknown = {"cost": lambda _arrival, _model: None}
    assert played(hourly(3), DAY, **unknown).refused == {"cost unknown": 3}
    assert played(hourly(3), replace(DAY, doubt="estimate"), **unknown).refused == {}


def test_tokens_are_counted_and_a_refused_call_leaves_its_permit_to_the_next() -> None:
    tokens = Budget("t", "tokens", 1_000, "month", key="k1")
    one = Arrival(0.0, input_tokens=300, output_tokens=100, duration_ms=500)
    keys = ["k1"] * 6 + ["k2"] * 4
    arrivals = [replace(one, time_ms=n, key=key) for n, key in enumerate(keys)]
    found = played(arrivals, tokens)
    assert (found.budgets[0].refused, found.budgets[0].spent) == (4, 800)
    assert found.admitted == 6
    assert found.end_ms < 6 * 500


def test_several_sets_of_budgets_stand_side_by_side() -> None:
    sets = {"now": (DAY,), "budgets.acme.usd=2": changed((DAY,), {"budgets.acme.usd": 2})}
    policy = PoolPolicy({"kind:text_only": 2})
    found = compare(hourly(9), dict.fromkeys(sets, policy), Setting(starts_at=NOON), budgets=sets)
    (table,) = tables_of(found)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["cost"] == ("$1.00", "$2.00")
    assert rows["refused by budget acme"] == ("5, from 4 h on", "1, from 8 h on")


def test_what_is_written_to_a_cache_costs_its_own_price() -> None:
    price = price_of("p", {"input": 1.0, "output": 5.0, "cache_write": 1.25, "cached": 0.1})
    cost = cost_at(Upstream("x", {}, "", prices={"m": price}))
    one = Arrival(0.0, model="m", input_tokens=1_000_000)
    assert cost(one, "m") == 1_000_000
    assert cost(replace(one, cache_write_tokens=1_000_000), "m") == 1_250_000
    part = replace(one, cache_write_tokens=400_000, cached_tokens=500_000)
    assert cost(part, "m") == 500_000 + 50_000 + 100_000


def test_changes_make_change_and_remove_budgets() -> None:
    (cheaper,) = changed((DAY,), {"budgets.acme.usd": 0.5})
    assert cheaper == replace(DAY, amount=500_000)
    (counted,) = changed((DAY,), {"budgets.acme.tokens": 7, "budgets.acme.alerts": [50]})
    assert (counted.unit, counted.amount, counted.alerts) == ("tokens", 7, (50,))
    assert changed((DAY,), {"budgets.acme": "none"}) == ()
    made = changed((), {"budgets.team/a.b": {"usd": 3, "period": "5h", "fallback": "m"}})
    assert made == (
        Budget("team/a.b", "usd", 3_000_000, "rolling", window_s=18_000, at_end="fall_back",
               fallback="m"),
    )  # fmt: skip


def test_a_change_of_one_field_changes_those_that_depend_on_it() -> None:
    rolling = Budget("a", "usd", 1_000_000, "rolling", window_s=18_000, tenant="acme")
    assert changed((rolling,), {"budgets.a.period": "day"}) == (
        replace(rolling, period="day", window_s=None),
    )
    same = {"budgets.a.window_s": 60, "budgets.a.period": "rolling"}
    assert changed((rolling,), same) == (replace(rolling, window_s=60),)
    (falling,) = changed((rolling,), {"budgets.a.fallback": "m"})
    assert falling == replace(rolling, at_end="fall_back", fallback="m")
    assert changed((falling,), {"budgets.a.fallback": "none"}) == (rolling,)
    assert changed((falling,), {"budgets.a.at_end": "refuse"}) == (rolling,)
    assert changed((rolling,), {"budgets.a.tenant": "none"}) == (replace(rolling, tenant=None),)
    named = replace(rolling, name="a.fallback")
    assert changed((rolling, named), {"budgets.a.fallback": "none"}) == (rolling,)


@pytest.mark.parametrize(
    "fields",
    [
        {"fallback": "m", "at_end": "pause"},
        {"at_end": "pause", "fallback": "m"},
        {"usd": 1, "tokens": 2},
        {"period": "day", "window_s": 60},
        {"usd": "none"},
    ],
)
def test_changes_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        changed((DAY,), {f"budgets.acme.{key}": value for key, value in fields.items()})


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"usd": 1, "perod": "day"}, "budgets.b.perod"),
        ({"usd": 1, "period": "fortnight"}, "budgets.b.period"),
        ({"usd": 1, "each": "tenant"}, "budgets.b.each"),
        ({"usd": 1, "each": ["team"]}, "budgets.b.each"),
        ({"usd": True}, "budgets.b.usd"),
        ({"usd": "much"}, "budgets.b.usd"),
        ({"usd": 1, "tokens": 2}, "budgets.b.amount"),
        ({"usd": 1, "at_end": "stop"}, "budgets.b.at_end"),
        ({"usd": 1, "tenant": 5}, "budgets.b.tenant"),
        ({"usd": 1, "zone": "Mars"}, "budgets.b.zone"),
    ],
)
def test_a_table_that_is_no_budget_names_its_field(table: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        budget_in("b", table)
    assert refused.value.variable == field


@pytest.mark.parametrize(("key", "value"), [("budgets.a.usdd", 1), ("budgets.a", "none")])
def test_a_change_that_is_none_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        changed((), {key: value})
    assert refused.value.variable == key


def test_a_call_that_no_budget_binds_is_decided_without_a_book() -> None:
    budgets = RehearsedBudgets((), NOON, lambda _arrival, _model: None)
    assert budgets.decide(Arrival(0.0), 0.0, spends=True) == ""
    assert budgets.uses == {}
