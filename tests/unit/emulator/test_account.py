"""Accounts that count as each provider does, on a clock moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.emulator.account import (
    AccountCharge,
    AccountLimitReached,
    AccountSpec,
    ProviderAccount,
)
from tidegate.emulator.counting import CallSize

SECOND = 10**9
START = 1_800_000_000 * SECOND


class Clock:
    def __init__(self) -> None:
        self.now_ns = START

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND)


def opened(clock: Clock, **fields: Any) -> ProviderAccount:
    spec = AccountSpec.parse(fields)
    assert spec is not None
    return ProviderAccount(spec, clock)


def limit(unit: str, bound: int, **more: Any) -> dict[str, Any]:
    return {"unit": unit, "bound": bound, **more}


def admitted(account: ProviderAccount, model: str, size: CallSize) -> AccountCharge | None:
    try:
        return account.admit(model, size)
    except AccountLimitReached:
        return None


def book(account: ProviderAccount, unit: str) -> dict[str, Any]:
    return next(item for item in account.to_json()["limits"] if item["unit"] == unit)


def remaining(account: ProviderAccount, unit: str, model: str = "m") -> int:
    return next(view.remaining for view in account.views(model) if view.limit.unit == unit)


def test_openai_counts_the_greater_of_bound_and_input_and_gives_nothing_back() -> None:
    account = opened(Clock(), provider="openai", limits=[limit("tokens", 10_000)])
    charge = account.admit("m", CallSize(100, most_output=4_000, choices=2))
    account.made(charge, 10)
    account.end(charge, answered=True)
    assert remaining(account, "tokens") == 2_000
    charge = account.admit("m", CallSize(1_500, most_output=10))
    account.end(charge, answered=True)
    assert remaining(account, "tokens") == 500


def test_openai_as_recorded_counts_the_input_alone() -> None:
    tokens = limit("tokens", 10_000, reserve="input")
    account = opened(Clock(), provider="openai", limits=[tokens])
    account.end(account.admit("m", CallSize(100, most_output=4_000)), answered=True)
    assert remaining(account, "tokens") == 9_900


def test_anthropic_counts_no_cache_reads_and_output_as_it_is_made() -> None:
    limits = [limit("uncached_input_tokens", 1_000), limit("output_tokens", 100)]
    account = opened(Clock(), provider="anthropic", limits=limits)
    charge = account.admit("m", CallSize(100, 8_900, 50, most_output=64_000))
    assert remaining(account, "uncached_input_tokens") == 850
    assert remaining(account, "output_tokens") == 100
    account.made(charge, 40)
    assert remaining(account, "output_tokens") == 60
    account.made(charge, 130)
    assert remaining(account, "output_tokens") == 0
    assert admitted(account, "m", CallSize(1)) is None
    assert book(account, "output_tokens")["counted"] == 130
    assert book(account, "uncached_input_tokens")["counted"] == 150


def test_an_anthropic_class_is_one_limit_for_all_its_models() -> None:
    account = opened(
        Clock(), provider="anthropic", limits=[limit("requests", 2, models="claude-opus-4*")]
    )
    for model in ("claude-opus-4-1", "claude-opus-4-6"):
        account.admit(model, CallSize(1))
    assert admitted(account, "claude-opus-4-5", CallSize(1)) is None
    assert admitted(account, "claude-sonnet-4-5", CallSize(1)) is not None


def test_an_anthropic_minute_may_be_checked_by_the_second() -> None:
    clock = Clock()
    account = opened(clock, provider="anthropic", limits=[limit("requests", 60, pace_s=1)])
    account.admit("m", CallSize(1))
    with pytest.raises(AccountLimitReached) as refused:
        account.admit("m", CallSize(1))
    assert refused.value.refusal.wait_ns == SECOND
    clock.pass_s(1)
    account.admit("m", CallSize(1))


def test_bedrock_reserves_the_bound_and_settles_output_five_times() -> None:
    account = opened(Clock(), provider="bedrock", limits=[limit("tokens", 10_000)])
    size = CallSize(1_000, 5_000, 500, most_output=4_000)
    charge = account.admit("m", size)
    assert remaining(account, "tokens") == 4_500
    account.made(charge, 100)
    assert remaining(account, "tokens") == 4_500
    account.end(charge, answered=True)
    assert remaining(account, "tokens") == 10_000 - 1_500 - 500


def test_gemini_counts_input_by_the_clocks_minute_and_days_of_california() -> None:
    clock = Clock()
    clock.pass_s(30)
    limits = [limit("input_tokens", 100), limit("requests", 3, window_s=86_400)]
    account = opened(clock, provider="gemini", limits=limits)
    account.end(account.admit("m", CallSize(90, most_output=500)), answered=True)
    assert admitted(account, "m", CallSize(20)) is None
    clock.pass_s(29.9)
    assert admitted(account, "m", CallSize(20)) is None
    clock.pass_s(0.1)
    assert admitted(account, "m", CallSize(100)) is not None
    day = book(account, "requests")
    assert (day["mode"], day["remaining"]) == ("calendar_day", 1)


def test_azure_counts_requests_by_ten_seconds() -> None:
    clock = Clock()
    account = opened(clock, provider="azure", limits=[limit("requests", 2)])
    assert [admitted(account, "m", CallSize(1)) is None for _ in range(3)] == [False, False, True]
    clock.pass_s(10)
    assert admitted(account, "m", CallSize(1)) is not None


def test_groq_counts_no_cached_tokens() -> None:
    account = opened(Clock(), provider="groq", limits=[limit("tokens", 1_000)])
    charge = account.admit("m", CallSize(100, 5_000, most_output=9_000))
    account.made(charge, 50)
    account.end(charge, answered=True)
    assert remaining(account, "tokens") == 850


def test_a_refused_call_spends_nothing_of_any_limit() -> None:
    limits = [limit("requests", 10), limit("uncached_input_tokens", 100)]
    account = opened(Clock(), provider="anthropic", limits=limits)
    account.admit("m", CallSize(90))
    assert admitted(account, "m", CallSize(20)) is None
    assert remaining(account, "requests") == 9
    assert book(account, "uncached_input_tokens")["refused"] == 1
    assert account.to_json()["refused_calls"] == [2]


def test_a_refused_call_spends_a_request_where_the_provider_counts_those() -> None:
    limits = [limit("requests", 3), limit("tokens", 100)]
    account = opened(Clock(), provider="openai", limits=limits)
    account.admit("m", CallSize(90))
    assert [admitted(account, "m", CallSize(20)) for _ in range(4)] == [None] * 4
    assert remaining(account, "requests") == 0
    assert remaining(account, "tokens") == 10


@pytest.mark.parametrize(("provider", "left"), [("openai", 9), ("anthropic", 10)])
def test_a_call_without_an_answer_counts_as_the_provider_counts_failures(
    provider: str, left: int
) -> None:
    account = opened(Clock(), provider=provider, limits=[limit("requests", 10)])
    account.end(account.admit("m", CallSize(5)), answered=False)
    assert remaining(account, "requests") == left


def test_a_request_above_the_bound_is_too_large_for_ever() -> None:
    account = opened(Clock(), provider="openai", limits=[limit("tokens", 100)])
    with pytest.raises(AccountLimitReached) as refused:
        account.admit("m", CallSize(101))
    assert refused.value.refusal.reason == "too_large"
    assert refused.value.refusal.wait_ns == 0


def test_too_fast_a_rise_is_refused_within_the_limits() -> None:
    clock = Clock()
    growth = {"start": 10, "percent": 50, "per_s": 60}
    account = opened(clock, provider="openai", limits=[limit("requests", 1_000, growth=growth)])
    counts = []
    for _ in range(3):
        counts.append(sum(admitted(account, "m", CallSize(1)) is not None for _ in range(40)))
        clock.pass_s(61)
    assert counts == [10, 15, 22]


def test_what_another_consumer_takes_of_a_minute_it_takes_of_the_day() -> None:
    clock = Clock()
    limits = [limit("requests", 14_400, window_s=86_400), limit("requests", 30)]
    account = opened(clock, provider="groq", limits=limits, others_share=0.5)
    for _ in range(10):
        clock.pass_s(60)
        day, minute = account.to_json()["limits"]
    assert day["others"] == minute["others"] == pytest.approx(150, abs=1)
    refilled = 9 * 10  # in the first minute it was full
    assert day["remaining"] == 14_400 - day["others"] + refilled


def test_another_consumer_takes_its_share_and_what_remains_shows_it() -> None:
    clock = Clock()
    account = opened(clock, provider="anthropic", limits=[limit("requests", 600)], others_share=0.3)
    admits = 0
    for _ in range(2 * 600):
        admits += admitted(account, "m", CallSize(1)) is not None
        clock.pass_s(0.1)
    counted = book(account, "requests")
    # Two minutes of refill, and the burst of a full bucket at first.
    assert counted["others"] == pytest.approx(360, abs=2)
    assert admits == counted["counted"]
    assert admits + counted["others"] + counted["remaining"] == pytest.approx(1_800, abs=2)
    account.change(account.spec.changed({"others_share": 0}))
    clock.pass_s(60)
    assert book(account, "requests")["others"] == counted["others"]


def test_a_new_tier_keeps_what_is_used() -> None:
    account = opened(Clock(), provider="anthropic", limits=[limit("requests", 10)])
    account.admit("m", CallSize(1))
    assert account.change(account.spec.changed({"tier": 2}))
    assert remaining(account, "requests") == 19
    assert account.change(account.spec.changed({"tier": 0.5}))
    assert remaining(account, "requests") == 4
    assert not account.change(account.spec.changed({"limits": [limit("requests", 5)]}))


def test_a_scaled_clock_passes_its_minute_sooner() -> None:
    clock = Clock()
    account = opened(clock, provider="gemini", limits=[limit("requests", 1)], clock_scale=60)
    account.admit("m", CallSize(1))
    assert admitted(account, "m", CallSize(1)) is None
    clock.pass_s(1)
    assert admitted(account, "m", CallSize(1)) is not None


def test_a_conversation_reads_its_beginning_from_the_cache() -> None:
    clock = Clock()
    account = opened(clock, provider="anthropic", cache="prefix", cache_min_tokens=100)
    texts = ["system" * 100, "question" * 10]
    assert account.cached_tokens("m", texts, 170) == 0
    account.keep_prompt("m", texts)
    longer = [*texts, "answer", "next question"]
    assert account.cached_tokens("m", longer, 180) == 170
    assert account.cached_tokens("other", longer, 180) == 0
    assert account.cached_tokens("m", ["other", *texts], 180) == 0
    assert account.cached_tokens("m", [texts[0], "else"], 180) == 150
    clock.pass_s(301)
    assert account.cached_tokens("m", longer, 180) == 0


def test_short_prompts_are_not_cached() -> None:
    account = opened(Clock(), provider="openai", cache="prefix")
    account.keep_prompt("m", ["short"])
    assert account.cached_tokens("m", ["short"], 2) == 0


CALLS = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.integers(0, 60),
        st.integers(0, 60),
        st.one_of(st.none(), st.integers(1, 60)),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=60,
)


@given(
    mode=st.sampled_from(["fixed_window", "sliding_window", "token_bucket"]),
    reserve=st.sampled_from(["input", "max", "sum"]),
    calls=CALLS,
    others=st.sampled_from([0, 0.3]),
)
def test_no_window_has_more_than_its_bound_reserved(
    mode: str, reserve: str, calls: list[Any], others: float
) -> None:
    """As each way of counting defines its window; a bucket gives its refill beside its bound."""
    clock = Clock()
    tokens = limit("tokens", 100, mode=mode, reserve=reserve, settle="never")
    account = opened(clock, provider="openai", limits=[tokens], others_share=others)
    rule = account.spec.limits[0].rule
    taken: list[tuple[int, int]] = []
    for gap_s, uncached, cached, most, output in calls:
        clock.pass_s(gap_s)
        size = CallSize(uncached, cached, most_output=most)
        charge = admitted(account, "m", size)
        if charge is not None:
            taken.append((clock.now_ns, rule.at_start(size)))
            account.made(charge, output)
            account.end(charge, answered=True)
    minute = 60 * SECOND
    for first, (start_ns, _) in enumerate(taken):
        spent = 0
        for at_ns, amount in taken[first:]:
            spent += amount
            passed_ns = at_ns - start_ns
            if mode == "token_bucket":
                assert spent * minute <= 100 * (minute + passed_ns)
            elif passed_ns < minute:
                same = mode == "sliding_window" or at_ns // minute == start_ns // minute
                assert not same or spent <= 100


@given(calls=CALLS, refused_counts=st.booleans())
def test_the_book_is_the_sum_of_what_its_calls_count(
    calls: list[Any], refused_counts: bool
) -> None:
    clock = Clock()
    limits = [limit("tokens", 150), limit("requests", 1_000)]
    account = opened(clock, provider="bedrock", limits=limits, counts_failed=refused_counts)
    expected = refused = 0
    for gap_s, uncached, cached, most, output in calls:
        clock.pass_s(gap_s)
        size = CallSize(uncached, cached, most_output=most)
        charge = admitted(account, "m", size)
        if charge is None:
            refused += 1
            continue
        account.made(charge, output)
        account.end(charge, answered=True)
        expected += uncached + 5 * output
    counted = book(account, "tokens")
    assert counted["counted"] == expected
    assert counted["refused"] == refused
    requests = book(account, "requests")["counted"]
    assert requests == len(calls) - (0 if refused_counts else refused)
