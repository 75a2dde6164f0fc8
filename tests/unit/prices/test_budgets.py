"""Budgets as people state them: amounts, and what may be allowed more."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.prices.budgets import (
    Budget,
    Dimension,
    budget_alert,
    budget_of,
    check_same,
    extra_of,
    with_changes,
)

DAY = {"period": "day"}


@pytest.mark.parametrize("usd", ["1e14", "1e999", "1e99999999", "-1", "nan", "inf", "1000000001"])
def test_an_amount_out_of_range_is_refused_with_the_range(usd: str) -> None:
    for made in (lambda: budget_of("a", {"usd": usd, **DAY}), lambda: extra_of(usd, 0)):
        with pytest.raises(ConfigError) as refused:
            made()
        assert refused.value.value == usd
        assert refused.value.allowed == "an amount in USD from 0 to 1000000000"


def test_less_than_a_micro_dollar_is_refused_and_not_rounded_to_nothing() -> None:
    for made in (
        lambda: budget_of("a", {"usd": "0.0000001", **DAY}),
        lambda: extra_of("0.0000001", 0),
    ):
        with pytest.raises(ConfigError, match="whole micro-dollars"):
            made()
    assert extra_of("0.000001", 0) == (1, "usd")
    assert budget_of("a", {"usd": "1e9", **DAY}).amount == 10**15


def test_what_a_budget_does_not_bind_yet_is_named_as_people_say_it() -> None:
    before = Budget("a", "usd", 1, "day")
    with pytest.raises(ConfigError, match="tenant=acme: not set, as it is: remove"):
        check_same(before, replace(before, tenant="acme"))


@pytest.mark.parametrize("field", ["tenant", "key", "subject", "conversation", "model", "fallback"])
def test_an_empty_name_is_refused_since_a_budget_of_it_would_bind_nothing(field: str) -> None:
    """Such as of `--tenant "$TENANT"` where the variable is not set."""
    values = {"usd": "5", field: ""} | ({"at_end": "fall_back"} if field == "fallback" else {})
    with pytest.raises(ConfigError) as refused:
        with_changes(None, "cap", values)
    assert (refused.value.variable, refused.value.value) == (field, "")
    assert refused.value.allowed == "a name of one character or more"


@pytest.mark.parametrize(
    "zone", ["", "Mars/Olympus", "Europe", "/etc/localtime", "../UTC", "posix/UTC", "posixrules"]
)
def test_a_name_of_no_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(ConfigError, match="a time zone such as Europe/Berlin"):
        budget_of("a", {"usd": "1", "zone": zone, **DAY})


def test_a_time_zone_is_checked_without_opening_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are 600: that held the event loop for 17 ms."""
    opened = list[Any]()
    usual = builtins.open

    def spied(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(file)
        return usual(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", spied)
    assert budget_of("a", {"usd": "1", "zone": "Asia/Kathmandu", **DAY}).zone == "Asia/Kathmandu"
    assert len(opened) <= 3


def test_too_many_tokens_are_refused_with_the_range() -> None:
    with pytest.raises(ConfigError, match="a number from 0 to 1000000000000000"):
        budget_of("a", {"tokens": 10**15 + 1, **DAY})


def test_a_new_budget_is_of_a_month_and_keeps_its_period_until_another_is_given() -> None:
    new = with_changes(None, "all", {"usd": "3000"})
    assert (new.period, new.amount) == ("month", 3_000_000_000)
    of_a_week = with_changes(new, "all", {"period": "week"})
    assert (of_a_week.period, of_a_week.amount) == ("week", 3_000_000_000)
    assert with_changes(of_a_week, "all", {"usd": "5"}).period == "week"


@pytest.mark.parametrize(
    ("stated", "each"),
    [
        ({"each": ["subject"]}, ("tenant", "subject")),
        ({"each": ["key", "conversation"]}, ("tenant", "key", "conversation")),
        ({"each": ["subject", "tenant"]}, ("subject", "tenant")),
        ({"each": ["subject"], "tenant": "acme"}, ("subject",)),
        ({"each": ["subject"], "key": "k"}, ("subject",)),
        ({"each": ["key"]}, ("key",)),
    ],
)
def test_people_of_two_tenants_share_no_budget(
    stated: dict[str, object], each: tuple[Dimension, ...]
) -> None:
    new = budget_of("people", {"usd": 1, **DAY, **stated})
    assert new.each == each
    assert with_changes(new, "people", {"usd": 2}).each == each


def test_a_budget_of_people_of_all_tenants_that_is_there_stays_one() -> None:
    there = Budget("people", "usd", 10**6, "day", each=("subject",))
    assert with_changes(there, "people", {"usd": 2}).each == ("subject",)
    assert budget_of("people", {"usd": 2, **DAY, "each": ["subject"]}, there).each == ("subject",)


def test_an_alert_says_in_words_that_a_book_is_of_no_person() -> None:
    kept = {"budget": "people", "scope": '["acme", null]', "spent": 790_000, "amount": 2_000_000}
    alert = budget_alert("budget_share", kept | {"share": 30}, "usd", None)
    text = "Budget people of acme, none: $0.79 of $2.00 spent, which is 30 % or more."
    assert alert["text"] == text
    assert alert["scope"] == ["acme", None]


def test_an_alert_of_a_rejected_call_names_the_time_as_refusals_do() -> None:
    kept = {"budget": "day", "scope": "", "spent": 408, "amount": 600}
    until = {"reset_at": "2026-12-03T01:30:00-03:30"}
    alert = budget_alert("budget_out", kept | until, "tokens", None)
    assert alert["text"].endswith("no room for it. It resets at 2026-12-03 05:00 UTC.")
    assert alert["reset_at"] == until["reset_at"]


def test_an_alert_of_a_pause_names_the_command_that_ends_it() -> None:
    kept = {"budget": "people", "scope": '["acme", "ann lee"]', "spent": 99, "amount": 100}
    text = budget_alert("budget_paused", kept, "tokens", None)["text"]
    command = "tidegate budgets resume people --of acme --of 'ann lee'"
    assert text.endswith(f"; it is paused until a person resumes it: {command}")


def test_an_alert_of_a_budget_with_a_cheaper_model_reports_no_rejected_call() -> None:
    kept = {"budget": "day", "scope": "", "spent": 408, "amount": 600}
    text = budget_alert("budget_out", kept, "tokens", "cheap")["text"]
    assert text.endswith("spent; a call was moved to cheap, since there is no room for it.")
