"""What a 429 pauses, and for how long."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest

from tidegate.admission.demand import (
    LONGEST_MS,
    USUAL_RAMP_MS,
    LimitPause,
    Reach,
    model_limit,
    pause_after,
)
from tidegate.errors import LONGEST_OF_FAULT_MS, UpstreamThrottled
from tidegate.policy.format import of_plain

NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
HOUR_MS = 3_600_000
KIND, MODEL, TOTAL = "kind:text_only", "model:m", "pool:total"


def paused(
    error: UpstreamThrottled, *limits: str, now: datetime = NOON, zone: str | None = None
) -> LimitPause | None:
    tables = {"rpd:m": {"bound": 5, "zone": zone}} if zone else {}
    policy = of_plain({"limits": {**dict.fromkeys((KIND, *limits), 5), **tables}})
    asked = Reach(policy).limits("text_only", "m", "acme", 0)
    return pause_after(error, asked, "models/m", policy, now)


def throttled(
    unit: str | None = None, *, per_day: bool = False, day_quota: bool = False
) -> UpstreamThrottled:
    return UpstreamThrottled(
        "429", retry_after_ms=47_000, unit=unit, per_day=per_day, day_quota=day_quota
    )


@pytest.mark.parametrize(
    ("limits", "unit", "blamed"),
    [
        ((), None, MODEL),
        ((TOTAL, "rpm:total", "rpm:kind/text_only", "tenant:acme"), None, MODEL),
        ((TOTAL, MODEL), None, MODEL),
        ((MODEL, "rpm:m"), None, "rpm:m"),
        ((MODEL, "rpm:m", "itpm:m"), "requests", "rpm:m"),
        ((MODEL, "rpm:m", "itpm:m"), "tokens", MODEL),
        ((MODEL, "rpm:m", "tpm:m", "itpm:m"), "input_tokens", "itpm:m"),
        ((MODEL, "itpm:m", "tpm:m"), "output_tokens", "tpm:m"),
        ((MODEL, "rpm:m", "tpm:m"), "tokens", "tpm:m"),
        ((MODEL, "rpm:m"), "tokens", MODEL),
        (("rpm:m",), "tokens", MODEL),
        ((MODEL, "rpd:m"), "requests", MODEL),
        (("model:m2", "rpm:m2"), None, MODEL),
    ],
)
def test_the_limit_nearest_to_the_cause_is_paused(
    limits: tuple[str, ...], unit: str | None, blamed: str
) -> None:
    is_rate = blamed != MODEL
    ramp_ms = 60_000 if is_rate else USUAL_RAMP_MS
    assert paused(throttled(unit), *limits) == LimitPause(blamed, 47_000, ramp_ms, is_rate)


def test_a_day_that_is_used_up_is_over_at_midnight_where_its_quota_says() -> None:
    los_angeles = paused(throttled(day_quota=True), "rpm:m", "rpd:m")
    assert los_angeles == LimitPause("rpd:m", 19 * HOUR_MS, USUAL_RAMP_MS)
    berlin = paused(throttled(day_quota=True), zone="Europe/Berlin")
    assert berlin == LimitPause("rpd:m", 10 * HOUR_MS, USUAL_RAMP_MS)
    assert paused(throttled(day_quota=True), MODEL) == LimitPause(
        MODEL, 19 * HOUR_MS, USUAL_RAMP_MS
    )
    assert paused(throttled("tokens", day_quota=True), "rpd:m", "tpd:m") == LimitPause(
        "tpd:m", 19 * HOUR_MS, USUAL_RAMP_MS
    )


def test_a_limit_of_a_day_that_says_when_it_has_room_is_paused_until_then() -> None:
    found = paused(throttled("tokens", per_day=True), "tpm:m", "tpd:m", "rpd:m")
    assert found == LimitPause("tpd:m", 47_000, USUAL_RAMP_MS)
    assert paused(throttled("tokens", per_day=True), "tpm:m") == LimitPause(
        MODEL, 47_000, USUAL_RAMP_MS
    )


def test_a_day_on_which_the_clocks_change_is_as_long_as_it_is() -> None:
    # Midnight in Los Angeles at 08:00 UTC; on 2026-11-01 the day has 25 hours.
    start = datetime(2026, 11, 1, 7, 0, tzinfo=UTC)
    found = paused(throttled(day_quota=True), "rpd:m", now=start)
    assert found is not None
    assert found.for_ms == 25 * HOUR_MS


def test_a_pause_without_a_time_is_for_the_caller_to_measure() -> None:
    for error in (UpstreamThrottled("429"), UpstreamThrottled("429", retry_after_ms=0)):
        assert paused(error, MODEL) == LimitPause(MODEL, 0, 0)
        of_minute = LimitPause("rpm:m", 0, 60_000, of_rate=True, first_ms=2_000)
        assert paused(error, "rpm:m") == of_minute


def test_a_server_that_is_busy_for_hours_is_tried_within_the_minute() -> None:
    busy = UpstreamThrottled("busy", status=503, retry_after_ms=4 * HOUR_MS)
    found = paused(busy, MODEL)
    assert found is not None
    assert found.for_ms == LONGEST_OF_FAULT_MS


def test_after_a_pause_of_a_rate_calls_come_as_it_refills() -> None:
    """The told time is until one of them fits. An hour's would be too long to come back."""
    hour = {"bound": 5, "window_ms": HOUR_MS}
    for value, ramp_ms in (({"bound": 5, "window_ms": 10_000}, 10_000), (hour, 60_000)):
        policy = of_plain({"limits": {"rpm:m": value}})
        found = pause_after(throttled(), ("rpm:m",), "m", policy, NOON)
        assert found == LimitPause("rpm:m", 47_000, ramp_ms, of_rate=True)


def test_what_speaks_of_no_model_pauses_nothing() -> None:
    policy = of_plain({"limits": {KIND: 5}})
    assert pause_after(throttled(), (KIND,), "", policy, NOON) is None


def test_the_account_is_paused_where_the_provider_names_it() -> None:
    policy = of_plain({"limits": {KIND: 5, "rpm:m": 5}})
    found = pause_after(throttled(), (KIND, "rpm:m"), "m", policy, NOON, account="upstream:u")
    assert found == LimitPause("upstream:u", 47_000, USUAL_RAMP_MS)


@pytest.mark.parametrize("name", ["two words", "a|b", "{tag}", "\x00", "é", "x" * 10_000, "\ud800"])
def test_a_model_of_any_name_has_a_limit_that_fits_into_the_record(name: str) -> None:
    limit = model_limit(f"models/{name}")
    assert re.fullmatch(r"model:~[0-9a-f]{16}", limit)
    assert limit == model_limit(name)
    assert model_limit("models/gemini-2.5-flash") == "model:gemini-2.5-flash"


def test_no_answer_can_pause_for_longer_than_it_could_mean() -> None:
    found = paused(UpstreamThrottled("429", retry_after_ms=86_400_000), "rpm:m")
    assert found == LimitPause("rpm:m", LONGEST_MS, 60_000, of_rate=True)
    short = paused(UpstreamThrottled("429", retry_after_ms=800), MODEL)
    assert short == LimitPause(MODEL, 800, 800)
