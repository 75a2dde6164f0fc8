"""What a call may cost at most is never below what it is charged, and says why it is unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.admission.charges import call_cost, charge_of
from tidegate.admission.estimator import Estimator, pieces_of_text
from tidegate.call import Usage, UsageDetails
from tidegate.prices.rates import Price, Rates

PRICE = Price(
    input=1.25, output=10, cached=0.125, cache_write=1.5625, cache_write_1h=2.5, output_audio=64
)
LONG = Price(input=1.25, output=10, above=1_000, long=Price(input=2.5, output=15))
ESTIMATE = Estimator().of_pieces("m", "text_only", pieces_of_text("Tell me"), max_output_tokens=9)


@given(
    taken=st.integers(0, 3_000),
    given_out=st.integers(0, 500),
    cached=st.integers(0, 3_000),
    written=st.integers(0, 3_000),
    audio=st.integers(0, 500),
    long=st.booleans(),
)
def test_no_usage_within_the_bounds_costs_more(
    taken: int, given_out: int, cached: int, written: int, audio: int, long: bool
) -> None:
    rates = Rates.of(LONG if long else PRICE)
    cost = call_cost(rates, ESTIMATE, input_bytes=taken, max_output_tokens=given_out, writes="1h")
    details = UsageDetails(written, cache_write_1h_tokens=written, output_audio_tokens=audio)
    usage = Usage(taken, given_out, cached_tokens=cached, details=details)
    charge = charge_of(rates, usage, None, whole=True)
    assert charge.cost_micros is not None
    assert cost.most_micros is not None
    assert cost.most_tokens is not None
    assert charge.cost_micros <= cost.most_micros
    assert charge.tokens <= cost.most_tokens


def test_pictures_that_are_drawn_alone_cost_their_number() -> None:
    rates = Rates.of(Price(input=5, image=0.04))
    cost = call_cost(rates, ESTIMATE, input_bytes=50, images=3, draws_alone=True)
    assert cost.most_micros == 3 * 40_000 + 100 * 5
    assert cost.most_tokens is None


def test_what_is_unseen_is_bounded_by_the_context_and_priced_as_its_dearest_part() -> None:
    rates = Rates.of(Price(input=1, output=2, input_audio=4))
    cost = call_cost(
        rates,
        ESTIMATE,
        input_bytes=9,
        context_tokens=1_000,
        unseen="its files",
        max_output_tokens=10,
    )
    assert (cost.most_micros, cost.most_tokens) == (4_020, 1_010)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "no max_tokens"),
        ({"max_output_tokens": 5, "unseen": "the tokens of its files are not known"}, "its files"),
        ({"max_output_tokens": 5, "images": 1}, "the number of pictures"),
        ({"max_output_tokens": 5, "unbounded": "it searches"}, "it searches"),
    ],
)
def test_a_cost_without_a_bound_says_why(changes: dict[str, object], why: str) -> None:
    values: dict[str, object] = {"input_bytes": 9, **changes}
    cost = call_cost(Rates.of(PRICE), ESTIMATE, **values)  # type: ignore[arg-type]
    assert (cost.most_micros, cost.most_tokens) == (None, None)
    assert why in cost.unknown
    assert cost.likely_micros > 0


def test_without_a_price_tokens_are_bounded_alone() -> None:
    cost = call_cost(None, ESTIMATE, input_bytes=9, max_output_tokens=5)
    assert (cost.most_micros, cost.most_tokens) == (None, 64)
    assert "price" in cost.unknown


def test_audio_that_costs_by_its_length_has_no_bound_beforehand() -> None:
    rates = Rates.of(Price(input=0.1, output=0.3, audio_minute=0.004))
    known = call_cost(rates, ESTIMATE, input_bytes=50, max_output_tokens=9)
    assert known.most_micros is not None
    unseen = call_cost(
        rates, ESTIMATE, input_bytes=50, context_tokens=9_000, unseen="files", max_output_tokens=9
    )
    assert unseen.most_micros is None
    assert "length of audio" in unseen.unknown
