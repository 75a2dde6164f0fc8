"""Comparison of a day: what explains a difference, and what it corrects."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.prices.rates import Price, Rates
from tidegate.prices.reconciliation import (
    DoubtfulCall,
    ModelDay,
    ModelFinding,
    UsageSum,
    compared,
)

RATES = Rates.of(Price(input=1, output=10, cached=0.1))
# Ten whole answers: 1,000 of input, 100 of it cached, 200 of output.
TOLD = UsageSum(10, 1_000, 100, 0, 200, 0, 900 + 10 + 2_000)
ID = UUID(int=1)


def one(ours: ModelDay, theirs: UsageSum, *, name: str = "m", rates: Rates | None = RATES) -> (
    ModelFinding
):  # fmt: skip
    (finding,) = compared({name: ours}, {"m": theirs}, {"m": rates})
    return finding


def test_a_day_of_whole_answers_is_equal() -> None:
    finding = one(ModelDay(TOLD), TOLD)
    assert (finding.verdict, finding.difference_micros, finding.reason) == ("equal", 0, "")


@pytest.mark.parametrize("by", [-5, 5])
def test_rounding_of_each_call_explains_half_a_micro_dollar_of_it(by: int) -> None:
    rounded = UsageSum(10, 1_000, 100, 0, 200, 0, TOLD.cost_micros + by)
    assert one(ModelDay(TOLD), rounded).verdict == "explained"
    more = UsageSum(10, 1_000, 100, 0, 200, 0, TOLD.cost_micros + 6)
    finding = one(ModelDay(TOLD), more)
    assert finding.verdict == "unexplained"
    assert "the price in force is not the provider's" in finding.reason


def test_a_cut_call_explains_what_is_left_and_is_corrected_exactly() -> None:
    cut = DoubtfulCall(ID, "partial", 90, 5, 140, weight=140)
    theirs = TOLD.plus(UsageSum(1, 100, 0, 0, 30, 0, 400))
    finding = one(ModelDay(TOLD, (cut,)), theirs)
    assert finding.verdict == "explained"
    assert finding.difference_micros == 400 - 140
    (correction,) = finding.corrections
    assert (correction.call.request_id, correction.cost_micros) == (ID, 400)
    assert correction.delta_micros == 260


def test_an_estimated_call_that_the_provider_does_not_count_costs_nothing() -> None:
    never = DoubtfulCall(ID, "estimated", 90, 0, 90, weight=90)
    finding = one(ModelDay(TOLD, (never,)), TOLD)
    assert finding.verdict == "explained"
    assert [each.cost_micros for each in finding.corrections] == [0]


def test_what_was_corrected_is_equal_from_then_on() -> None:
    cut = DoubtfulCall(ID, "partial", 90, 5, 400, weight=400)
    finding = one(ModelDay(TOLD, (cut,)), TOLD.plus(UsageSum(1, 100, 0, 0, 30, 0, 400)))
    assert (finding.verdict, finding.corrections) == ("equal", ())


def test_requests_of_others_are_not_laid_at_the_door_of_a_doubtful_call() -> None:
    cut = DoubtfulCall(ID, "partial", 90, 5, 140)
    finding = one(ModelDay(TOLD, (cut,)), TOLD.plus(UsageSum(3, 300, 0, 0, 90, 0, 1_200)))
    assert (finding.verdict, finding.corrections) == ("unexplained", ())
    assert "2 requests" in finding.reason
    alone = one(ModelDay(TOLD), TOLD.plus(UsageSum(2, 300, 0, 0, 90, 0, 1_200)))
    assert "the provider counts 2 requests of calls that are not on record" in alone.reason


def test_a_call_has_no_more_tokens_than_its_model_takes_where_requests_are_not_counted() -> None:
    """Anthropic's report has no requests: what others use there is no cut call's."""
    cut = DoubtfulCall(ID, "partial", 90, 5, 140, weight=140)
    for tokens, verdict in ((900, "explained"), (901, "unexplained")):
        theirs = TOLD.plus(UsageSum(None, tokens, 0, 0, 100, 0, tokens + 1_000))
        (finding,) = compared(
            {"m": ModelDay(TOLD, (cut,))}, {"m": theirs}, {"m": RATES}, {"m": 1_000}
        )
        assert finding.verdict == verdict
        assert ("1001 tokens" in finding.reason) is (verdict == "unexplained")


def test_a_wrong_price_is_no_fault_of_a_doubtful_call() -> None:
    cut = DoubtfulCall(ID, "partial", 90, 5, 140)
    dear = TOLD.plus(UsageSum(1, 100, 0, 0, 30, 0, 4_000))
    finding = one(ModelDay(TOLD, (cut,)), dear)
    assert (finding.verdict, finding.corrections) == ("unexplained", ())


@pytest.mark.parametrize(
    ("micros", "verdict"),
    [(400, "explained"), (600, "explained"), (800, "explained"), (300, "unexplained"),
     (5_000, "unexplained"), (-100, "unexplained")],
)  # fmt: skip
def test_a_price_for_long_inputs_bounds_what_a_doubtful_call_cost(
    micros: int, verdict: str
) -> None:
    """A sum does not say which of its inputs were long: they all were, or none."""
    long = Price(input=1, output=10, above=50, long=Price(input=2, output=20))
    cut = DoubtfulCall(ID, "partial", 90, 5, 140, weight=140)
    theirs = TOLD.plus(UsageSum(1, 100, 0, 0, 30, 0, micros))
    finding = one(ModelDay(TOLD, (cut,)), theirs, rates=Rates.of(long))
    assert finding.verdict == verdict
    assert bool(finding.corrections) is (verdict == "explained")


def test_a_cut_call_may_have_written_to_a_cache_for_an_hour() -> None:
    rates = Rates.of(Price(input=1, output=10, cache_write=1.25, cache_write_1h=2))
    cut = DoubtfulCall(ID, "partial", 90, 5, 140, weight=140)
    for micros, verdict in ((325, "explained"), (400, "explained"), (500, "unexplained")):
        theirs = TOLD.plus(UsageSum(1, 100, 0, 100, 20, 0, micros))
        assert one(ModelDay(TOLD, (cut,)), theirs, rates=rates).verdict == verdict


@pytest.mark.parametrize(
    ("micros", "verdict"), [(80_000, "equal"), (80_001, "explained"), (90_000, "unexplained")]
)
def test_of_a_model_that_is_counted_nowhere_the_cost_alone_is_compared(
    micros: int, verdict: str
) -> None:
    """OpenAI counts pictures and speech elsewhere, and in other units."""
    theirs = UsageSum(requests=None, cost_micros=micros, is_counted=False)
    drawn = UsageSum(2, 20, 0, 0, 8_000, 0, 80_000)
    finding = one(ModelDay(drawn), theirs)
    assert (finding.verdict, finding.corrections) == (verdict, ())
    if verdict == "unexplained":
        assert (
            finding.reason
            == "the provider reports only a cost, which differs from that of the calls"
        )
    cut = DoubtfulCall(ID, "unknown")
    assert one(ModelDay(drawn, (cut,)), theirs).corrections == ()


def test_fewer_tokens_than_answers_had_are_unexplained() -> None:
    finding = one(ModelDay(TOLD), UsageSum(9, 900, 100, 0, 200, 0, 2_800))
    assert finding.verdict == "unexplained"
    assert "fewer input tokens" in finding.reason


def test_a_model_without_a_price_says_so() -> None:
    finding = one(ModelDay(UsageSum(2, 10, 0, 0, 5), unpriced=2), UsageSum(2, 10, 0, 0, 5, 0, 60))
    assert "no price is known" in finding.reason


def test_a_call_without_an_answer_is_counted_with_the_dated_version_of_its_model() -> None:
    cut = DoubtfulCall(ID, "estimated", 100, 0, 100)
    ours = {"gpt": ModelDay(doubtful=(cut,)), "gpt-2026-01-01": ModelDay(TOLD)}
    theirs = {"gpt-2026-01-01": TOLD.plus(UsageSum(1, 100, 0, 0, 2, 0, 120))}
    (finding,) = compared(ours, theirs, {"gpt-2026-01-01": RATES})
    assert (finding.model, finding.verdict) == ("gpt-2026-01-01", "explained")


@pytest.mark.parametrize(
    ("model", "dated", "other"),
    [
        ("gpt-5", "gpt-5-2025-08-07", "gpt-5-mini-2025-08-07"),
        ("claude-sonnet-4", "claude-sonnet-4-20250514", "claude-sonnet-4-5-20250929"),
        ("gpt-3.5-turbo", "gpt-3.5-turbo-0125", "gpt-3.5-turbo-16k"),
    ],
)
def test_a_model_whose_name_goes_on_is_no_version_of_another(
    model: str, dated: str, other: str
) -> None:
    cut = DoubtfulCall(ID, "estimated", 100, 0, 100)
    ours = {model: ModelDay(doubtful=(cut,)), dated: ModelDay(TOLD), other: ModelDay(TOLD)}
    theirs = {dated: TOLD.plus(UsageSum(1, 100, 0, 0, 2, 0, 120)), other: TOLD}
    first, second = compared(ours, theirs, {dated: RATES, other: RATES})
    assert (first.model, first.verdict, second.verdict) == (dated, "explained", "equal")
    assert [each.cost_micros for each in first.corrections] == [120]


@pytest.mark.parametrize("requests", [1, None])
def test_what_the_provider_may_count_by_another_name_is_not_corrected_to_nothing(
    requests: int | None,
) -> None:
    """An alias that has two dated versions, or another name than they have."""
    cut = DoubtfulCall(ID, "estimated", 100, 0, 100)
    more = UsageSum(requests, 100, 0, 0, 2, 0, 120)
    for theirs in (
        {"gpt-2026-01-01": TOLD.plus(more), "gpt-2026-02-01": TOLD},
        {"terra": TOLD, "luna": more},
    ):
        ours = {"gpt": ModelDay(doubtful=(cut,)), **dict.fromkeys(theirs, ModelDay(TOLD))}
        first, *_ = compared(ours | {"luna": ModelDay()}, theirs, {})
        assert (first.model, first.verdict, first.corrections) == ("gpt", "unexplained", ())
    # Where all that the provider counts is of calls on record, it has never counted this one.
    ours = {"gpt": ModelDay(doubtful=(cut,)), "x": ModelDay(TOLD)}
    first, second = compared(ours, {"x": TOLD}, {})
    assert [each.cost_micros for each in first.corrections] == [0]
    assert second.verdict == "equal"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"x": ModelDay(TOLD)}, {}),
        # The usage is there and the costs are not.
        ({"x": ModelDay(TOLD)}, {"x": UsageSum(10, 1_000, 100, 0, 200, 0, 0)}),
    ],
)
def test_figures_that_are_not_complete_yet_correct_no_call_to_nothing(
    ours: dict[str, ModelDay], theirs: dict[str, UsageSum]
) -> None:
    spoken = {"tts": ModelDay(doubtful=(DoubtfulCall(ID, "estimated", 18, 80, 900),))}
    first, *_ = compared(spoken | ours, theirs, {"x": RATES})
    assert (first.model, first.verdict, first.corrections) == ("tts", "unexplained", ())
    assert "may be incomplete" in first.reason


def test_both_sides_models_are_compared() -> None:
    findings = compared({"a": ModelDay(TOLD)}, {"b": TOLD}, {})
    assert [(each.model, each.verdict) for each in findings] == [
        ("a", "unexplained"),
        ("b", "unexplained"),
    ]


calls = st.lists(
    st.tuples(st.integers(0, 5_000), st.sampled_from(["partial", "estimated", "unknown"])),
    min_size=1,
    max_size=8,
)


@given(calls, st.integers(0, 10_000), st.integers(0, 10_000))
def test_after_the_corrections_both_sides_are_equal_to_the_micro_dollar(
    made: list[tuple[int, str]], taken: int, given_: int
) -> None:
    doubtful = tuple(
        DoubtfulCall(uuid4(), state, cost_micros=None if state == "unknown" else cost, weight=cost)
        for cost, state in made
    )
    ours = ModelDay(TOLD, doubtful)
    left = UsageSum(len(doubtful), taken, 0, 0, given_, 0, taken + 10 * given_)
    finding = one(ours, TOLD.plus(left))
    assert finding.verdict in ("equal", "explained")
    corrected = ours.cost_micros + sum(each.delta_micros for each in finding.corrections)
    assert corrected == TOLD.cost_micros + left.cost_micros
    assert all(each.cost_micros >= 0 for each in finding.corrections)
