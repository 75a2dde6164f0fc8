"""The estimator on streams of calls that are made up: it converges, follows and stays bounded."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.admission.pictures import png
from tidegate.admission.estimator import (
    MOST_TRACKS,
    MOST_TRACKS_OF_A_TENANT,
    REMEMBERED,
    Estimate,
    Estimator,
    Learned,
    Modality,
    pieces_of,
)
from tidegate.call import Media, Usage, tokens_of

LETTERS = "abcdefghij klmnop qrstuv wxyz "
Truth = Callable[[Estimate], Usage]


def prompt(rng: random.Random) -> str:
    return LETTERS[0] * max(4, round(rng.lognormvariate(5, 1)))


def truth(rng: random.Random, ratio: float, noise: float = 0.1) -> Truth:
    """A provider that counts `ratio` times what is guessed, more or less."""

    def count(estimate: Estimate) -> Usage:
        given, taken = (
            max(1, round(sum(pieces.values()) * ratio * rng.lognormvariate(0, noise)))
            for pieces in (estimate.input_pieces, estimate.output_pieces)
        )
        return Usage(input_tokens=given, output_tokens=taken, total_tokens=given + taken)

    return count


def play(estimator: Estimator, rng: random.Random, count: Truth, calls: int) -> list[Estimate]:
    made = []
    for _ in range(calls):
        estimate = estimator.of_pieces("m", "text_only", pieces_of(prompt(rng)))
        estimator.learn(estimate, count(estimate))
        made.append(estimate)
    return made


def track(estimator: Estimator, part: str = "input") -> Learned:
    return next(learned for learned in estimator.error() if learned.part == part)


@pytest.mark.parametrize("ratio", [1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_it_converges_within_50_calls_when_guesses_are_off_by_3(ratio: float, seed: int) -> None:
    rng = random.Random(seed)
    estimator, count = Estimator(), truth(rng, ratio)
    play(estimator, rng, count, 50)
    # What holds from now on, over 400 more calls, of input and output.
    reserved = used = short = 0
    off = 0.0
    for _ in range(400):
        estimate = estimator.of_pieces("m", "text_only", pieces_of(prompt(rng)))
        usage = count(estimate)
        actual = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        total = estimate.input_tokens + estimate.output_tokens
        expected = estimate.expected_input_tokens + estimate.expected_output_tokens
        reserved, used, short = reserved + total, used + actual, short + (actual > total)
        off += abs(expected - actual) / actual
        estimator.learn(estimate, usage)
    assert off / 400 < 0.15
    assert short / 400 < 0.10
    assert 1.0 < reserved / used < 1.5


@pytest.mark.parametrize("ratio", [1 / 3, 1.0, 3.0])
def test_it_starts_safe(ratio: float) -> None:
    """Even the first ten calls together reserve enough, when guesses are off by 3."""
    rng = random.Random(7)
    estimator = Estimator()
    first = estimator.of_pieces("m", "text_only", pieces_of("a" * 400))
    assert first.input_tokens >= 3 * 100
    used = 0
    made = []
    for _ in range(10):
        estimate = estimator.of_pieces("m", "text_only", pieces_of(prompt(rng)))
        usage = truth(rng, ratio)(estimate)
        used += usage.total_tokens or 0
        made.append(estimate)
        estimator.learn(estimate, usage)
    assert sum(one.input_tokens + one.output_tokens for one in made) >= used


@pytest.mark.parametrize(("before", "after"), [(1.0, 3.0), (3.0, 1.0)])
def test_it_follows_a_provider_that_changes_its_mind(before: float, after: float) -> None:
    rng = random.Random(3)
    estimator = Estimator()
    play(estimator, rng, truth(rng, before), 200)
    play(estimator, rng, truth(rng, after), 50)
    assert track(estimator).ratios["latin"] == pytest.approx(after, rel=0.15)
    play(estimator, rng, truth(rng, after), REMEMBERED)
    learned = track(estimator)
    assert learned.error is not None
    assert learned.error < 0.15
    assert learned.margin < 1.4


def test_one_wild_figure_does_not_throw_it_off() -> None:
    rng = random.Random(11)
    estimator = Estimator()
    play(estimator, rng, truth(rng, 2.0), 100)
    before = track(estimator)
    estimate = estimator.of_pieces("m", "text_only", pieces_of("a" * 400))
    estimator.learn(estimate, Usage(input_tokens=10_000_000))
    after = track(estimator)
    assert after.ratios["latin"] == pytest.approx(before.ratios["latin"], rel=0.2)
    assert after.margin == pytest.approx(before.margin, rel=0.1)


def test_of_a_mixture_each_modality_finds_its_own_ratio() -> None:
    """Only the sum of a call is known, as a provider without details tells it."""
    rng = random.Random(5)
    estimator = Estimator()
    for _ in range(200):
        pictures = [Media("image/png", png(300, 300))] * rng.choice((0, 1, 4))
        text = "水" * rng.choice((0, 100, 1_000)) + "a" * rng.randint(1, 4_000)
        estimate = estimator.of_pieces("m", "multi_modal", pieces_of(text, pictures))
        pieces = estimate.input_pieces
        actual = (
            2 * pieces.get(Modality.LATIN, 0)
            + 0.5 * pieces.get(Modality.WIDE, 0)
            + 3 * pieces.get(Modality.IMAGE, 0)
        )
        estimator.learn(estimate, Usage(input_tokens=round(actual)))
    found = track(estimator).ratios
    assert found == pytest.approx({"latin": 2.0, "wide": 0.5, "image": 3.0}, rel=0.15)


def test_a_modality_that_comes_late_is_doubted_while_the_others_stay_known() -> None:
    rng = random.Random(9)
    estimator = Estimator()
    play(estimator, rng, truth(rng, 1.0), 100)
    picture = [Media("image/png", png(300, 300))]
    first = estimator.of_pieces("m", "multi_modal", pieces_of("a" * 40, picture))
    assert first.input_tokens > 2 * first.expected_input_tokens
    for _ in range(10):
        estimate = estimator.of_pieces("m", "multi_modal", pieces_of("a" * 40, picture))
        estimator.learn(estimate, Usage(input_tokens=10 + 3 * 258))
    learned = track(estimator).ratios
    assert learned["latin"] == pytest.approx(1.0, rel=0.15)
    assert learned["image"] == pytest.approx(3.0, rel=0.15)


def test_models_and_kinds_are_learned_apart() -> None:
    estimator = Estimator()
    for model, actual in (("a", 10), ("b", 1_000)):
        for _ in range(30):
            estimate = estimator.of_pieces(model, "text_only", pieces_of("a" * 400))
            estimator.learn(estimate, Usage(input_tokens=actual, output_tokens=actual))
    assert estimator.of_pieces("a", "text_only", pieces_of("a" * 400)).input_tokens in (10, 11)
    assert estimator.of_pieces(
        "b", "text_only", pieces_of("a" * 400)
    ).output_tokens == pytest.approx(1_000, rel=0.05)
    new_kind = estimator.of_pieces("a", "multi_modal", pieces_of("a" * 400))
    assert new_kind.input_tokens in (10, 11)
    assert new_kind.output_tokens > 800


def test_the_calls_own_bound_caps_its_output() -> None:
    estimate = Estimator().of_pieces("m", "text_only", pieces_of("hi"), max_output_tokens=50)
    assert (estimate.output_tokens, estimate.expected_output_tokens) == (50, 50)


def test_unknown_and_impossible_usage_teaches_nothing() -> None:
    estimator = Estimator()
    estimate = estimator.of_pieces("m", "text_only", pieces_of("hi"))
    for usage in (Usage(), Usage(input_tokens=0, output_tokens=0), Usage(total_tokens=5)):
        estimator.learn(estimate, usage)
    assert all(learned.calls == 0 for learned in estimator.error())
    assert estimator.of_pieces("m", "text_only", pieces_of("hi")) == estimate


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(), (None, None)),
        (Usage(input_tokens=3, output_tokens=4), (3, 4)),
        (Usage(input_tokens=3, output_tokens=4, thoughts_tokens=5, total_tokens=12), (3, 9)),
        (Usage(input_tokens=3, total_tokens=12), (3, 9)),
        (Usage(total_tokens=12), (None, None)),
        (Usage(output_tokens=4), (None, 4)),
        (Usage(input_tokens=9, total_tokens=3), (9, 0)),
    ],
)
def test_tokens_of_usage(usage: Usage, expected: tuple[int | None, int | None]) -> None:
    assert tokens_of(usage) == expected


def test_the_error_says_how_good_it_is_and_from_how_many_calls() -> None:
    rng = random.Random(2)
    estimator = Estimator()
    assert estimator.error() == ()
    play(estimator, rng, truth(rng, 3.0, noise=0.3), 100)
    for part in ("input", "output:text_only"):
        learned = track(estimator, part)
        assert learned.calls == 100
        assert learned.error is not None
        assert 0.1 < learned.error < 0.45
        assert learned.short is not None
        assert learned.short < 0.15


def test_its_size_is_bounded() -> None:
    estimator = Estimator()
    for number in range(2 * MOST_TRACKS_OF_A_TENANT):
        estimate = estimator.of_pieces(f"m{number}", "text_only", pieces_of("hi"))
        estimator.learn(estimate, Usage(input_tokens=5, output_tokens=5))
    assert len(estimator.error()) == MOST_TRACKS_OF_A_TENANT
    for number in range(MOST_TRACKS):
        estimate = estimator.of_pieces("m", "text_only", pieces_of("hi"), tenant=f"t{number}")
        estimator.learn(estimate, Usage(input_tokens=5, output_tokens=5))
    assert len(estimator.error()) == MOST_TRACKS


def test_of_calls_that_used_more_than_was_reserved_it_knows_the_last_ones() -> None:
    estimator = Estimator()
    for number in range(5 * REMEMBERED):
        estimate = estimator.of_pieces("m", "text_only", pieces_of("hi"))
        remembered = number >= 4 * REMEMBERED
        estimator.learn(estimate, Usage(5 if remembered else 2 * estimate.input_tokens))
        assert track(estimator).short == 1.0 or remembered
    assert track(estimator).short == 0.0


@given(
    st.lists(
        st.tuples(st.text(max_size=50), st.integers(-1, 10**9), st.integers(-1, 10**9)),
        max_size=80,
    )
)
def test_whatever_it_is_told_an_estimate_is_a_sound_number(
    calls: list[tuple[str, int, int]],
) -> None:
    estimator = Estimator()
    for text, input_tokens, output_tokens in calls:
        estimate = estimator.of_pieces("m", "text_only", pieces_of(text))
        assert 1 <= estimate.expected_input_tokens <= estimate.input_tokens
        assert 1 <= estimate.expected_output_tokens <= estimate.output_tokens
        # Ratio and margin are bounded by 1,000 each, doubt by about 3.
        assert estimate.input_tokens <= 4e6 * sum(pieces_of(text, ()).values())
        estimator.learn(estimate, Usage(input_tokens, output_tokens))


def test_a_request_without_any_input_is_estimated_and_learned_of() -> None:
    """As one for a file, or for the list of models."""
    estimator = Estimator()
    for _ in range(60):
        estimate = estimator.of_pieces("m", "other", {}, max_output_tokens=1)
        assert (estimate.expected_input_tokens, estimate.output_tokens) == (1, 1)
        estimator.learn(estimate, Usage(input_tokens=1, output_tokens=1))
