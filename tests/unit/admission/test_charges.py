"""What calls cost: sums that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime

import pytest

from tidegate.admission.charges import (
    Prices,
    answer_charge,
    call_cost,
    charge_of,
    cut_charge,
    estimated_charge,
    is_complete,
    listed_prices,
    received_tokens,
)
from tidegate.admission.estimator import Estimator, Modality, pieces_of_text
from tidegate.call import Answer, Usage, UsageDetails, UsageState
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import PeakHours, Price, Rates, cost_micros

CLAUDE = Price(input=4, output=20, cached=0.4, cache_write=5, cache_write_1h=8)
VOICES = Price(input=1, output=2, input_audio=10, output_audio=20)
SIGHTS = Price(input=1, output=2, input_image=5, output_image=40)
SPEECH = Price(input=0.1, output=0.3, audio_minute=0.004)
FLASH = Price(input=0.30, output=2.50, cached=0.075)
PICTURES = Price(input=0.30, output=2.50, image=0.039)
WHISPER = Price(audio_minute=0.006)


@pytest.mark.parametrize(
    ("price", "usage", "images", "micros"),
    [
        (FLASH, Usage(1_000_000, 0), None, 300_000),
        (FLASH, Usage(0, 1_000_000), None, 2_500_000),
        # 60 fresh at 0.3, 40 cached at 0.075, 10 of output with 5 of thoughts at 2.5
        (FLASH, Usage(100, 10, 5, 40, 155), None, 18 + 3 + 38),  # 37.5
        (Price(input=0.30, output=2.50), Usage(100, 10, None, 40), None, 30 + 25),  # as input
        (Price(input=0.1, output=0.4), Usage(1, 0), None, 0),  # a tenth of a millionth
        (Price(input=0.1, output=0.4), Usage(5, 0), None, 1),  # a half: up
        (Price(input=0.1, output=0.4), Usage(3, 1), None, 1),  # 0.3 + 0.4: rounded once
        (PICTURES, Usage(10, 2_580), 2, 3 + 78_000),  # its tokens are the pictures
        (PICTURES, Usage(10, 2_580, 4), 2, 3 + 10 + 78_000),
        (FLASH, Usage(10, 1_290), 1, 3 + 3_225),  # no price a picture: as output
        (FLASH, Usage(10, None, None, None, 30), None, 3 + 50),  # the output from the total
        (FLASH, Usage(10, None), None, None),
        (FLASH, Usage(), None, None),
        (Price(input=0.3), Usage(10, 0), None, 3),  # what was not used needs no price
        (Price(input=0.3), Usage(10, 1), None, None),
        # 10 fresh, 20 cached, 30 written for 5 minutes, 40 for an hour
        (CLAUDE, Usage(100, 0, None, 20, 100, UsageDetails(70, 30, 40)), None, 40 + 8 + 150 + 320),
        (CLAUDE, Usage(100, 0, None, 20, 100, UsageDetails(70)), None, 40 + 8 + 350),
        (Price(input=4, output=20, cache_write=5), Usage(70, 0, details=UsageDetails(70, 30, 40)),
         None, 350),  # an hour as 5 minutes
        (FLASH, Usage(100, 10, 5, 40, 155, UsageDetails(60)), None, 18 + 3 + 38),  # as input
        (VOICES, Usage(100, 10, 5, None, 115, UsageDetails(
            input_audio_tokens=60, output_audio_tokens=8)), None, 40 + 600 + 10 + 4 + 160),
        (SIGHTS, Usage(100, 50, details=UsageDetails(
            input_image_tokens=60, output_image_tokens=45)), None, 40 + 300 + 10 + 1_800),
        # 90 seconds of audio, whose tokens cost nothing; these alone, where no length is told
        (SPEECH, Usage(2_000, 10, details=UsageDetails(
            input_audio_tokens=1_900, input_audio_seconds=90)), None, 10 + 6_000 + 3),
        (SPEECH, Usage(2_000, 10, details=UsageDetails(input_audio_tokens=1_900)), None, 200 + 3),
        (FLASH, Usage(10, 0, details=UsageDetails(searches=1, file_searches=2)), None, 3),  # ours
        (Price(input=1, output=1, search=10, file_search=2.5), Usage(10, 0, details=UsageDetails(
            searches=1, file_searches=2)), None, 10 + 10_000 + 5_000),
        # what is charged by the minute, by characters or by searches has no tokens to count
        (WHISPER, Usage(details=UsageDetails(input_audio_seconds=7)), None, 700),
        (WHISPER, Usage(10, 10, details=UsageDetails(input_audio_seconds=7)), None, 700),
        (WHISPER, Usage(10, 10), None, None),
        (Price(characters=15), Usage(details=UsageDetails(input_characters=1_001)), None, 15_015),
        (Price(search=2), Usage(details=UsageDetails(searches=3)), None, 6_000),
        (Price(image=0.04), Usage(10, 2_580), 2, 80_000),  # by its pictures alone
        (Price(image=0.04), Usage(10, 2_580, details=UsageDetails(searches=1)), 2, 80_000),
        (Price(image=0.04), Usage(10, 2_580), None, None),
        (Price(), Usage(details=UsageDetails(searches=3, input_audio_seconds=7)), None, None),
        (FLASH, Usage(details=UsageDetails(input_audio_seconds=7)), None, None),
        # a price for each picture stands for its tokens
        (PICTURES, Usage(10, 2_580, details=UsageDetails(output_image_tokens=2_580)), 2,
         3 + 78_000),
    ],
)  # fmt: skip
def test_costs(price: Price, usage: Usage, images: int | None, micros: int | None) -> None:
    assert cost_micros(Rates.of(price), usage, images) == micros


@pytest.mark.parametrize("many", [0, 1, 50, 100, 101, 10**12])
def test_no_part_makes_a_call_cheaper_than_it_is_without_it(many: int) -> None:
    """Whatever is reported of its parts: they never come to more tokens than there are."""
    parts = UsageDetails(many, many, many, many, many, many, many, many, many, 5, 7)
    for price in (CLAUDE, VOICES, SIGHTS):
        rates = Rates.of(price)
        bare, told = Usage(100, 100, 20), Usage(100, 100, 20, details=parts)
        cost, least = cost_micros(rates, told, None), cost_micros(rates, bare, None)
        assert cost is not None
        assert least is not None
        assert cost >= least
        most = Rates.of(Price(input=10, output=40))
        assert cost <= (cost_micros(most, bare, None) or 0)
        cached = Usage(100, 100, 20, many, details=parts)
        assert (cost_micros(rates, cached, None) or 0) >= min(cost, least) - 360


def test_what_is_reported_of_a_cut_call_stays_and_estimates_keep_it_without_a_price() -> None:
    rates, details = Rates.of(CLAUDE), UsageDetails(70, provider_cost_micros=9)
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("x" * 400))
    cut = cut_charge(rates, Usage(100, 1, None, 20, None, details), estimate, 50, None)
    assert cut.usage == Usage(100, 50, None, 20, None, details)
    assert cut.cost_micros == 40 + 8 + 350 + 1_000
    guessed = estimated_charge(rates, estimate, 5, details=details)
    assert guessed.usage.details == details
    assert guessed.cost_micros == estimated_charge(rates, estimate, 5).cost_micros
    alone = charge_of(rates, Usage(details=details), None, whole=True)
    assert (alone.state, alone.usage.details) == (UsageState.UNKNOWN, details)


def test_sums_are_exact_where_floats_are_not() -> None:
    rates = Rates.of(Price(input=0.1, output=0.2))
    assert cost_micros(rates, Usage(3 * 10**15, 3 * 10**15), None) == 9 * 10**14


def test_the_price_is_of_the_pattern_that_names_the_model_most_closely() -> None:
    dear = Price(input=5.0)
    upstream = Upstream("u", {}, "key", prices={"*": Price(input=1.0), "gemini-2.5-*": dear})
    prices = Prices(upstream)
    assert prices.of("gemini-2.5-pro") == prices.of("gemini-2.5-pro") == Rates.of(dear)
    assert prices.of("else") == Rates.of(Price(input=1.0))
    assert Prices(Upstream("u", {}, "key")).of("m") is None
    assert cost_micros(None, Usage(1, 1), None) is None


NOVEMBER = 1_795_824_000.0  # 2026-11-28


def of_openai(**prices: Price) -> Prices:
    return Prices(Upstream("u", {}, "key", prices=prices, provider="openai"), now=lambda: NOVEMBER)


def test_without_a_price_of_its_own_the_public_one_of_the_provider_counts() -> None:
    prices = of_openai(**{"gpt-5-mini": Price(input=9.0)})
    rates = prices.of("gpt-5")
    assert rates is not None
    assert (rates.input, rates.output) == (1_250_000, 10_000_000)
    assert prices.of("gpt-5-mini") == prices.of("gpt-5-mini", "flex") == Rates.of(Price(input=9.0))
    assert prices.of("my-model") is None
    at_home = Prices(Upstream("u", {}, "key"), now=lambda: NOVEMBER)
    assert at_home.of("gpt-5") is None


def test_the_maxima_of_a_model_are_those_of_the_provider_of_the_hosts() -> None:
    google = Upstream("gemini", {"gemini": "https://generativelanguage.googleapis.com"}, "k")
    ours = Upstream("gpu", {"openai": "http://gpu:8000/v1"}, "")
    assert Prices(google).most("gemini-2.5-flash") == (1_048_576, 65_536)
    assert Prices(ours).most("gemini-2.5-flash") == (None, None)


def test_prices_are_those_of_the_day_of_the_call() -> None:
    now = [NOVEMBER - 150 * 86_400]  # 2026-07-01
    prices = Prices(Upstream("u", {}, "key", provider="openai"), now=lambda: now[0])
    assert prices.of("gpt-6-luna") is None
    now[0] = NOVEMBER
    assert prices.of("gpt-6-luna") is not None


def test_a_call_that_may_end_on_the_next_day_is_bound_by_its_price_too() -> None:
    """Google doubles the price of this model with the year 2027."""
    now = [NOVEMBER]
    prices = Prices(Upstream("u", {}, "key", provider="gemini"), now=lambda: now[0])
    model = "gemini-3.8-flash"
    before = prices.of(model)
    assert prices.bound(model, "") == before
    now[0] = datetime(2026, 12, 31, 1, tzinfo=UTC).timestamp()
    assert prices.of(model) == prices.at_least(model, "") == before
    bound, batch = prices.bound(model, ""), prices.bound(model, "batch", is_chosen=True)
    now[0] += 86_400
    assert before != prices.of(model) == bound
    assert prices.of(model, "batch") == batch


ALL_MONDAY = PeakHours(3.0, ((0, 24),), frozenset({1}))


def test_prices_are_those_of_the_hour_and_bounds_those_of_the_dearest() -> None:
    now = [NOVEMBER]  # a Saturday
    prices = Prices(Upstream("u", {}, "key", provider="deepseek"), now=lambda: now[0])
    usual = prices.of("deepseek-flash")
    assert usual is not None
    assert usual.output == 600_000
    now[0] += 2 * 86_400 + 2 * 3_600  # Monday at 2
    peak = prices.of("deepseek-flash")
    assert peak is not None
    assert (peak.output, peak.cached) == (1_200_000, 6_000)
    assert prices.at_least("deepseek-flash", "") == peak
    now[0] += 2 * 3_600
    assert prices.of("deepseek-flash") == prices.at_least("deepseek-flash", "") == usual
    assert prices.bound("deepseek-flash", "") == peak  # it may go on until 6
    own = Price(input=1.0, peak=ALL_MONDAY)
    mine = Prices(Upstream("u", {}, "key", prices={"m": own}), now=lambda: now[0])
    assert mine.of("m") == Rates.of(Price(input=3.0))


def test_a_requested_tier_counts_only_where_it_is_the_dearer_one() -> None:
    prices = of_openai()
    usual = prices.of("gpt-5")
    assert prices.at_least("gpt-5", "flex") == prices.at_least("gpt-5", "") == usual
    assert prices.at_least("gpt-5", "priority") == prices.of("gpt-5", "priority") != usual
    assert prices.at_least("gpt-5", "no such tier") == usual
    # What a client asks for in vain lowers no charge, and no budget is reserved by a guess.
    assert prices.bound("gpt-5", "no such tier") is None
    assert prices.bound("gpt-5", "") == prices.bound("gpt-5", "default") == usual
    assert prices.bound("gpt-5", "flex") == usual
    for model in ("text-embedding-3-small", "text-embedding-3-large"):  # without output
        assert prices.bound(model, "batch") == prices.at_least(model, "batch") == prices.of(model)
    assert prices.bound("gpt-5", "priority") == prices.of("gpt-5", "priority")
    own = of_openai(m=Price(input=2.0, output=2.0, tiers={"fast": Price(input=4.0, output=4.0)}))
    assert own.bound("m", "no such tier") == own.of("m")
    assert own.at_least("m", "fast") == Rates.of(Price(input=4.0, output=4.0))


def test_the_tier_fast_costs_what_priority_does_unless_it_has_a_price_of_its_own() -> None:
    prices = of_openai(m=Price(input=1.0, tiers={"priority": Price(input=2.0)}))
    for model in ("gpt-5", "m"):
        priority = prices.of(model, "priority")
        assert prices.of(model, "fast") == prices.bound(model, "fast") == priority is not None
    assert prices.of("gpt-5", "ultrafast") is None
    own = Price(input=1.0, tiers={"priority": Price(input=2.0), "fast": Price(input=3.0)})
    assert of_openai(m=own).of("m", "fast") == Rates.of(Price(input=3.0))


def test_a_bound_is_of_the_dearer_tier_part_by_part() -> None:
    """A tier with prices of its own may be the dearer one for input, and the cheaper for output."""
    flex = Price(input=5.0, output=1.0, cached=0.5, above=100, long=Price(input=8.0, output=3.0))
    prices = of_openai(m=Price(input=1.0, output=2.0, tiers={"flex": flex}))
    bound = prices.bound("m", "flex")
    assert bound is not None
    assert bound.long is not None
    assert (bound.input, bound.output, bound.cached) == (5_000_000, 2_000_000, 1_000_000)
    assert (bound.above, bound.long.input, bound.long.output) == (100, 8_000_000, 3_000_000)
    assert prices.at_least("m", "flex") == bound


def test_the_bound_of_a_tier_that_the_gateway_chose_is_its_own_in_the_dearest_hour() -> None:
    price = Price(input=1.0, tiers={"batch": Price(input=0.5)}, peak=ALL_MONDAY)
    price = replace(price, tiers={"batch": replace(price.tiers["batch"], peak=ALL_MONDAY)})
    prices = Prices(Upstream("u", {}, "key", prices={"m": price}), now=lambda: NOVEMBER)
    assert prices.of("m", "batch") == Rates.of(Price(input=0.5))
    assert prices.bound("m", "batch", is_chosen=True) == Rates.of(Price(input=1.5))
    assert prices.bound("m", "batch") == Rates.of(Price(input=3.0))


def test_the_state_says_how_far_it_is_known() -> None:
    rates = Rates.of(FLASH)
    assert charge_of(rates, Usage(1, 2), None, whole=True).state is UsageState.TOLD
    assert charge_of(rates, Usage(1, 2), None, whole=False).state is UsageState.PARTIAL
    unknown = charge_of(rates, Usage(), None, whole=True)
    assert (unknown.state, unknown.cost_micros) == (UsageState.UNKNOWN, None)
    alone = charge_of(Rates.of(PICTURES), Usage(), 2, whole=True)
    assert (alone.state, alone.cost_micros) == (UsageState.UNKNOWN, 78_000)


def test_what_came_is_charged_whatever_was_reserved_or_learned() -> None:
    estimator = Estimator()
    pieces = pieces_of_text("x" * 400)
    for _ in range(200):
        estimate = estimator.of_pieces("m", "text_only", pieces)
        estimator.learn(estimate, Usage(input_tokens=2, output_tokens=1))
    estimate = estimator.of_pieces("m", "text_only", pieces, max_output_tokens=50)
    assert (estimate.expected_input_tokens, estimate.output_tokens) < (50, 50)
    charge = estimated_charge(Rates.of(FLASH), estimate, received_tokens("y" * 100_000))
    assert charge.state is UsageState.ESTIMATED
    assert charge.usage == Usage(100, 25_000)
    nothing = estimated_charge(Rates.of(FLASH), estimate, 0)
    assert (nothing.usage, nothing.cost_micros) == (Usage(100, 0), 30)


def test_a_cut_answer_is_charged_for_what_came_where_less_was_told() -> None:
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("x" * 400))
    rates = Rates.of(FLASH)
    told = Usage(90, 10, 5, 40, 105)
    assert cut_charge(rates, told, estimate, 30, None).usage == told
    more = cut_charge(rates, told, estimate, 31, None)
    assert (more.state, more.usage) == (UsageState.PARTIAL, Usage(90, 26, 5, 40))
    assert cut_charge(rates, Usage(output_tokens=3), estimate, 9, None).usage == Usage(100, 9)


def test_zeros_that_what_came_contradicts_are_no_usage() -> None:
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("x" * 400))
    rates = Rates.of(FLASH)
    begun = cut_charge(rates, Usage(0, 0, None, 0, 0), estimate, 9, None)
    assert (begun.state, begun.usage.input_tokens, begun.usage.output_tokens) == (
        "estimated",
        100,
        9,
    )
    later = cut_charge(rates, Usage(0, 8), estimate, 9, None)
    assert (later.state, later.usage) == (UsageState.PARTIAL, Usage(100, 8))
    left = cut_charge(rates, Usage(0, 0), estimate, 0, None)  # after its first event
    assert (left.state, left.usage) == (UsageState.ESTIMATED, Usage(100, 0))
    for told, charged in (
        (Usage(7, 0, None, None, 7), Usage(7, 9)),
        (
            Usage(7, 0, None, None, 70),
            Usage(7, None, None, None, 70),
        ),  # Gemini's, whose total is more
        (Usage(7, 0, 3), Usage(7, 0, 3)),
    ):
        assert cut_charge(rates, told, estimate, 9, None, whole=True).usage == charged


def test_zeros_of_a_prompts_answer_that_has_a_text_are_no_usage() -> None:
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("x" * 400))
    rates = Rates.of(FLASH)
    for told, charged in ((Usage(0, 0, None, None, 0), 100), (Usage(7, 0), 7)):
        answer = Answer(text=["Hello, sea"], usage=told)
        charge = answer_charge(rates, answer, estimate, whole=True)
        assert charge.state is UsageState.ESTIMATED
        assert charge.usage == Usage(charged, received_tokens("Hello, sea"))
    nothing = answer_charge(rates, Answer(usage=Usage(0, 0)), estimate, whole=True)
    assert (nothing.state, nothing.cost_micros) == (UsageState.TOLD, 0)


@pytest.mark.parametrize(
    ("told", "came", "charged", "micros"),
    [
        (Usage(None, 23, 67), 90, Usage(100, 23, 67), 30 + 225),  # of a picture at an address
        (Usage(None, 40), 900, Usage(100, 40), 30 + 100),  # what is told of a whole one stands
        (Usage(10), 8, Usage(10, 8), 3 + 20),
        (Usage(total_tokens=70), 0, Usage(70, 0), 21),  # of an embedding
        (Usage(None, 20, 5, None, 70), 9, Usage(45, 20, 5, None, 70), 14 + 62),  # 13.5 + 62.5: 76
    ],
)
def test_what_the_usage_of_a_whole_answer_lacks_is_estimated(
    told: Usage, came: int, charged: Usage, micros: int
) -> None:
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("x" * 400))
    assert not is_complete(told)
    charge = cut_charge(Rates.of(FLASH), told, estimate, came, None, whole=True)
    assert (charge.state, charge.usage) == (UsageState.ESTIMATED, charged)
    assert charge.cost_micros == micros


def test_a_usage_is_complete_with_both_its_sides_or_what_is_measured() -> None:
    seconds = UsageDetails(input_audio_seconds=7)
    for usage in (Usage(1, 0), Usage(1, None, None, None, 9), Usage(details=seconds)):
        assert is_complete(usage)
    for usage in (Usage(), Usage(None, 5, details=UsageDetails(searches=2))):
        assert not is_complete(usage)


@pytest.mark.parametrize(
    ("model", "tier", "share"),
    [
        ("gpt-5", "flex", 0.5),
        ("gpt-5", "priority", 2.0),
        ("gpt-4o", "flex", None),
        ("gpt-4o", "batch", 0.5),
        ("no-such-model", "flex", None),
        ("own", "flex", 0.4),
        ("own", "batch", None),
        ("uneven", "flex", 0.8),
    ],
)
def test_a_tier_costs_a_share_of_the_usual_price_where_both_are_stated(
    model: str, tier: str, share: float | None
) -> None:
    own = Price(2.0, 10.0, tiers={"flex": Price(0.8, 4.0)})
    uneven = Price(2.0, 10.0, tiers={"flex": Price(1.0, 8.0)})
    prices = {"own": own, "uneven": uneven}
    upstream = Upstream("oai", {}, "key", provider="openai", prices=prices)
    assert Prices(upstream).share(model, tier) == share


def test_a_reported_length_is_the_usage_of_a_whole_answer() -> None:
    heard = Usage(details=UsageDetails(input_audio_seconds=60))
    charge = charge_of(Rates.of(WHISPER), heard, None, whole=True)
    assert (charge.state, charge.cost_micros) == (UsageState.TOLD, 6_000)
    assert charge_of(Rates.of(FLASH), heard, None, whole=True).cost_micros is None


def test_without_a_usage_what_the_request_shows_is_charged_and_on_record() -> None:
    estimate = Estimator().of_pieces("m", "multi_modal", {Modality.AUDIO: 70.0})
    measured = UsageDetails(input_audio_seconds=7)
    charge = estimated_charge(Rates.of(WHISPER), estimate, 3, measured=measured)
    assert (charge.state, charge.cost_micros) == (UsageState.ESTIMATED, 700)
    assert charge.usage.details == measured
    told = UsageDetails(provider_cost_micros=5)
    charge = estimated_charge(Rates.of(FLASH), estimate, 3, details=told, measured=measured)
    assert charge.usage.details == told
    assert charge.cost_micros == 29  # 70 tokens at 0.3 and 3 at 2.5, halves up


def test_the_cost_of_speech_is_known_beforehand_where_it_is_by_characters() -> None:
    estimate = Estimator().of_pieces("m", "text_only", {Modality.LATIN: 10.0})
    spoken = UsageDetails(input_characters=40)
    cost = call_cost(Rates.of(Price(characters=15)), estimate, input_bytes=90, measured=spoken)
    assert (cost.most_micros, cost.likely_micros) == (600, 600)
    cost = call_cost(Rates.of(FLASH), estimate, input_bytes=90, measured=spoken)
    assert cost.most_micros is None
    assert "its cost depends on facts" in cost.unknown


def test_the_cost_of_a_video_is_known_beforehand_by_its_seconds_and_size() -> None:
    estimate = Estimator().of_pieces("veo", "image_generation", {Modality.LATIN: 10.0})
    price = Price(video_second=0.15, tiers={"4k": Price(video_second=0.35)})
    for tier, micros in (("", 1_200_000), ("4k", 2_800_000)):
        filmed = UsageDetails(output_video_seconds=8, tier=tier or None)
        rates = Rates.of(price.of_tier(tier) or price)
        cost = call_cost(rates, estimate, input_bytes=90, measured=filmed)
        assert (cost.most_micros, cost.likely_micros) == (micros, micros)
        charge = charge_of(rates, Usage(details=filmed), None, whole=True)
        assert (charge.state, charge.cost_micros) == (UsageState.TOLD, micros)


def test_pictures_that_alone_are_charged_are_known_beforehand_by_their_number() -> None:
    estimate = Estimator().of_pieces("imagen", "image_generation", {Modality.LATIN: 10.0})
    rates = Rates.of(Price(image=0.04))
    cost = call_cost(rates, estimate, input_bytes=90, images=3, draws_alone=True)
    assert cost.most_micros == 120_000
    assert call_cost(rates, estimate, input_bytes=90, max_output_tokens=1).most_micros is None


def test_the_listed_prices_are_those_by_which_calls_are_charged() -> None:
    """Of every model that an upstream serves: by name, by an alias, by a pattern."""
    own = Price(input=1.0, output=2.0)
    upstream = Upstream(
        "u",
        {"openai": "https://api.openai.com/v1"},
        "key",
        models=("gpt-5-mini", "gpt-4.1*", "mine-*", "of-nobody"),
        aliases={"fast": "gpt-5-nano"},
        prices={"mine-*": own},
    )
    day = date(2026, 11, 30)
    listed = listed_prices(upstream, day)
    assert (listed[0].models, listed[0].price, listed[0].checked) == (("mine-*",), own, None)
    found = {model: one for one in listed for model in one.models}
    assert len(found) == sum(len(one.models) for one in listed), "each once"
    assert found["of-nobody"].price is None
    prices = Prices(upstream, now=lambda: datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp())
    for model in ("gpt-5-mini", "gpt-5-nano", "gpt-4.1", "gpt-4.1-mini"):
        price = found[model].price
        assert price is not None
        assert prices.of(model) == Rates.of(price, is_public=True)
        assert found[model].checked is not None
    assert "gpt-4o" not in found
    assert (
        listed_prices(Upstream("own", {"openai": "http://gpu:8000"}, "", models=("*",)), day) == []
    )
