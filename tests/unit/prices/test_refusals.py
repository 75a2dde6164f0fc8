"""What a caller is told when a budget has no room for its call."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tidegate.prices.budgets import Binding, Budget, Refusal, refused_by

DAY = Budget("day", "tokens", 100, "day")
NOW = datetime(2026, 12, 2, 8, 57, tzinfo=UTC)
MIDNIGHT = NOW + timedelta(hours=5)


@pytest.mark.parametrize(
    ("need", "amount", "when"),
    [
        (60, 100, f"it resets at {MIDNIGHT:%Y-%m-%d %H:%M} UTC"),
        (188, 100, "it needs more than a whole period allows"),
        (
            188,
            150,
            "it needs more than a whole period allows",
        ),  # a person allowed 50 more of this one
    ],
)
def test_a_time_is_only_named_where_the_next_period_has_room_for_the_call(
    need: int, amount: int, when: str
) -> None:
    book = Refusal(Binding(DAY, ""), "spent", amount, 50, 0, MIDNIGHT, 0.0)
    refusal = refused_by(book, need, NOW)
    assert refusal.message.endswith(f"up to {need} tokens needed; {when}")
    assert refusal.retry_after_ms == (None if need > DAY.amount else 5 * 3_600_000)


def test_a_rolling_budget_names_the_second_at_which_it_has_room() -> None:
    """A minute would be over by then, if the window is one of seconds."""
    short = Budget("short", "tokens", 100, "rolling", window_s=30, zone="Asia/Kolkata")
    for at, text in (
        (datetime(2026, 12, 2, 8, 57, 20, 1, UTC), "2026-12-02 14:27:21"),
        (datetime(2026, 12, 2, 8, 57, 59, 500_000, UTC), "2026-12-02 14:28"),
    ):
        book = Refusal(Binding(short, ""), "spent", 100, 50, 0, at, 0.0)
        when = f"it has room again at {text} Asia/Kolkata"
        assert refused_by(book, 60, NOW).message.endswith(f"needed; {when}")


def test_before_it_is_known_what_a_call_takes_the_budget_has_nothing_left() -> None:
    book = Refusal(Binding(DAY, ""), "spent", 100, 104, 0, MIDNIGHT, 0.0)
    refusal = refused_by(book, None, NOW)
    at = f"{MIDNIGHT:%Y-%m-%d %H:%M} UTC"
    said = f"the budget day has nothing left: 104 tokens of 100 tokens spent; it resets at {at}"
    assert refusal.message == said
    assert refusal.retry_after_ms == 5 * 3_600_000


def test_what_a_call_needs_is_rounded_up_to_cents() -> None:
    """Rounded down, $0.020011 of $0.02 would fit, as it is written."""
    day = Budget("day", "usd", 20_000, "day")
    for need, shown in ((20_011, "$0.03"), (30_000, "$0.03"), (9_999, "$0.009999")):
        book = Refusal(Binding(day, ""), "spent", 20_000, 19_000, 0, None, 0.0)
        assert f"up to {shown} needed" in refused_by(book, need, NOW).message
